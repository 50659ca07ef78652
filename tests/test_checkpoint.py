"""fipo.checkpoint: tensors come back bitwise, what is damaged or does not fit on the disk is told to the user; the last
two checkpoints are kept, and the newest whole one is found."""

import resource
import shutil

import pytest
import torch

from fipo.checkpoint import FORMAT, check_tensors, load_checkpoint, load_tensors, save_checkpoint, save_tensors
from fipo.errors import UserError
from fipo.files import read_json, write_json


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


# Checkpoints


def save(folder, *steps, key="key"):
    for step in steps:
        save_checkpoint(folder, step, key, {"step": torch.tensor(step), "weights": torch.full((50,), float(step))})


def newest(folder, key="key"):
    """Step of the newest checkpoint that is whole, and what was said about the others."""
    said = []
    tensors = load_checkpoint(folder, key, said.append)
    return (int(tensors["step"]) if tensors else None), said


def test_the_last_two_are_kept_and_the_newest_is_found(tmp_path):
    assert newest(tmp_path / "none") == (None, [])
    for count in range(1, 5):
        save(tmp_path, 9 * count)
        kept = sorted(path.name for path in tmp_path.iterdir())
        assert kept == sorted(f"step_{9 * n}" for n in range(max(1, count - 1), count + 1))
        assert newest(tmp_path) == (9 * count, [])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "bit": lambda path: flip(path / "state.safetensors"),
    "truncated": lambda path: (path / "state.safetensors").write_bytes(b"x" * 20),
    "no state": lambda path: (path / "state.safetensors").unlink(),
    "no manifest": lambda path: (path / "checkpoint.json").unlink(),
    "empty manifest": lambda path: (path / "checkpoint.json").write_text(""),
    "list": lambda path: (path / "checkpoint.json").write_text("[]"),
    "deep": lambda path: (path / "checkpoint.json").write_text("[" * 10_000),
    "no format": lambda path: write_json(path / "checkpoint.json", {"step": 2}),
    "step": lambda path: write_json(path / "checkpoint.json", read_json(path / "checkpoint.json") | {"step": 1}),
    "checksum": lambda path: write_json(path / "checkpoint.json", read_json(path / "checkpoint.json") | {"sha256": 1}),
    "other checkpoint": lambda path: shutil.copytree(path.parent / "step_1", path, dirs_exist_ok=True),
    "link": lambda path: (
        (path / "state.safetensors").rename(path.parent / "elsewhere"),
        (path / "state.safetensors").symlink_to(path.parent / "elsewhere"),
    ),
    "a file": lambda path: (shutil.rmtree(path), path.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_reported_and_the_one_before_it_used(tmp_path, damage):
    save(tmp_path, 1, 2)
    DAMAGES[damage](tmp_path / "step_2")
    step, said = newest(tmp_path)
    assert step == 1 and len(said) == 1 and "step_2 is damaged" in said[0] and "the one before it" in said[0]
    save(tmp_path, 2)
    assert newest(tmp_path) == (2, [])


def test_a_damaged_one_of_a_later_step_does_not_push_good_ones_out(tmp_path):
    save(tmp_path, 10, 20)
    flip(tmp_path / "step_20" / "state.safetensors")
    save(tmp_path, 15)
    assert newest(tmp_path) == (15, []) and not (tmp_path / "step_20").exists() and (tmp_path / "step_10").exists()


def test_all_damaged_is_none_at_all(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        flip(tmp_path / f"step_{step}" / "state.safetensors")
    step, said = newest(tmp_path)
    assert step is None and len(said) == 2


def test_what_a_killed_writer_leaves_is_passed_over(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step_2.99.tmp").mkdir()
    (tmp_path / "step_x").mkdir()
    assert newest(tmp_path) == (1, [])


def test_one_of_another_config_or_format_stops(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(
        UserError,
        match="step_1 belongs to another config, text or model, or to .* order .*; put config.yaml and FIPO_CACHE back",
    ):
        newest(tmp_path, key="other")
    manifest = tmp_path / "step_1" / "checkpoint.json"
    write_json(manifest, read_json(manifest) | {"format": 1})
    with pytest.raises(UserError, match=f"step_1 has format 1, this version of FIPO reads {FORMAT}; finish the run"):
        newest(tmp_path)


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_two_before(tmp_path):
    save(tmp_path, 1, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*step_3"):
            save(tmp_path, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest(tmp_path) == (2, []) and sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


def test_tensors_must_be_those_expected():
    expected = {"a": torch.zeros(2, 3), "n": torch.tensor(1)}
    check_tensors({"a": torch.ones(2, 3), "n": torch.tensor(4)}, expected, "state")
    for given, text in (
        ({"a": torch.ones(2, 3)}, "state: tensor n is missing"),
        ({**expected, "b": torch.ones(1)}, "state: tensor b is unknown"),
        ({**expected, "a": torch.ones(3, 2)}, r"tensor a is torch.float32 \(3, 2\); expected torch.float32 \(2, 3\)"),
        ({**expected, "a": torch.ones(2, 3).double()}, r"tensor a is torch.float64 \(2, 3\); expected torch.float32"),
        ({**expected, "a": torch.full((2, 3), torch.nan)}, "tensor a holds NaN"),
    ):
        with pytest.raises(UserError, match=text):
            check_tensors(given, expected, "state")
