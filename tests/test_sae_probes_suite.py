"""The suite of sae-probes: its numbers (from fixtures/saebench.json, see test_parity), its datasets, the last token."""

import json
from pathlib import Path

import pytest
import torch
from tiny import sentences

from benchmarks.parity import check, inputs
from fipo.errors import UserError
from fipo.sae_probes_suite import last_token_activations, probe_scores, ranked_latents, split, suite_datasets

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "saebench.json").read_text())


def test_the_113_datasets_their_texts_and_labels():
    (row,) = check.check_suite_datasets(FIXTURE)
    assert row[2] and row[1].startswith("113 ")


def test_datasets_by_name_and_unknown_names():
    (one,) = suite_datasets(["41_truthqa_tf"])
    assert one.name == "41_truthqa_tf" and len(one.texts) == len(one.labels) == 786 and set(one.labels) == {0, 1}
    with pytest.raises(UserError, match="no binary dataset 41_none; its names are like 5_hist_fig_ismale"):
        list(suite_datasets(["41_none"]))


def test_split_and_scores_are_those_of_sae_probes(tmp_path):
    from safetensors.torch import save_file

    codes_NF, labels = inputs.planted_codes(700, 50, seed=5)
    assert labels == FIXTURE["job"]["suite"]["labels"]
    save_file({"codes_NF": codes_NF}, tmp_path / "suite.safetensors")
    rows = list(check.check_suite_scores(tmp_path, FIXTURE["job"], FIXTURE))
    assert len(rows) == 5 and all(row[2] for row in rows), rows


def test_split_is_balanced_disjoint_and_seeded():
    labels = [0, 1] * 750
    train_N, test_N = split(labels)
    assert len(train_N) == 1024 and len(test_N) == 475 and not set(train_N.tolist()) & set(test_N.tolist())
    y_N = torch.tensor(labels)
    assert y_N[train_N].sum() == 512 and y_N[test_N].sum() == 238
    assert torch.equal(train_N, split(labels)[0]) and not torch.equal(train_N, split(labels, seed=1)[0])


@pytest.mark.parametrize("labels", [[0, 1] * 110, [1] * 900 + [0] * 300])
def test_too_few_texts_of_a_class(labels):
    with pytest.raises(UserError, match="too small or too uneven: .* half of either class"):
        split(labels)


def test_ranking_is_blind_to_the_scale_of_a_latent():
    codes_NF, labels = inputs.planted_codes(400, 20, seed=6)
    scale_F = 2.0 ** torch.randint(-4, 5, (20,), generator=torch.Generator().manual_seed(0))
    y_N = torch.tensor(labels)
    first_F, second_F = (ranked_latents(codes, y_N)[:8] for codes in (codes_NF, codes_NF * scale_F))
    assert torch.equal(first_F, second_F) and set(first_F[:5].tolist()) <= set(range(6))


def test_a_telling_latent_scores_one_and_noise_a_half():
    _, labels = inputs.planted_codes(700, 10, seed=7)
    y_N = torch.tensor(labels)
    noise_NF = torch.rand(700, 10, generator=torch.Generator().manual_seed(1))
    assert 0.35 < probe_scores(noise_NF, labels, (1,))[1].auc < 0.65
    noise_NF[:, 3] = y_N * (1 + noise_NF[:, 3])
    found = probe_scores(noise_NF, labels, (1, 2))
    assert found[1].latents == [3] and found[1][:4] == (1.0, 1.0, 1.0, 1.0) and found[2].accuracy == 1.0


@pytest.mark.parametrize("architecture", ["gpt_neox", "gemma2", "bert"])
def test_last_token_is_the_last_content_token(load_lm, architecture):
    lm, texts = load_lm(architecture), sentences(30, seed=5)
    found_NLD = last_token_activations(texts, lm)
    assert found_NLD.shape == (30, 2, lm.width) and found_NLD.dtype == torch.float32
    for number in (0, 7, 29):
        ids = lm.tokenizer(texts[number])["input_ids"]
        if lm.begin_id is not None and ids[0] != lm.begin_id:
            ids = [lm.begin_id, *ids]
        acts_LSD = lm.activations(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[:, 0]
        last = max(place for place, token in enumerate(ids) if token not in lm.special_ids)
        assert last == len(ids) - (2 if architecture == "bert" else 1)
        torch.testing.assert_close(found_NLD[number], acts_LSD[:, last].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt_neox", "gemma2", "bert"])
def test_of_a_long_text_the_end_is_read(load_lm, architecture):
    """The model takes 64 positions, more than `context` (16), which is for pooled probing alone."""
    lm, long = load_lm(architecture), " ".join(sentences(12, seed=6))
    side = lm.tokenizer.truncation_side
    found = last_token_activations([long, "star " + long, long + " star"], lm)
    assert lm.tokenizer.truncation_side == side
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_a_text_without_content(load_lm):
    with pytest.raises(UserError, match="text 1 of the dataset has no content token; remove it"):
        last_token_activations(["the star", ""], load_lm("bert"))
