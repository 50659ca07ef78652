"""fipo.synthetic: the laws of the ground truth, measured on samples; and against SAELens' own generator."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import toys

from fipo.checkpoint import load_tensors, save_tensors
from fipo.errors import UserError
from fipo.metrics import max_cosines
from fipo.synthetic import SyntheticModel, Truth, build, orthogonalise

REFERENCE = json.loads((Path(__file__).parent / "fixtures" / "saelens.json").read_text(encoding="utf-8"))
SMALL = Truth(features=48, width=12, roots=3, branching=3, depth=2, rank=3, correlation=0.3)


@pytest.fixture(scope="module")
def model() -> SyntheticModel:
    return build(SMALL, toys.seeded(1))


@pytest.fixture(scope="module")
def values(model) -> torch.Tensor:
    """Values of 100,000 tokens, [N, G]."""
    return torch.cat([s.values_BG for s in model.batches(100_000, 10_000, toys.seeded(2))])


def depth_of(parent_G: torch.Tensor) -> list[int]:
    depths = []
    for parent in parent_G.tolist():
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


def test_forest_is_breadth_first_and_the_rest_stands_alone(model):
    depths = depth_of(model.parent_G)
    assert depths == [0] * 3 + [1] * 9 + [2] * 27 + [0] * 9
    assert model.parent_G[:14].tolist() == [-1, -1, -1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    cut = build(dataclasses.replace(SMALL, features=14), toys.seeded())
    assert cut.parent_G.tolist() == model.parent_G[:14].tolist(), "a forest cut short keeps its beginning"


def test_a_child_fires_only_with_its_parent_and_without_its_siblings(model, values):
    fires_NG = values > 0
    for child, parent in enumerate(model.parent_G.tolist()):
        if parent >= 0:
            assert not (fires_NG[:, child] & ~fires_NG[:, parent]).any()
    for children_K in model.children_GK[model.children_GK[:, 0] >= 0]:
        assert fires_NG[:, children_K].sum(1).max() == 1


def test_firing_follows_the_zipf_law_and_exclusion_is_made_up_for():
    """Without correlation, features that stand alone fire at their place in the law; children nearly so."""
    truth = Truth(features=48, width=4, roots=3, branching=3, depth=2, correlation=0.0, largest_chance=0.2, rank=1)
    fires_NG = build(truth, toys.seeded(1)).sample(100_000, toys.seeded(2)).values_BG > 0
    rank = torch.arange(1, 49, dtype=torch.float64)
    zipf = rank**-0.5
    law = 5e-4 + (0.2 - 5e-4) * (zipf - zipf[-1]) / (zipf[0] - zipf[-1])
    rate = fires_NG.double().mean(0)
    alone = [0, 1, 2, *range(39, 48)]
    error = (law * (1 - law) / len(fires_NG)).sqrt()
    assert ((rate - law).abs()[alone] < 5 * error[alone]).all()
    children = slice(3, 39)
    assert rate[children].sum().item() == pytest.approx(law[children].sum().item(), rel=0.15)
    assert (rate[children] / law[children] > 0.6).all()


def test_values_follow_their_law_and_a_child_s_is_scaled_by_its_parent_s(model, values):
    ratio_NG = values.clone()
    for child, parent in enumerate(model.parent_G.tolist()):
        if parent >= 0:
            ratio_NG[:, child] = values[:, child] / (values[:, parent] / model.mean_G[parent]).clamp_min(1e-9)
    for g in range(20):
        fired = ratio_NG[values[:, g] > 0, g]
        mean, std = model.mean_G[g].item(), model.std_G[g].item()
        assert fired.mean().item() == pytest.approx(mean, abs=6 * max(std, 0.01) / math.sqrt(len(fired)))
        assert fired.std().item() == pytest.approx(std, rel=0.15, abs=0.01)
    assert model.mean_G[0] == 5 and model.mean_G[-1] == 4 and (values >= 0).all()


def test_firing_correlates_as_the_copula_says(model, values):
    """P(both fire) of the two roots that correlate most, against a Monte-Carlo of the bivariate normal."""
    rho_GG = (model.factor_GR[:3] @ model.factor_GR[:3].T).triu(1)
    first, second = divmod(int(rho_GG.abs().argmax()), 3)
    rho = rho_GG[first, second].item()
    noise = torch.randn(400_000, 2, generator=toys.seeded(3))
    pair = torch.stack([noise[:, 0], rho * noise[:, 0] + math.sqrt(1 - rho**2) * noise[:, 1]], 1)
    chances = model.chance_G[[first, second]]
    expected = (pair > math.sqrt(2) * torch.erfinv(1 - 2 * chances)).all(1).float().mean().item()
    both = (values[:, [first, second]] > 0).all(1).float().mean().item()
    assert both == pytest.approx(expected, abs=0.004) and abs(expected - chances.prod().item()) > 0.012


def test_activations_are_the_sum_of_the_features_that_fired(model):
    sample = model.sample(50, toys.seeded(4))
    expected_BD = sample.values_BG @ model.features_GD + model.bias_D
    assert torch.allclose(sample.acts_BD, expected_BD, atol=1e-5)
    assert model.bias_D.norm().item() == pytest.approx(0.5)


def test_orthogonalising_descends_the_sum_over_all_pairs():
    rows_GD = torch.randn(30, 16, generator=toys.seeded())
    unit_GD = rows_GD / rows_GD.norm(dim=1, keepdim=True)
    naive_GD = unit_GD.clone().requires_grad_(True)
    adam = torch.optim.Adam([naive_GD], lr=0.01)
    for _ in range(20):
        gram_GG = naive_GD @ naive_GD.T
        off_GG = gram_GG - torch.diag(gram_GG.diagonal())
        adam.zero_grad()
        (off_GG.pow(2).sum() + 30 * (gram_GG.diagonal() - 1).pow(2).sum()).backward()
        adam.step()
    naive_GD = naive_GD.detach() / naive_GD.detach().norm(dim=1, keepdim=True)
    done_GD = orthogonalise(rows_GD, 20, 0.01)
    assert torch.allclose(done_GD, naive_GD, atol=1e-4)
    assert max_cosines(done_GD).mean() < 0.9 * max_cosines(unit_GD).mean()


def test_truth_and_data_come_from_their_generators_alone(model):
    again, other = build(SMALL, toys.seeded(1)), build(SMALL, toys.seeded(2))
    assert torch.equal(again.features_GD, model.features_GD) and not torch.equal(other.features_GD, model.features_GD)
    before = torch.get_rng_state()
    one, same, next_one = (model.sample(20, g) for g in (toys.seeded(5), toys.seeded(5), toys.seeded(6)))
    assert torch.equal(one.acts_BD, same.acts_BD) and not torch.equal(one.acts_BD, next_one.acts_BD)
    assert torch.equal(before, torch.get_rng_state())


def test_batches_cover_the_tokens(model):
    assert [len(s.acts_BD) for s in model.batches(25, 10, toys.seeded())] == [10, 10, 5]


def test_a_model_is_saved_and_loaded(model, tmp_path):
    save_tensors(tmp_path / "truth.safetensors", model.state_dict())
    loaded = SyntheticModel(**load_tensors(tmp_path / "truth.safetensors"))
    assert torch.equal(loaded.sample(30, toys.seeded()).acts_BD, model.sample(30, toys.seeded()).acts_BD)


def test_the_quick_model_is_synthsaebench_s_at_1024_features():
    """The numbers of SAELens' model of these settings: L0 7.3, 5.6 of it in the first 256, mean max |cos| .186."""
    quick = build(Truth(), toys.seeded(1))
    fires = torch.cat([s.values_BG > 0 for s in quick.batches(20_000, 2000, toys.seeded(2))]).float()
    assert fires.sum(1).mean().item() == pytest.approx(7.3, abs=0.2)
    assert fires[:, :256].sum(1).mean().item() == pytest.approx(5.6, abs=0.2)
    cos_GG = (quick.features_GD @ quick.features_GD.T).abs().fill_diagonal_(0)
    assert cos_GG.amax(1).mean().item() == pytest.approx(0.186, abs=0.003)


def test_samples_of_a_saelens_model_have_its_statistics():
    """The same truth sampled by both: firing rates, values and co-firing within 6 standard errors of both samples."""
    expected = {name: torch.tensor(value) for name, value in REFERENCE["samples"].items()}
    truth = SyntheticModel(**{name: torch.tensor(value) for name, value in REFERENCE["truth"].items()})
    tokens, theirs = 200_000, REFERENCE["samples"]["tokens"]
    values_NG = torch.cat([s.values_BG for s in truth.batches(tokens, 20_000, toys.seeded(7))])
    fires_NG = (values_NG > 0).float()
    both_GG = fires_NG.T @ fires_NG / tokens
    error_GG = (expected["cofiring_GG"].clamp_min(1e-5) * (1 / tokens + 1 / theirs)).sqrt()
    assert ((both_GG - expected["cofiring_GG"]).abs() < 6 * error_GG).all()
    mean_G = values_NG.sum(0) / fires_NG.sum(0)
    assert torch.allclose(mean_G, expected["mean_value_G"], rtol=0.03)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"features": 1}, "features"),
        ({"width": 1}, "width"),
        ({"roots": 0}, "roots"),
        ({"branching": 0}, "branching"),
        ({"depth": -1}, "depth"),
        ({"exponent": 0.0}, "exponent"),
        ({"largest_chance": 1.0}, "chance"),
        ({"smallest_chance": 0.5}, "chance"),
        ({"rank": 0}, "rank"),
        ({"correlation": -0.1}, "correlation"),
        ({"spread": 0.0}, "spread"),
    ],
)
def test_impossible_truth_is_named(change, key):
    with pytest.raises(UserError, match=key):
        Truth(**change)
