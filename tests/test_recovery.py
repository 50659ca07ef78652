"""fipo.recovery: a perfect SAE scores 1, a fresh one like random directions, and SAELens' code gives the same."""

import json
import math
from pathlib import Path

import pytest
import torch
import toys

from fipo import recovery as measures
from fipo.activations import ReLU, TopK
from fipo.config import RunConfig
from fipo.randomness import generator_for
from fipo.recovery import absolute_cosines, absorbed, composite, latent_of_feature, recovery
from fipo.sae import SAE
from fipo.synthetic import Sample, SyntheticModel, Truth, build

REFERENCE = json.loads((Path(__file__).parent / "fixtures" / "saelens.json").read_text(encoding="utf-8"))
ORTHOGONAL = Truth(features=16, width=16, roots=2, branching=3, depth=1, orthogonal_steps=2000, orthogonal_rate=0.01)


def judge(sae: SAE, model: SyntheticModel, tokens: int = 4000) -> measures.Recovery:
    return recovery(sae, list(model.batches(tokens, 1000, toys.seeded(9))), model.features_GD, model.parent_G)


def perfect(model: SyntheticModel) -> SAE:
    """Directions, order and signs as planted, but permuted; right for orthonormal features."""
    order = torch.randperm(len(model.features_GD), generator=toys.seeded(3))
    sae = SAE(model.features_GD.shape[1], len(order), ReLU(), generator=toys.seeded(4))
    sae.dec_FD.data = model.features_GD[order].clone()
    sae.enc_FD.data = model.features_GD[order].clone()
    sae.enc_bias_F.data = -model.features_GD[order] @ model.bias_D - 0.02
    sae.dec_bias_D.data = model.bias_D.clone()
    return sae


def test_a_perfect_sae_scores_one():
    model = build(ORTHOGONAL, toys.seeded(1))
    assert (model.features_GD @ model.features_GD.T - torch.eye(16)).abs().max() < 2e-3
    found = judge(perfect(model), model)
    for name in ("mcc", "f1", "precision", "recall", "explained_variance", "uniqueness"):
        assert getattr(found, name) == pytest.approx(1.0, abs=0.005), name
    assert found.absorption == 0 and found.composition == 0 and found.dead_share == 0 and found.mean_max_cosine < 1e-3


def test_a_fresh_sae_scores_like_random_directions_whatever_its_seed():
    """The trap of METHOD 4b: truth, data and SAE of one seed number must not share draws."""
    model = build(Truth(features=256, width=64, roots=2), generator_for(42, "truth"))
    samples = list(model.batches(2000, 1000, generator_for(42, "data")))
    random_FD = torch.randn(96, 64, generator=toys.seeded(77))
    expected = measures.mean_matched_cosine(absolute_cosines(random_FD, model.features_GD))
    for seed in (42, 43):
        sae = SAE(64, 96, TopK(4), generator=generator_for(seed, "init", 0))
        found = recovery(sae, samples, model.features_GD, model.parent_G)
        assert found.mcc == pytest.approx(expected, abs=0.02) and found.mcc < 0.45
        assert found.f1 < 0.15 and found.uniqueness > 0.7


def test_matching_is_one_to_one_and_the_best():
    cos_FG = torch.tensor([[0.9, 0.8, 0.0], [0.85, 0.1, 0.0]])
    assert measures.mean_matched_cosine(cos_FG) == pytest.approx((0.8 + 0.85) / 2)
    assert measures.mean_matched_cosine(cos_FG.T) == pytest.approx((0.8 + 0.85) / 2)


def test_measures_equal_those_of_saelens():
    """`eval_sae_on_synthetic_data` on the same tokens; numbers from benchmarks/saelens_reference.py."""
    case = {name: torch.tensor(value) for name, value in REFERENCE["evaluation"]["tensors"].items()}
    sae = SAE(*case["enc_DF"].shape, ReLU(), generator=toys.seeded())
    sae.enc_FD.data = case["enc_DF"].T
    for name in ("enc_bias_F", "dec_FD", "dec_bias_D"):
        getattr(sae, name).data = case[name]
    halves = []
    for part in (slice(0, 20), slice(20, None)):
        values_BG = case["values_BG"][part]
        pairs = values_BG.nonzero(as_tuple=True)
        acts_BD = values_BG @ case["features_GD"] + case["bias_D"]
        halves.append(Sample(acts_BD, *pairs, values_BG[pairs], values_BG.shape[1]))
    found = recovery(sae, halves, case["features_GD"], torch.full((case["values_BG"].shape[1],), -1))
    expected = REFERENCE["evaluation"]["result"]
    assert found.dead_share * sae.latents == pytest.approx(expected["dead_latents"]) and expected["dead_latents"] > 0
    theirs = expected | expected["classification"] | {"f1": expected["classification"]["f1_score"]}
    theirs["l0"] = expected["sae_l0"]
    for name in ("mcc", "uniqueness", "explained_variance", "l0", "precision", "recall", "f1"):
        assert getattr(found, name) == pytest.approx(theirs[name], rel=1e-4), name


def test_a_hole_in_the_parent_s_latent_is_absorption():
    """Orthonormal features 0 (parent of 1) and 2; the latent of 0 is silent on every second token with 1."""
    features = torch.eye(3)
    parent_G = torch.tensor([-1, 0, -1])
    truth_BG = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    fires_BF = truth_BG.clone()
    latent_G = latent_of_feature(absolute_cosines(features, features))
    assert absorbed(fires_BF, truth_BG, latent_G, parent_G).tolist() == [4, 0, 0]
    fires_BF[[1, 3], 0] = False
    assert absorbed(fires_BF, truth_BG, latent_G, parent_G).tolist() == [4, 2, 0]
    fires_BF[0, 0] = False  # alone: a miss, no absorption
    assert absorbed(fires_BF, truth_BG, latent_G, parent_G).tolist() == [4, 2, 0]
    assert absorbed(fires_BF, truth_BG, torch.tensor([-1, 1, 2]), parent_G).tolist() == [0, 0, 4], (
        "a parent nobody learned"
    )


def test_absorption_of_a_planted_sae():
    """A perfect SAE, but for one parent whose latent a child's silences: the share of its tokens with that child."""
    model = build(ORTHOGONAL, toys.seeded(1))
    samples = list(model.batches(4000, 1000, toys.seeded(9)))
    sae = perfect(model)
    cos_FG = absolute_cosines(sae.dec_FD, model.features_GD)
    child = int(model.children_GK[0, 0])
    sae.enc_FD.data[cos_FG[:, 0].argmax()] -= 50 * model.features_GD[child]
    sae.dec_FD.data[cos_FG[:, child].argmax()] = (model.features_GD[child] + model.features_GD[0]) / math.sqrt(2)
    fires_NG = torch.cat([s.values_BG > 0 for s in samples])
    pairs = (fires_NG[:, model.parent_G >= 0]).sum().item()
    found = recovery(sae, samples, model.features_GD, model.parent_G)
    assert found.absorption == pytest.approx(fires_NG[:, child].sum().item() / pairs, rel=0.02) and pairs > 100
    assert found.composition == pytest.approx(1 / 16)


def test_no_family_leaves_absorption_undefined():
    model = build(Truth(features=16, width=16, depth=0, roots=1), toys.seeded(1))
    found = judge(perfect(model), model, 1000)
    assert math.isnan(found.absorption) and math.isnan(found.orphaned)


def test_parents_that_no_latent_has_are_counted():
    """A perfect SAE, but that one parent's latent has the direction of its child instead."""
    model = build(ORTHOGONAL, toys.seeded(1))
    sae = perfect(model)
    child = int(model.children_GK[0, 0])
    lost = absolute_cosines(sae.dec_FD, model.features_GD)[:, 0].argmax()
    sae.dec_FD.data[lost] = model.features_GD[child]
    fires_NG = torch.cat([s.values_BG > 0 for s in model.batches(4000, 1000, toys.seeded(9))])
    expected = fires_NG[:, model.parent_G == 0].sum() / fires_NG[:, model.parent_G >= 0].sum()
    found = judge(sae, model)
    assert found.orphaned == pytest.approx(expected.item(), rel=1e-6) and found.absorption == 0
    assert judge(perfect(model), model).orphaned == 0


def test_a_feature_s_latent_is_the_closest_of_those_that_prefer_it():
    cos_FG = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.7, 0.0], [0.2, 0.6, 0.1]])
    assert latent_of_feature(cos_FG).tolist() == [0, 2, -1]


@pytest.mark.parametrize(
    ("weights", "mixed"),
    [
        ([1.0, 0.0, 0.0], False),
        ([-1.0, 0.0, 0.0], False),
        ([1.0, 0.3, 0.0], False),
        ([1.0, 0.35, 0.0], True),
        ([1.0, -0.5, 0.0], True),
        ([1.0, 1.0, 1.0], True),
    ],
)
def test_composition_is_a_second_feature_with_a_tenth_of_the_norm(weights, mixed):
    features_GD = torch.eye(4)[:3]
    assert composite(torch.tensor([weights]) @ features_GD, features_GD).tolist() == [mixed]


def test_composition_sees_through_features_that_are_not_orthogonal():
    """A pure feature is no mixture, however close another is; a mixture of two close ones is."""
    features_GD = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    rows_FD = torch.stack([features_GD[0], features_GD[1], features_GD[0] + features_GD[2]])
    assert composite(rows_FD, features_GD).tolist() == [False, False, True]


def test_random_directions_are_no_compositions():
    model = build(Truth(orthogonal_steps=0), toys.seeded(1))
    random_FD = torch.randn(256, 256, generator=toys.seeded(2))
    assert composite(random_FD, model.features_GD).float().mean() < 0.01


def test_measuring_twice_gives_the_same_and_changes_nothing():
    model = build(ORTHOGONAL, toys.seeded(1))
    config: RunConfig = toys.run_config("run_6")
    state = toys.fresh(config, width=16)
    state.sae.train()
    before = {name: value.clone() for name, value in state.state_dict().items()}
    found = judge(state.sae, model, 500)
    assert found == judge(state.sae, model, 500) and state.sae.training
    assert found == judge(state.sae.eval(), model, 500) and not state.sae.training
    after = state.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
