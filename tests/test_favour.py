"""Favours: which codes win the contest for the budget, that their values do not change, and what inference knows."""

import pytest
import torch
from torch.testing import assert_close

from fipo.activations import BatchTopK, TopK, threshold_of
from fipo.export import load_sae, save_sae
from fipo.favour import LEAST, favours
from fipo.importance import ImportanceEMA
from fipo.method import Levels
from fipo.sae import SAE
from fipo.sparse import working_times
from fipo.train import numbers_of, plan_of, step_favours, train_step
from tests import toys

BATCH, WIDTH, LATENTS, K = 40, 6, 24, 3


def uneven(seed: int = 0) -> torch.Tensor:
    """Favours from .5 to 2."""
    return 2 ** (2 * torch.rand(LATENTS, generator=toys.seeded(seed)) - 1)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=toys.seeded(seed))


def contest(scores_BF: torch.Tensor, count: int) -> torch.Tensor:
    """Which places win, by sorting them all."""
    winners = sorted(range(scores_BF.numel()), key=scores_BF.flatten().tolist().__getitem__)[-count:]
    won = torch.zeros(scores_BF.numel(), dtype=torch.bool)
    won[winners] = True
    return won.view_as(scores_BF) & (scores_BF > 0)


POWERS = (-0.5, -0.1, 0.25)


def test_a_favour_is_powers_of_importance_that_go_with_the_way_to_where_the_budget_is():
    sigma_F = torch.tensor([4.0, 1.0, 0.5, 0.5])  # mean 1.5
    cases = (0.0, 0.7, -0.5, 0), (1.0, 0.0, -0.1, 0), (1.0, 1.0, 0, 0.25), (torch.tensor(0.5), 0.2, -0.29, 0.025)
    for way, spare, rare, important in cases:
        expected = [(sigma / 1.5) ** rare * (1 + sigma / 1.5) ** important for sigma in sigma_F.tolist()]
        assert favours(POWERS, sigma_F, way, spare).tolist() == pytest.approx(expected, rel=1e-5)


def test_favours_have_no_unit():
    sigma_F = torch.rand(16, generator=toys.seeded()) + 0.1
    assert_close(favours(POWERS, 1000 * sigma_F, 0.3, 0.5), favours(POWERS, sigma_F, 0.3, 0.5))


def test_before_any_code_all_count_the_same_and_a_silent_latent_counts_as_one_of_least_importance():
    assert len(favours(POWERS, torch.zeros(5), 0.0, 1.0).unique()) == 1
    found = favours(POWERS, torch.tensor([0.0, 1e-9, 2.0]), 0.0, 1.0)
    assert found[0] == found[1] == pytest.approx(LEAST**-0.5) and found.isfinite().all()


@pytest.mark.parametrize("autocast", [True, False])
def test_favoured_rows_are_rounded_once(autocast):
    weight_FD, favour_F = normal(1500, 5), 0.5 + torch.rand(1500, generator=toys.seeded(2))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found_FD = working_times(weight_FD, favour_F)
    assert torch.equal(found_FD, (weight_FD * favour_F[:, None]).to(torch.bfloat16 if autocast else torch.float32))


@pytest.mark.parametrize("as_pairs", [True, False])
def test_the_largest_codes_times_favour_win_and_keep_their_values(as_pairs):
    pre_BF, favour_F = normal(BATCH, LATENTS), uneven()
    codes = BatchTopK(LATENTS, K)(pre_BF * favour_F, as_pairs=as_pairs, favour_F=favour_F)
    won_BF = contest(pre_BF * favour_F, K * BATCH)
    assert_close(codes.dense() if as_pairs else codes, torch.where(won_BF, pre_BF, 0))
    assert (won_BF != contest(pre_BF, K * BATCH)).any()


def test_training_codes_are_those_of_the_contest_and_their_gradient_that_of_the_encoder():
    sae = SAE(WIDTH, LATENTS, BatchTopK(LATENTS, K), generator=toys.seeded(3))
    x_BD, favour_F, upstream_BF = normal(BATCH, WIDTH), uneven(), normal(BATCH, LATENTS, seed=4)
    _, codes = sae.training_codes(x_BD, K, favour_F)
    pre_BF = sae.pre_codes(x_BD)
    expected_BF = torch.where(contest(pre_BF.detach() * favour_F, K * BATCH), pre_BF, 0)
    assert_close(codes.dense(), expected_BF)
    wanted = sae.enc_FD, sae.enc_bias_F
    found = torch.autograd.grad((codes.values_N * upstream_BF[codes.token_N, codes.latent_N]).sum(), wanted)
    assert_close(found, torch.autograd.grad((expected_BF * upstream_BF).sum(), wanted))


@pytest.mark.parametrize("as_pairs", [True, False])
def test_inference_has_a_threshold_for_every_latent(as_pairs):
    activation, pre_BF, favour_F = BatchTopK(LATENTS, K), normal(BATCH, LATENTS), uneven()
    codes = activation(pre_BF * favour_F, as_pairs=as_pairs, favour_F=favour_F)
    activation.observe(codes, favour_F)
    least = (pre_BF * favour_F)[contest(pre_BF * favour_F, K * BATCH)].min()
    assert_close(threshold_of(activation.eval()), least / favour_F)
    # All but the least code, which is at its threshold or to rounding beside it.
    kept_BF = activation(pre_BF) > 0
    assert (kept_BF != contest(pre_BF * favour_F, K * BATCH)).sum() <= 1


def test_the_thresholds_of_inference_are_averages_of_those_of_each_batch_whatever_favours_have_become():
    """Where favours move, what was kept by the last favours alone is no guide."""
    activation, expected_F, weight = BatchTopK(3, 1, decay=0.5), torch.zeros(3), 0.0
    for least, favour_F in ((1.0, [1.0, 2.0, 0.5]), (3.0, [2.0, 2.0, 1.0]), (2.0, [4.0, 1.0, 1.0])):
        favour_F = torch.tensor(favour_F)
        activation.observe(torch.diag(least / favour_F * torch.tensor([1.0, 1.5, 2.0])), favour_F)
        expected_F, weight = 0.5 * expected_F + 0.5 * least / favour_F, 0.5 * weight + 0.5
    assert_close(threshold_of(activation.eval()), expected_F / weight)


def test_shortage_compares_what_vied():
    activation, favour_F = BatchTopK(2, 1), torch.tensor([1.0, 4.0])
    activation.observe(torch.tensor([[2.0, 0.0], [0.0, 0.25]]), favour_F)  # times favour: 2 and 1
    assert activation.shortage() == pytest.approx(1 / 1.5)


def test_saved_thresholds_are_those_of_the_latents(tmp_path):
    sae = SAE(WIDTH, LATENTS, BatchTopK(LATENTS, K), generator=toys.seeded(3)).eval()
    sae.scale.fill_(0.5)
    sae.activation.threshold_F.copy_(0.4 / uneven())
    save_sae(tmp_path, sae, model="m", layer=0, context=8, dataset="d", beside={})
    acts_BD = normal(BATCH, WIDTH)
    codes_BF = sae.encode(acts_BD) / sae.scale
    assert 0 < (codes_BF > 0).sum() < (sae.pre_codes(sae.standardise(acts_BD)) > 0).sum()
    assert_close(load_sae(tmp_path).encode(acts_BD), codes_BF, rtol=1e-4, atol=1e-5)


def test_a_step_favours_by_its_schedule_and_the_shortage():
    state = toys.fresh(toys.run_config("run_6", levels=Levels(favour=POWERS, short=(0.0, 1.0))))
    *first, last_BD = toys.activations(4)
    for acts_BD in first:
        train_step(state, acts_BD)
    sae, way, spare = state.sae, numbers_of(state).order_share, 1 - state.sae.activation.shortage().item()
    favour_F = favours(POWERS, state.importance.values(), way, spare)
    assert 0 < way < 1 and 0 < spare < 1
    assert_close(step_favours(state, numbers_of(state)), favour_F)
    pre_BF, k = sae.pre_codes(sae.standardise(last_BD)).detach(), plan_of(state, len(last_BD)).k
    report = train_step(state, last_BD)
    won_BF = contest(pre_BF * favour_F, k * len(last_BD))
    assert_close(report.codes.dense(), torch.where(won_BF, pre_BF, 0))
    assert (won_BF != contest(pre_BF, k * len(last_BD))).any()


@pytest.mark.parametrize(
    "changes",
    [{"levels": None}, {"levels": Levels(favour=(0.0, 0.0, 0.0))}, {"architecture": "topk", "levels": Levels()}],
)
def test_nothing_is_favoured_without_levels_powers_or_a_common_budget(changes):
    state = toys.fresh(toys.run_config("run_6", **changes))
    train_step(state, toys.activations(1)[0])
    assert step_favours(state, numbers_of(state)) is None
    assert (
        isinstance(state.sae.activation, TopK)
        or (state.sae.activation.threshold_F == state.sae.activation.threshold).all()
    )


def test_importance_is_of_the_codes_not_of_what_vied():
    activation, favour_F, pre_BF = BatchTopK(LATENTS, K), uneven(), normal(BATCH, LATENTS)
    importance = ImportanceEMA(LATENTS, decay=0.9)
    importance.attach(activation)
    codes = activation(pre_BF * favour_F, as_pairs=True, favour_F=favour_F)
    importance.commit()
    assert_close(importance.values(), codes.dense().mean(0))
    assert_close(importance.values(), torch.where(contest(pre_BF * favour_F, K * BATCH), pre_BF, 0).mean(0))
