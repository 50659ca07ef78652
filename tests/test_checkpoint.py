"""fipo.checkpoint: tensors come back bitwise; a damaged file or a full disk is told to the user."""

import resource

import pytest
import torch

from fipo.checkpoint import load_tensors, save_tensors
from fipo.errors import UserError


def assert_round_trip(path, tensors):
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    save_tensors(path, tensors)
    loaded = load_tensors(path)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype, name


def test_round_trip_of_types_scalars_and_empty_tensors(tmp_path):
    tensors = {
        "float": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "double": torch.tensor(1 / 3, dtype=torch.float64),
        "infinite": torch.tensor([float("inf"), -float("inf")]),
        "integer": torch.tensor(2**40),
        "bytes": torch.Generator().manual_seed(0).get_state(),
        "pairs": torch.zeros(0, 2, dtype=torch.int64),
        "none": torch.zeros(0),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    assert_round_trip(tmp_path / "a.safetensors", tensors)


def test_round_trip_of_shared_storage(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "same": base, "transposed": base.T, "first": base[0], "column": base[:, 1]}
    assert_round_trip(tmp_path / "a.safetensors", tensors)


def test_round_trip_of_overlapping_views(tmp_path):
    base = torch.arange(12.0)
    assert_round_trip(tmp_path / "a.safetensors", {"base": base, "rest": base[1:], "end": base[6:]})


def test_save_replaces_and_leaves_no_temporary_file(tmp_path):
    for value in (1.0, 2.0):
        save_tensors(tmp_path / "a.safetensors", {"a": torch.tensor(value)})
    assert load_tensors(tmp_path / "a.safetensors")["a"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_file_is_a_user_error_that_names_it(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="a.safetensors is damaged"):
        load_tensors(path)


def test_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="a.safetensors"):
        load_tensors(tmp_path / "a.safetensors")


def test_write_error_is_a_user_error_and_leaves_the_old_file(tmp_path):
    """A real one: the system refuses files above 2,000 bytes."""
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.ones(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            save_tensors(path, {"a": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(load_tensors(path)["a"], torch.ones(3))
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]
