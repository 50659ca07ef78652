"""fipo.data.prepare: held-out and training tokens never meet, caches are keyed by all they depend on, statistics."""

import dataclasses

import pytest
import tiny
import torch
from toys import seeded

from fipo.config import Probing, Text
from fipo.data.harvest import harvest
from fipo.data.labelled import load_labelled
from fipo.data.lm import LanguageModel
from fipo.data.prepare import probe_store, statistics, training_activations
from fipo.errors import UserError

HELD, TOKENS = 100, 300


def text(source, **changes):
    given = {"source": str(source), "tokens": TOKENS, "held_out_tokens": HELD, "packed": False}
    return Text(**given | changes)


def stream(lm, packed):
    rows = (lm.packed_rows if packed else lm.token_rows)(tiny.sentences(150, seed=1))
    return torch.cat([chunk.acts_NLD for chunk in harvest(lm, rows)])


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
def test_first_tokens_are_held_out_and_the_next_trained(load_lm, text_folder, architecture, packed, cached):
    lm = load_lm(architecture)
    held_out, source = training_activations(text(text_folder, packed=packed, cached=cached), lm)
    expected_NLD = stream(lm, packed)
    assert held_out.tokens == HELD and torch.equal(held_out.read(0, HELD), expected_NLD[:HELD])
    taken = torch.cat([source.take(50) for _ in range(10)])[:TOKENS]
    assert torch.equal(taken[:TOKENS], expected_NLD[HELD : HELD + TOKENS][: len(taken)]) and len(taken) > 150


def test_live_source_begins_again_behind_the_held_out_tokens(load_lm, text_folder):
    lm = load_lm("bert")
    _, source = training_activations(text(text_folder, cached=False), lm)
    expected_NLD = stream(lm, packed=False)[HELD:]
    count, parts = 0, []
    while count < len(expected_NLD) + 50:
        parts.append(source.take(70))
        count += len(parts[-1])
    assert torch.equal(torch.cat(parts)[:count], torch.cat([expected_NLD, expected_NLD])[:count])


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
    with pytest.raises(UserError, match="do not vary"):
        statistics(torch.ones(10, 1, 4))
