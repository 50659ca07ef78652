"""fipo.data.prepare: held-out and training tokens never meet, caches are keyed by all they depend on, statistics."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import tiny
import torch
from toys import seeded

from fipo.config import Probing, Text
from fipo.data import harvest as harvest_module
from fipo.data import shards
from fipo.data.harvest import harvest
from fipo.data.labelled import LabelledText, load_labelled
from fipo.data.lm import LanguageModel
from fipo.data.prepare import probe_store, statistics, training_activations
from fipo.errors import UserError
from fipo.files import remove

HELD, TOKENS = 100, 300


def text(source, **changes):
    given = {"source": str(source), "tokens": TOKENS, "held_out_tokens": HELD, "packed": False}
    return Text(**given | changes)


def parts(lm, packed):
    """Activations of the first rows that hold `HELD` content tokens, and of the next that hold `TOKENS`; cut there."""
    rows = list((lm.packed_rows if packed else lm.token_rows)(tiny.sentences(150, seed=1)))
    ends = torch.tensor([sum(token not in lm.special_ids for token in row) for row in rows]).cumsum(0)
    held = int((ends < HELD).sum()) + 1
    trained = held + int((ends[held:] - ends[held - 1] < TOKENS).sum()) + 1
    found = []
    for chosen, tokens in ((rows[:held], HELD), (rows[held:trained], TOKENS)):
        found.append(torch.cat([chunk.acts_NLD for chunk in harvest(lm, chosen)])[:tokens])
    return found


@pytest.fixture
def silent(monkeypatch):
    """From now on the model may not run."""

    def start():
        def refuse(*_given):
            raise AssertionError("the language model ran")

        monkeypatch.setattr(LanguageModel, "activations", refuse)

    return start


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("architecture", "packed"), [("bert", False), ("gpt_neox", True)])
def test_first_rows_are_held_out_and_the_next_trained_over_and_over(load_lm, text_folder, architecture, packed, cached):
    lm = load_lm(architecture)
    held_out, source = training_activations(text(text_folder, packed=packed, cached=cached), lm)
    held_NLD, trained_NLD = parts(lm, packed)
    assert len(held_NLD) == HELD and len(trained_NLD) == TOKENS
    assert held_out.tokens == HELD and held_out.read(0, HELD).equal(held_NLD)
    taken, count = [], 0
    while count < 2 * TOKENS + 50:
        taken.append(source.take(70))
        count += len(taken[-1])
    assert torch.cat(taken).equal(torch.cat([trained_NLD] * 3)[:count])


@pytest.mark.parametrize("cached", [True, False])
def test_a_stream_is_taken_up_anywhere(load_lm, text_folder, cached):
    lm = load_lm("bert")
    _, trained_NLD = parts(lm, packed=False)
    _, source = training_activations(text(text_folder, cached=cached), lm)
    for position in (0, 1, 150, TOKENS - 1):
        source.seek(position)
        assert source.take(1).equal(trained_NLD[position : position + 1])


def test_a_stream_is_named_by_the_order_of_its_tokens(load_lm, text_folder, monkeypatch):
    """Which batches set; a run that goes on in another would lose tokens and double others."""
    lm, keys = load_lm("bert"), set()
    for batch_tokens in (2048, 2048, 16_384):
        monkeypatch.setattr(harvest_module, "BATCH_TOKENS", batch_tokens)
        keys.add(training_activations(text(text_folder, cached=False), lm)[1].key)
    assert len(keys) == 2


def test_held_out_text_is_as_long_as_the_text_trained_on(load_lm, tmp_path):
    """Of rows sorted by length the first would be the shortest."""
    lm = load_lm("bert")
    lines = [" ".join(["moon", "star", "orbit"] * (1 + number % 4)) for number in range(400)]
    tiny.write_parquet(tmp_path / "train.parquet", {"text": lines})
    held_out, source = training_activations(text(tmp_path, held_out_tokens=300, tokens=1200), lm)
    lengths = [store.texts().unique_consecutive(return_counts=True)[1] for store in (held_out, source.store)]
    assert lengths[0].max() == lengths[1].max() and lengths[0].min() == lengths[1].min() < lengths[1].max() / 2
    assert lengths[0].double().mean() == pytest.approx(lengths[1].double().mean().item(), rel=0.05)


@pytest.mark.parametrize("packed", [False, True])
def test_a_harvest_that_is_stopped_anywhere_is_the_same(load_lm, text_folder, monkeypatch, packed):
    """Text held out, text trained on and labelled text, stopped every few passes of the model; bit by bit."""
    lm = load_lm("gpt_neox")
    monkeypatch.setattr(shards, "SHARD_TOKENS", 12)
    monkeypatch.setattr(harvest_module, "BATCH_TOKENS", 48)
    labelled = LabelledText("x", {"a": list(tiny.sentences(40, seed=2))}, {"a": list(tiny.sentences(5, seed=3))})
    passes, original = [], LanguageModel.activations

    def stops(self, ids_BS, mask_BS):
        passes.append(1)
        if len(passes) % 3 == 0:
            raise KeyboardInterrupt
        return original(self, ids_BS, mask_BS)

    def all_stores():
        held_out, source = training_activations(text(text_folder, packed=packed), lm)
        return held_out, source.store, probe_store(labelled, lm)

    expected = all_stores()
    everything = [[torch.cat(parts) for parts in zip(*store.chunks(50), strict=True)] for store in expected]
    for store in expected:
        remove(store.folder)
    monkeypatch.setattr(LanguageModel, "activations", stops)
    stopped, found = 0, None
    while found is None and stopped < 50:
        with contextlib.suppress(KeyboardInterrupt):
            found = all_stores()
        stopped += found is None
    assert 3 < stopped < 50 and [store.tokens for store in found] == [len(parts[0]) for parts in everything]
    for store, parts in zip(found, everything, strict=True):
        again = [torch.cat(parts) for parts in zip(*store.chunks(50), strict=True)]
        assert all(map(torch.equal, again, parts))


def test_cached_activations_are_found_again(load_lm, text_folder, silent):
    lm = load_lm("bert")
    first = training_activations(text(text_folder), lm)
    silent()
    again = training_activations(text(text_folder), lm)
    assert again[0].folder == first[0].folder and again[1].store.folder == first[1].store.folder
    assert first[0].folder != first[1].store.folder


@pytest.mark.parametrize(
    "change", ["model", "layers", "context", "dtype", "packed", "text", "tokens", "held", "column"]
)
def test_cache_key_names_all_it_depends_on(load_lm, tmp_path, own_cache, change):
    folder = tmp_path / "text"
    lines = tiny.sentences(150, seed=1)
    tiny.write_parquet(folder / "train.parquet", {"text": lines, "body": lines[::-1]})
    lm, asked = load_lm("gpt_neox"), text(folder)
    training_activations(asked, lm)
    before = {path.name for path in own_cache.iterdir()}
    if change == "text":
        tiny.write_parquet(folder / "train.parquet", {"text": lines[::-1], "body": lines})
    changed = {"packed": {"packed": True}, "tokens": {"tokens": 301}, "held": {"held_out_tokens": 99}}
    changed |= {"column": {"field": "body"}}
    models = {"layers": {"layers": (0, 2)}, "context": {"context": 15}, "dtype": {"dtype": "bfloat16"}}
    if change == "model":  # the same tokeniser, other weights
        folder = tiny.save_model(tmp_path / "other", "gpt_neox", seed=1)
        other = LanguageModel(str(folder), (0, 1), dtype="float32", context=16, weights_sha256=None, device="cpu")
    else:
        other = load_lm("gpt_neox", **models.get(change, {}))
    _, source = training_activations(dataclasses.replace(asked, **changed.get(change, {})), other)
    assert len(before) == 2 and source.store.folder.name not in before


def test_probe_store_of_every_text(load_lm, labelled_folders, silent):
    lm = load_lm("bert")
    data = load_labelled(str(labelled_folders[0]), Probing(datasets=("x",), train_per_class=9, test_per_class=5), 0)
    store = probe_store(data, lm)
    assert store.texts().unique().tolist() == list(range(42))
    rows = list(lm.token_rows(data.texts))
    for number in (0, 20, 41):
        alone = torch.cat([chunk.acts_NLD for chunk in harvest(lm, [rows[number]])])
        torch.testing.assert_close(store.read(0, store.tokens)[store.texts() == number], alone, rtol=0, atol=1e-4)
    silent()
    assert probe_store(data, lm).folder == store.folder


@pytest.mark.parametrize("cached", [True, False])
def test_a_text_that_is_too_short_is_told(load_lm, text_folder, cached):
    """A stream would go round and round over the few tokens that there are."""
    with pytest.raises(UserError, match=r"ends after \d+ content tokens; 1000000 were asked for"):
        _, source = training_activations(text(text_folder, tokens=1_000_000, cached=cached), load_lm("bert"))
        while True:
            source.take(1000)


def test_a_disk_without_room_is_told_before_anything_is_harvested(load_lm, text_folder, own_cache, monkeypatch):
    lm = load_lm("bert")
    needed = (HELD + TOKENS) * 2 * tiny.WIDTH * 4
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _root, free=free: SimpleNamespace(free=free))
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="set text.cached to false"):
            training_activations(text(text_folder), lm)
        assert len([path for path in own_cache.iterdir() if path.is_dir()]) == 2 * fits


def test_rows_of_an_encoder_are_not_packed(load_lm, text_folder):
    with pytest.raises(UserError, match="text.packed is true, and .* is an encoder"):
        training_activations(text(text_folder, packed=True), load_lm("bert"))


def test_text_that_holds_nothing(load_lm, tmp_path, own_cache):
    lm = load_lm("bert")
    for number, lines in enumerate((["[SEP] [CLS]", "[PAD]"], [" ", "  "])):
        tiny.write_parquet(tmp_path / str(number) / "train.parquet", {"text": lines})
        with pytest.raises(UserError, match="no content token"):
            training_activations(text(tmp_path / str(number)), lm)
    tiny.write_parquet(tmp_path / "short" / "train.parquet", {"text": ["moon star"]})
    with pytest.raises(UserError, match="ends after 2 content tokens; 100 were asked for"):
        training_activations(text(tmp_path / "short"), lm)
    assert list(own_cache.iterdir()) == []


def test_statistics_against_numpy_in_float64():
    acts_NLD = torch.randn(9000, 2, 4, generator=seeded()) * torch.tensor([1.0, 300.0])[:, None] + 50
    mean_LD, scale_L = statistics(acts_NLD)
    array = acts_NLD.double().numpy()
    torch.testing.assert_close(mean_LD, torch.from_numpy(array.mean(0)).float())
    squared = ((array - array.mean(0)) ** 2).sum(2).mean(0)
    torch.testing.assert_close(scale_L, torch.from_numpy((4 / squared) ** 0.5).float())
    centred_NLD = (acts_NLD - mean_LD) * scale_L[:, None]
    torch.testing.assert_close(centred_NLD.pow(2).sum(2).mean(0), torch.full((2,), 4.0), rtol=1e-4, atol=0)


def test_activations_that_do_not_vary():
    for seed in range(20):  # sums of numbers that are all the same are not always the same to the last bit
        with pytest.raises(UserError, match="do not vary"):
            statistics(torch.randn(256, generator=seeded(seed)).expand(1000, 1, 256))
