"""fipo.objective: every term against brute force, gradients against float64 finite differences and autograd."""

import math

import pytest
import torch
import toys
from torch.nn.functional import normalize

from fipo.decoding import decode_levels
from fipo.lsh import candidate_pairs, collision_probability
from fipo.objective import (
    Terms,
    auxiliary,
    chunked_orthogonality,
    orthogonality,
    squared_error,
)
from fipo.reconstruction import nested_error
from fipo.sparse import pairs_of

ESTIMATORS = ["max", "sum", "unbiased"]
YIELDS = ["less_important", "both"]
LATENTS, WIDTH = 10, 5


def rows(latents: int = LATENTS, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """Rows of no particular norm, in float64."""
    return torch.randn(latents, width, generator=toys.seeded(seed), dtype=torch.float64)


def sigma(latents: int = LATENTS, seed: int = 1) -> torch.Tensor:
    return torch.rand(latents, generator=toys.seeded(seed), dtype=torch.float64)


def all_pairs(latents: int = LATENTS) -> torch.Tensor:
    return torch.triu_indices(latents, latents, 1).T


def probability(cos_P: torch.Tensor) -> torch.Tensor:
    return collision_probability(cos_P, 2, 2)


def brute_orthogonality(dec_FD, sigma_F, pairs, estimator, yields, margin=0.0) -> float:
    """The docstring of `orthogonality`, pair by pair on the Gram matrix."""
    unit_FD = dec_FD / dec_FD.norm(dim=1, keepdim=True)
    gram_FF = unit_FD @ unit_FD.T
    paid = [[] for _ in range(dec_FD.shape[0])]
    for i, j in pairs.tolist():
        for payer, holder in ((i, j), (j, i)):
            if yields == "both" or sigma_F[holder] > sigma_F[payer]:
                share = (sigma_F[holder] / (sigma_F[holder] + sigma_F[payer])).item()
                cost = share * max(gram_FF[i, j].item() - margin, 0.0) ** 2
                paid[payer].append(cost / probability(gram_FF[i, j]).item() if estimator == "unbiased" else cost)
    return sum((max(costs, default=0.0) if estimator == "max" else sum(costs)) for costs in paid) / len(paid)


# Sum, reconstruction and levels


def test_total_is_the_sum_of_the_terms():
    assert Terms(*torch.tensor([1.0, 20.0, 300.0, 4000.0])).total == 4321.0


def test_squared_error_is_the_mean_over_tokens_and_channels():
    x_BD, y_BD = rows(4, 3), rows(4, 3, seed=1)
    expected = sum((a - b) ** 2 for a, b in zip(x_BD.flatten().tolist(), y_BD.flatten().tolist(), strict=True)) / 12
    assert squared_error(x_BD, y_BD).item() == pytest.approx(expected)


def level_inputs():
    """Target, codes, decoder and bias with gradients; the level of every latent (three levels of unequal size)."""
    codes_BF = (rows(6, LATENTS, 2).relu()).requires_grad_()
    level_F = torch.tensor([2, 0, 1, 2, 0, 2, 1, 2, 2, 1])
    return rows(6, WIDTH, 3), codes_BF, rows().requires_grad_(), rows(1, WIDTH, 4)[0].requires_grad_(), level_F


def reference(parts_BMD, bias_D, s):
    """The oracle of `nested_error`: every x̂_m, its gradient left to autograd."""
    first_BD, *later = parts_BMD.unbind(1)
    levels = [bias_D + first_BD]
    for part_BD in later:
        levels.append(torch.lerp(levels[-1], levels[-1].detach(), s) + part_BD)
    return levels


def nested(codes_BF, dec_FD, bias_D, level_F, s, sparse=False):
    return reference(decode_levels(pairs_of(codes_BF) if sparse else codes_BF, dec_FD, level_F, 3), bias_D, s)


def level_loss(x_BD, levels):
    return torch.stack([squared_error(x_BD, level_BD) for level_BD in levels]).mean()


def test_without_stop_gradient_the_levels_are_a_naive_matryoshka():
    x_BD, codes_BF, dec_FD, bias_D, level_F = level_inputs()
    levels = nested(codes_BF, dec_FD, bias_D, level_F, 0.0)
    naive = []
    for m in range(3):
        inside = level_F <= m
        naive.append(codes_BF[:, inside] @ dec_FD[inside] + bias_D)
    for one, other in zip(levels, naive, strict=True):
        assert torch.allclose(one, other)
    inputs = (codes_BF, dec_FD, bias_D)
    ours = torch.autograd.grad(level_loss(x_BD, levels), inputs)
    theirs = torch.autograd.grad(level_loss(x_BD, naive), inputs)
    assert all(torch.allclose(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("sparse", [True, False])
def test_values_do_not_depend_on_the_stop_gradient(sparse):
    _, *inputs = level_inputs()
    expected = nested(*inputs, 0.0)
    for s in (0.3, 1.0):
        for one, other in zip(nested(*inputs, s, sparse), expected, strict=True):
            assert torch.allclose(one, other)


@pytest.mark.parametrize("sparse", [True, False])
def test_full_stop_gradient_leaves_every_level_its_own_latents(sparse):
    x_BD, codes_BF, dec_FD, bias_D, level_F = level_inputs()
    levels = nested(codes_BF, dec_FD, bias_D, level_F, 1.0, sparse)
    for m, level_BD in enumerate(levels):
        loss = squared_error(x_BD, level_BD)
        codes_grad_BF, dec_grad_FD = torch.autograd.grad(loss, (codes_BF, dec_FD), retain_graph=True)
        assert not dec_grad_FD[level_F != m].any() and not codes_grad_BF[:, level_F != m].any()
        assert dec_grad_FD[level_F == m].any() and codes_grad_BF[:, level_F == m].any()


@pytest.mark.parametrize("s", [0.5, 1.0])
def test_the_bias_belongs_to_the_first_level_and_learns_at_any_stop_gradient(s):
    x_BD, codes_BF, dec_FD, bias_D, level_F = level_inputs()
    levels = nested(codes_BF, dec_FD, bias_D, level_F, s)
    (grad_D,) = torch.autograd.grad(squared_error(x_BD, levels[0]), bias_D)
    assert torch.allclose(grad_D, 2 * (levels[0] - x_BD).sum(0) / x_BD.numel())


@pytest.mark.parametrize("s", [0.25, 0.5])
def test_a_partial_stop_gradient_fades_by_one_minus_s_a_level(s):
    x_BD, codes_BF, dec_FD, bias_D, level_F = level_inputs()
    plain = torch.autograd.grad(squared_error(x_BD, nested(codes_BF, dec_FD, bias_D, level_F, 0.0)[2]), dec_FD)[0]
    faded = torch.autograd.grad(squared_error(x_BD, nested(codes_BF, dec_FD, bias_D, level_F, s)[2]), dec_FD)[0]
    assert torch.allclose(faded, plain * (1 - s) ** (2 - level_F)[:, None])


@pytest.mark.parametrize("s", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("plain", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("robust", [0.0, 1.0, 2.0])
def test_nested_error_is_the_mean_over_the_levels_with_the_gradient_of_autograd(s, plain, levels, robust):
    """Over more tokens than go into the cache at once; the loss reaches the backward pass times 3. Where it is robust
    the gradient is that of the weighted mean, with constant weights."""
    parts_BMD = torch.randn(600, levels, WIDTH, generator=toys.seeded(2), dtype=torch.float64).requires_grad_()
    x_BD, bias_D = rows(600, WIDTH, 3), rows(1, WIDTH, 4)[0].requires_grad_()
    expected = reference(parts_BMD, bias_D, s)
    unlevelled = squared_error(x_BD, parts_BMD.sum(1) + bias_D)
    loss = torch.lerp(level_loss(x_BD, expected), unlevelled, plain)
    ours, residual_BD = nested_error(parts_BMD, bias_D, x_BD, s, plain, robust)
    assert torch.allclose(ours, loss)
    if robust:
        left_B = (x_BD - expected[-1].detach()).pow(2).mean(1) + 0.02
        root_B1 = (left_B ** (-robust / 2) / (left_B ** (-robust / 2)).mean()).sqrt()[:, None]
        weighted = [root_B1 * level_BD for level_BD in expected]
        unlevelled = squared_error(root_B1 * x_BD, root_B1 * (parts_BMD.sum(1) + bias_D))
        loss = torch.lerp(level_loss(root_B1 * x_BD, weighted), unlevelled, plain)
    assert torch.allclose(residual_BD, x_BD - expected[-1]) and not residual_BD.requires_grad
    gradients = (torch.autograd.grad(3 * value, (parts_BMD, bias_D)) for value in (ours, loss))
    for one, other in zip(*gradients, strict=True):
        assert other.any() and torch.allclose(one, other, rtol=1e-12, atol=1e-15)


def test_nested_error_of_bfloat16_parts_adds_in_float32():
    parts_BMD = torch.randn(600, 4, WIDTH, generator=toys.seeded(2)).bfloat16().requires_grad_()
    x_BD, bias_D = rows(600, WIDTH, 3).float(), rows(1, WIDTH, 4)[0].float().requires_grad_()
    loss = level_loss(x_BD, reference(parts_BMD.float(), bias_D, 0.5))
    ours, residual_BD = nested_error(parts_BMD, bias_D, x_BD, 0.5)
    assert torch.allclose(ours, loss, rtol=1e-6) and ours.dtype == residual_BD.dtype == torch.float32
    gradients = (torch.autograd.grad(value, (parts_BMD, bias_D)) for value in (ours, loss))
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


# Auxiliary loss


@pytest.mark.parametrize("k", [1, 3, 50])
def test_auxiliary_is_the_share_of_the_residual_that_dead_latents_leave(k):
    residual_BD, pre_BF, dec_FD = rows(6, WIDTH), rows(6, LATENTS, 1), rows(seed=2)
    dead = [1, 4, 5, 9]
    left = 0.0
    for residual_D, pre_F in zip(residual_BD, pre_BF, strict=True):
        chosen = sorted(dead, key=lambda f: pre_F[f].item())[-k:]
        left += (residual_D - sum(max(pre_F[f].item(), 0.0) * dec_FD[f] for f in chosen)).pow(2).sum().item()
    expected = left / residual_BD.pow(2).sum().item()
    assert auxiliary(residual_BD, pre_BF[:, dead], dec_FD[dead], k).item() == pytest.approx(expected)


def test_auxiliary_reaches_pre_activations_and_rows_and_not_the_residual():
    residual_BD, pre_BF = rows(6, WIDTH).requires_grad_(), rows(6, LATENTS, 1).requires_grad_()
    dec_FD = rows(seed=2).requires_grad_()
    auxiliary(residual_BD, pre_BF, dec_FD, 3).backward()
    assert ((pre_BF.grad != 0) <= (pre_BF > 0)).all() and pre_BF.grad.any() and dec_FD.grad.any()
    assert residual_BD.grad is None


def test_auxiliary_is_zero_when_none_is_dead_and_finite_without_a_residual():
    assert auxiliary(rows(6, WIDTH), rows(6, LATENTS)[:, :0], rows()[:0], 3) == 0
    assert auxiliary(torch.zeros(6, WIDTH), rows(6, LATENTS), rows(), 3).isfinite()


# Orthogonality


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("yields", YIELDS)
@pytest.mark.parametrize("margin", [0.0, 0.2])
@pytest.mark.parametrize("pairs", ["all", "some"])
def test_orthogonality_equals_brute_force_on_the_gram_matrix(estimator, yields, margin, pairs):
    pairs_P2 = all_pairs() if pairs == "all" else all_pairs()[::3]
    value = orthogonality(
        rows(), sigma(), pairs_P2, estimator=estimator, yields=yields, margin=margin, probability=probability
    )
    expected = brute_orthogonality(rows(), sigma(), pairs_P2, estimator, yields, margin)
    assert value.item() == pytest.approx(expected) and expected > 0


def test_sum_over_all_pairs_is_the_gram_form_when_both_yield():
    """Shares of a pair add up to 1, so Ω·F = half the squared positive part of the Gram matrix off its diagonal."""
    unit_FD = rows() / rows().norm(dim=1, keepdim=True)
    gram_FF = (unit_FD @ unit_FD.T).relu().pow(2)
    expected = (gram_FF.sum() - gram_FF.diagonal().sum()) / 2 / LATENTS
    assert torch.allclose(orthogonality(rows(), sigma(), all_pairs(), estimator="sum", yields="both"), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("yields", YIELDS)
def test_orthonormal_and_anti_parallel_rows_pay_exactly_nothing(estimator, yields):
    keywords = dict(estimator=estimator, yields=yields, probability=probability)
    dec_FD = torch.eye(4, 6).requires_grad_()
    value = orthogonality(dec_FD, sigma(4).float(), all_pairs(4), **keywords)
    value.backward()
    assert value == 0 and not dec_FD.grad.any()
    opposite_FD = torch.stack([rows(1)[0], -3 * rows(1)[0]]).requires_grad_()
    value = orthogonality(opposite_FD, sigma(2), all_pairs(2), **keywords)
    value.backward()
    assert value == 0 and not opposite_FD.grad.any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_orthogonality_is_blind_to_row_scale_sigma_scale_and_pair_order(estimator):
    keywords = dict(estimator=estimator, probability=probability)
    scale_F = torch.linspace(0.1, 30, LATENTS, dtype=torch.float64)
    plain = orthogonality(rows(), sigma(), all_pairs(), **keywords)
    assert torch.allclose(plain, orthogonality(rows() * scale_F[:, None], sigma(), all_pairs(), **keywords))
    assert torch.allclose(plain, orthogonality(rows(), 1e6 * sigma(), all_pairs(), **keywords))
    assert torch.allclose(plain, orthogonality(rows(), sigma(), all_pairs().flip(1), **keywords))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("yields", YIELDS)
def test_the_gradient_is_that_of_finite_differences_with_the_holders_held(estimator, yields):
    """For `unbiased` the probability is held as well."""
    here_FD, sigma_F, pairs_P2 = rows(), sigma(), all_pairs()

    def omega(dec_FD: torch.Tensor) -> torch.Tensor:
        """The sums of `brute_orthogonality`, of payers that move and holders that do not."""
        cos_FF = normalize(dec_FD, dim=1) @ normalize(here_FD, dim=1).T
        there_FF = normalize(here_FD, dim=1) @ normalize(here_FD, dim=1).T
        cost_FF = sigma_F / (sigma_F + sigma_F[:, None]) * cos_FF.relu().pow(2)  # a row pays to a column
        pays_FF = ~torch.eye(LATENTS, dtype=torch.bool)
        if yields == "less_important":
            pays_FF &= sigma_F[None, :] > sigma_F[:, None]
        cost_FF = (cost_FF / probability(there_FF) if estimator == "unbiased" else cost_FF) * pays_FF
        return (cost_FF.amax(1) if estimator == "max" else cost_FF.sum(1)).mean()

    dec_FD, keywords = here_FD.clone().requires_grad_(), dict(estimator=estimator, yields=yields)
    value = orthogonality(dec_FD, sigma_F, pairs_P2, probability=probability, **keywords)
    assert torch.allclose(value, omega(here_FD))
    expected_FD = torch.zeros_like(here_FD)
    for place in range(here_FD.numel()):
        step_FD = torch.zeros(here_FD.numel(), dtype=torch.float64).index_fill(0, torch.tensor(place), 1e-6)
        step_FD = step_FD.view_as(here_FD)
        expected_FD.view(-1)[place] = (omega(here_FD + step_FD) - omega(here_FD - step_FD)) / 2e-6
    assert torch.allclose(torch.autograd.grad(value, dec_FD)[0], expected_FD, rtol=1e-6, atol=1e-9)


def test_gradient_of_unbiased_treats_the_probability_as_a_constant():
    pairs_P2, dec_FD = torch.tensor([[0, 1]]), rows(2).requires_grad_()
    dec_FD.data[1] = dec_FD.data[0] + 0.3 * dec_FD.data[1]
    keywords = dict(sigma_F=sigma(2), pairs_P2=pairs_P2)
    plain = torch.autograd.grad(orthogonality(dec_FD, estimator="sum", **keywords), dec_FD)[0]
    weighted = orthogonality(dec_FD, estimator="unbiased", probability=probability, **keywords)
    cos = torch.cosine_similarity(dec_FD[0], dec_FD[1], dim=0)
    assert torch.allclose(torch.autograd.grad(weighted, dec_FD)[0], plain / probability(cos.detach()))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("yields", YIELDS)
def test_no_candidate_is_exactly_zero_with_a_usable_gradient(estimator, yields):
    dec_FD = rows().requires_grad_()
    none_P2 = torch.zeros(0, 2, dtype=torch.int64)
    value = orthogonality(dec_FD, sigma(), none_P2, estimator=estimator, yields=yields, probability=probability)
    value.backward()
    assert value == 0 and torch.equal(dec_FD.grad, torch.zeros_like(dec_FD))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_more_important_of_a_pair_is_held(estimator):
    for sigma_F, holder in ((torch.tensor([2.0, 1.0]), 0), (torch.tensor([1.0, 2.0]), 1)):
        dec_FD = torch.tensor([[1.0, 0.2], [0.8, 0.9]], requires_grad=True)
        orthogonality(dec_FD, sigma_F, all_pairs(2), estimator=estimator, probability=probability).backward()
        assert not dec_FD.grad[holder].any() and dec_FD.grad[1 - holder].any()


def test_when_both_yield_each_moves_by_the_other_s_share_of_importance():
    dec_FD = torch.tensor([[1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    orthogonality(dec_FD, torch.tensor([3.0, 1.0]), all_pairs(2), yields="both").backward()
    ratio = dec_FD.grad[1].norm() / dec_FD.grad[0].norm()
    assert ratio.item() == pytest.approx(3.0, rel=1e-5)


def test_gradient_descent_turns_the_less_important_row_away():
    dec_FD = torch.tensor([[1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    orthogonality(dec_FD, torch.tensor([3.0, 1.0]), all_pairs(2)).backward()
    moved_FD = dec_FD - 0.1 * dec_FD.grad
    assert moved_FD[1, 0] / moved_FD[1].norm() < 0.6


def test_silent_latents_share_equally():
    value = orthogonality(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.zeros(2), all_pairs(2), estimator="sum")
    assert value.item() == pytest.approx(0.5 / 2)


@pytest.mark.parametrize("yields", YIELDS)
def test_unbiased_approaches_the_sum_over_all_pairs(yields):
    """Averaged over 400 draws of planes, within four standard errors, themselves below 4 % of the sum."""
    unit_FD = rows(24, 8).float()
    unit_FD /= unit_FD.norm(dim=1, keepdim=True)
    truth = orthogonality(unit_FD, sigma(24), all_pairs(24), estimator="sum", yields=yields).item()
    generator, estimates = toys.seeded(5), []
    for _ in range(400):
        pairs_P2 = candidate_pairs(
            unit_FD, sigma(24), tables=2, bits=2, capacity=24, min_cosine=0.0, generator=generator, autocast=False
        )
        estimates.append(
            orthogonality(unit_FD, sigma(24), pairs_P2, estimator="unbiased", yields=yields, probability=probability)
        )
    estimates = torch.stack(estimates)
    error = estimates.std().item() / math.sqrt(len(estimates))
    assert error < 0.01 * truth and abs(estimates.mean().item() - truth) < 4 * error


# OrtSAE's penalty


@pytest.mark.parametrize("chunk", [3, 5, 100])
def test_ortsae_is_the_mean_squared_largest_cosine_inside_random_chunks(chunk):
    order = torch.randperm(LATENTS, generator=toys.seeded(4))
    unit_FD = rows() / rows().norm(dim=1, keepdim=True)
    gram = (unit_FD @ unit_FD.T).tolist()
    count = math.ceil(LATENTS / chunk)
    sizes = [LATENTS // count + (place < LATENTS % count) for place in range(count)]
    members, paid = order.tolist(), 0.0
    for size in sizes:
        part, members = members[:size], members[size:]
        paid += sum(max([0.0, *(gram[i][j] for j in part if j != i)]) ** 2 for i in part)
    assert chunked_orthogonality(rows(), order, chunk).item() == pytest.approx(paid / LATENTS) and paid > 0


def test_ortsae_moves_both_rows_of_a_pair_and_has_the_right_gradient():
    dec_FD = rows(6).requires_grad_()
    order = torch.arange(6)
    assert torch.autograd.gradcheck(lambda dec: chunked_orthogonality(dec, order, 3), (dec_FD,))
    pair = torch.tensor([[1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    chunked_orthogonality(pair, torch.arange(2), 8).backward()
    assert pair.grad[0].norm().item() == pytest.approx(pair.grad[1].norm().item()) and pair.grad.any()


def test_zero_bits_and_one_table_offer_all_pairs():
    unit_FD = rows().float() / rows().float().norm(dim=1, keepdim=True)
    settings = dict(tables=1, bits=0, capacity=LATENTS, min_cosine=0.0, generator=toys.seeded())
    pairs = candidate_pairs(unit_FD, sigma().float(), **settings).tolist()
    gram = unit_FD @ unit_FD.T
    assert pairs == [pair for pair in all_pairs().tolist() if gram[pair[0], pair[1]] >= 0]
