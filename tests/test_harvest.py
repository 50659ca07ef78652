"""fipo.data.harvest: batching and padding change nothing, any start is possible, NaN stops."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from fipo.data.harvest import _check_finite, harvest
from fipo.data.lm import LanguageModel
from fipo.errors import UserError


def whole(chunks):
    chunks = list(chunks)
    return torch.cat([chunk.acts_NLD for chunk in chunks]), torch.cat([chunk.text_N for chunk in chunks])


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_equals_one_text_at_a_time(load_lm, architecture):
    lm = load_lm(architecture)
    rows = list(lm.token_rows(tiny.sentences(23, seed=9)))
    acts_NLD, text_N = whole(harvest(lm, rows, batch_tokens=60, window=10))
    assert text_N.dtype == torch.int64
    for number, row in enumerate(rows):
        content = [place for place, id_ in enumerate(row) if id_ not in lm.special_ids]
        alone_LSD = lm.activations(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))[:, 0, content]
        torch.testing.assert_close(acts_NLD[text_N == number].transpose(0, 1), alone_LSD, rtol=0, atol=1e-4)
    assert len(text_N) == sum(id_ not in lm.special_ids for row in rows for id_ in row)
    token_N = torch.cat([chunk.token_N for chunk in harvest(lm, rows, batch_tokens=60, window=10)])
    for number, row in enumerate(rows):
        assert token_N[text_N == number].tolist() == [id_ for id_ in row if id_ not in lm.special_ids]


def test_windows_keep_the_order_of_texts_and_batches_stay_small(load_lm):
    lm = load_lm("bert")
    rows = list(lm.token_rows(tiny.sentences(25, seed=9)))
    seen = []
    original = lm.activations

    def watched(ids_BS, mask_BS):
        seen.append(ids_BS.shape)
        return original(ids_BS, mask_BS)

    lm.activations = watched
    try:
        _, text_N = whole(harvest(lm, rows, batch_tokens=60, window=10))
    finally:
        del lm.activations
    assert max(batch * length for batch, length in seen) <= 60 and len(seen) > 5
    windows = (text_N // 10).tolist()
    assert windows == sorted(windows) and set(text_N.tolist()) == set(range(25))


def test_any_stretch_of_a_window_has_texts_of_all_lengths():
    """Of rows of 1 to 100 tokens, a tenth of the stream that is read on its own is as long as all of it."""
    lengths = [1 + 37 * n % 100 for n in range(600)]

    def activations(ids_BS, _mask_BS):
        return torch.zeros(1, *ids_BS.shape, 2)

    lm = SimpleNamespace(special_ids=[0], pad_id=0, activations=activations, device="cpu")
    _, text_N = whole(harvest(lm, [[1] * length for length in lengths], batch_tokens=400, window=600))
    length_N = torch.tensor(lengths)[text_N].double()
    for part_N in length_N.split(len(length_N) // 10):
        assert abs(part_N.mean() - length_N.mean()) < 0.1 * length_N.mean()
    assert length_N.long().bincount().tolist() == [0, *(6 * length for length in range(1, 101))]


@pytest.mark.parametrize(("device", "passes"), [("cpu", 3), ("cuda", 1)])
def test_a_gpu_is_given_more_at_a_time(device, passes):
    """Three times 2,048 tokens in rows of 128, in one window; a stand-in counts the passes."""
    seen = []

    def activations(ids_BS, _mask_BS):
        seen.append(ids_BS.numel())
        return torch.zeros(1, *ids_BS.shape, 2)

    lm = SimpleNamespace(special_ids=[0], pad_id=0, activations=activations, device=device)
    acts_NLD, _ = whole(harvest(lm, [[1] * 128] * 48))
    assert len(seen) == passes and len(acts_NLD) == sum(seen) == 3 * 2048


def test_rows_without_content_are_passed_over(load_lm):
    lm = load_lm("bert")
    rows = [[1, 2], *lm.token_rows(["moon star"]), [1, 3, 2]]
    _, text_N = whole(harvest(lm, rows))
    assert set(text_N.tolist()) == {1}


def test_skip_is_the_full_stream_from_there_on(load_lm):
    lm = load_lm("llama")
    rows = list(lm.token_rows(tiny.sentences(20, seed=9)))
    full = list(harvest(lm, rows, batch_tokens=64, window=8))
    acts_NLD, text_N = whole(full)
    token_N = torch.cat([chunk.token_N for chunk in full])
    total = len(text_N)
    for skip in (0, 1, 30, 63, 64, 65, total // 2, total - 1):
        later = list(harvest(lm, rows, batch_tokens=64, window=8, skip=skip))
        later_NLD, later_N = whole(later)
        assert torch.equal(later_NLD, acts_NLD[skip:]) and torch.equal(later_N, text_N[skip:])
        assert torch.equal(torch.cat([chunk.token_N for chunk in later]), token_N[skip:])
    assert list(harvest(lm, rows, batch_tokens=64, window=8, skip=total)) == []


def test_skipped_batches_never_reach_the_model(load_lm, monkeypatch):
    lm = load_lm("llama")
    rows = list(lm.token_rows(tiny.sentences(20, seed=9)))
    first = next(harvest(lm, rows, batch_tokens=64))
    calls = []
    original = LanguageModel.activations
    monkeypatch.setattr(LanguageModel, "activations", lambda self, *given: calls.append(1) or original(self, *given))
    next(harvest(lm, rows, batch_tokens=64, skip=len(first.text_N)))
    assert len(calls) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_enough(value):
    lm = SimpleNamespace(name="toy", layers=(1, 4), dtype=torch.bfloat16)
    acts_NLD = torch.ones(5, 2, 3, dtype=torch.bfloat16)
    _check_finite(acts_NLD, lm)
    acts_NLD[3, 1, 2] = value
    with pytest.raises(UserError, match="toy hold NaN or infinity in layer 4 "):
        _check_finite(acts_NLD, lm)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_name_the_layer(model_folder, value):
    lm = LanguageModel(
        str(model_folder("llama")), (0, 2), dtype="float32", context=16, weights_sha256=None, device="cpu"
    )
    lm.blocks[2].mlp.down_proj.weight[0, 0] = value
    rows = lm.token_rows(tiny.sentences(3, seed=9))
    with pytest.raises(UserError, match="hold NaN or infinity in layer 2 .*float32"):
        list(harvest(lm, rows))
