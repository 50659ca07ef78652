"""fipo.sparse: codes as pairs are the same codes, with the same statistics, gradients and steps as the matrix."""

from dataclasses import replace

import pytest
import torch
import toys

from fipo import activations, sparse
from fipo.activations import BatchTopK, TopK, build_activation
from fipo.decoding import decode_levels
from fipo.importance import ImportanceEMA
from fipo.levels import latent_levels, ranks
from fipo.search import _partitioned, largest_of_rows
from fipo.sparse import Codes, affine, attach, grouped, pairs, pairs_of, positive, row_products, sum_rows
from fipo.state import TrainState
from fipo.train import train_step

BATCH, LATENTS, WIDTH, LEVELS = 7, 40, 5, 3
SPARSE = ["topk", "batchtopk"]


def pre_codes(seed: int = 0, latents: int = LATENTS) -> torch.Tensor:
    """Pre-activations; token 2 has none above 0, token 3 one alone."""
    pre_BF = torch.randn(BATCH, latents, generator=toys.seeded(seed), dtype=torch.float64)
    pre_BF[2:4] = -pre_BF[2:4].abs()
    pre_BF[3, 4] = 1.0
    return pre_BF


def both(name: str, pre_BF: torch.Tensor, k: int = 3) -> tuple[Codes, torch.Tensor]:
    activation = build_activation(name, pre_BF.shape[1], k)
    return activation(pre_BF, as_pairs=True), activation(pre_BF)


# Pairs are the codes


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("latents", [9, LATENTS, 400])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_pairs_are_the_codes_of_the_matrix(name, latents, k):
    """With and without tiles; among few latents the budget exceeds the positive values."""
    codes, codes_BF = both(name, pre_codes(latents=latents), k)
    assert torch.equal(codes.dense(), codes_BF) and codes_BF.any()
    assert (codes.token_N.diff() >= 0).all() and not codes.values_N.requires_grad
    assert torch.equal(positive(codes).sort().values, positive(codes_BF).sort().values)
    assert torch.equal(pairs_of(codes_BF).dense(), codes_BF)


@pytest.mark.parametrize("latents", [16, 64, 400, 1000, 1001, 8192])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_the_search_through_tiles_finds_the_k_largest(latents, k):
    pre_BF = torch.randn(20, latents, generator=toys.seeded(latents))
    found_BK = pre_BF.gather(1, largest_of_rows(pre_BF, k))
    assert torch.equal(found_BK.sort(1, descending=True).values, pre_BF.topk(k).values)


@pytest.mark.parametrize(
    ("shape", "k"), [((7, 1), 1), ((3, 40), 40), ((5, 400), 16), ((800, 400), 32), ((2, 70_000), 9)]
)
def test_of_equal_numbers_the_first_are_found(shape, k):
    """int16 of the whole range, each about thrice; up to 65,536 a row, beyond which only the values are promised."""
    keys_BF = torch.randint(-(2**15), 2**15, shape, generator=toys.seeded()).to(torch.int16)
    keys_BF = torch.where(torch.rand(shape, generator=toys.seeded(1)) < 0.7, keys_BF // 1000 * 1000, keys_BF)
    found_BK = _partitioned(keys_BF, k).sort(1).values
    expected_BK = keys_BF.int().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    if shape[1] <= 2**16:
        assert torch.equal(found_BK, expected_BK)
    assert torch.equal(keys_BF.gather(1, found_BK).sort(1).values, keys_BF.gather(1, expected_BK).sort(1).values)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 1.2, 1.5, 2.0, 100.0])
@pytest.mark.parametrize("k", [1, 3, 8, 11, 40, 60])
def test_the_least_code_of_the_last_batch_never_changes_the_pairs(threshold, k):
    activation, pre_BF = BatchTopK(LATENTS, k), pre_codes()
    activation.latest.fill_(threshold)
    assert torch.equal(activation(pre_BF, as_pairs=True).dense(), activation(pre_BF))


def test_the_search_begins_just_below_the_least_code_of_the_last_batch(monkeypatch):
    activation, floors = BatchTopK(LATENTS, 3), []
    found = activations.largest_of_batch
    monkeypatch.setattr(activations, "largest_of_batch", lambda *given: floors.append(given[2].item()) or found(*given))
    least = []
    for seed in (1, 2, 3):
        codes = activation(pre_codes(seed), as_pairs=True)
        activation.observe(codes)
        least.append(codes.values_N.min().item())
    assert least[0] != least[1] and floors == pytest.approx([0.0, 0.95 * least[0], 0.95 * least[1]])
    assert "latest" not in activation.state_dict()


def test_pairs_say_where_every_token_starts_and_zeros_behind_them_belong_to_none():
    token_N, latent_N = torch.tensor([0, 0, 2, 1, 3]), torch.tensor([4, 1, 0, 2, 2])
    values_N = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0])
    assert pairs(values_N, token_N, latent_N, 4, 5, torch.tensor(3)).starts_S.tolist() == [0, 2, 2, 3, 3]
    assert pairs(values_N[:3], token_N[:3], latent_N[:3], 4, 5).starts_S.tolist() == [0, 2, 2, 3, 3]


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("k", [3, 9])
@pytest.mark.parametrize("latents", [LATENTS, 400])
def test_bfloat16_is_searched_as_float32_is(name, k, latents):
    """Its bits as integers: negative values, both zeros and subnormal ones; ties are told by their value."""
    pre_BF = pre_codes(latents=latents).bfloat16()
    pre_BF[4, :5] = torch.tensor([-0.0, 0.0, 1e-40, -1e-40, 3e38])
    pre_BF[5] = -0.0
    narrow, wide = (both(name, kind, k)[0] for kind in (pre_BF, pre_BF.float()))
    for token in range(BATCH):
        values = (part.values_N[(part.token_N == token) & (part.values_N > 0)] for part in (narrow, wide))
        assert torch.equal(*(part.sort().values for part in values))


def test_ties_of_batchtopk_are_all_kept_as_pairs():
    pre_BF = pre_codes().mul(4).round().bfloat16()
    codes, codes_BF = both("batchtopk", pre_BF)
    assert (codes_BF > 0).sum() > 3 * BATCH, "else there is no tie at the boundary"
    assert torch.equal(codes.dense(), codes_BF.float())


def test_bfloat16_pairs_have_float32_values():
    codes, codes_BF = both("topk", pre_codes().bfloat16())
    assert codes.values_N.dtype == torch.float32 and torch.equal(codes.dense(), codes_BF.float())


def test_pairs_of_an_empty_batch():
    codes, _ = both("topk", torch.zeros(0, LATENTS))
    assert codes.dense().shape == (0, LATENTS) and not len(codes.values_N)


# Statistics


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_importance_of_pairs_is_that_of_the_matrix(name, norm):
    states = []
    for form in (0, 1):
        ema = ImportanceEMA(LATENTS, decay=0.9, norm=norm)
        for seed in range(4):
            ema.collect(both(name, pre_codes(seed).float())[form])
            ema.commit()
        states.append(ema.state_dict())
    assert states[0]["mean_F"].any() and (states[0]["silent_tokens_F"] > 0).any()
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], rtol=1e-6), key


def test_the_hook_reads_pairs():
    ema, activation = ImportanceEMA(LATENTS, decay=0.9), TopK(3)
    handle = ema.attach(activation)
    codes = activation(pre_codes(), as_pairs=True)
    handle.remove()
    activation(pre_codes(1), as_pairs=True)
    ema.commit()
    assert torch.allclose(ema.values(), codes.dense().mean(0).float())


def test_the_inference_threshold_learns_from_pairs():
    one, other = BatchTopK(LATENTS, 3), BatchTopK(LATENTS, 3)
    for seed in range(3):
        one.observe(one(pre_codes(seed), as_pairs=True))
        other.observe(other(pre_codes(seed)))
    assert torch.equal(one.threshold, other.threshold) and one.threshold > 0


# Gradients


def weights() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Input, encoder, bias and decoder in float64, and levels of which the second is empty. Few codes are positive."""
    generator = toys.seeded(3)
    x_BD, enc_FD, bias_F, dec_FD = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((BATCH, WIDTH), (LATENTS, WIDTH), (LATENTS,), (LATENTS, WIDTH))
    )
    x_BD[2] = 0
    level_F = 2 * torch.randint(0, 2, (LATENTS,), generator=generator)
    return x_BD, [part.requires_grad_() for part in (enc_FD, bias_F - 3, dec_FD)], level_F


def parts_of(name: str, as_pairs: bool, enc_FD: torch.Tensor, bias_F: torch.Tensor, dec_FD: torch.Tensor):
    x_BD, _, level_F = weights()
    pre_BF, activation = x_BD @ enc_FD.T + bias_F, build_activation(name, LATENTS, 3)
    codes = attach(activation(pre_BF.detach(), as_pairs=True), x_BD, enc_FD, bias_F) if as_pairs else activation(pre_BF)
    return decode_levels(codes, dec_FD, level_F, LEVELS)


@pytest.mark.parametrize("name", SPARSE)
def test_gradcheck_of_the_whole_path_in_float64(name):
    _, parameters, _ = weights()
    assert torch.autograd.gradcheck(lambda *parts: parts_of(name, True, *parts), parameters)


@pytest.mark.parametrize("name", SPARSE)
def test_gradients_are_those_of_the_matrix(name):
    _, parameters, _ = weights()
    upstream_BMD = torch.randn(BATCH, LEVELS, WIDTH, generator=toys.seeded(4), dtype=torch.float64)
    results = []
    for as_pairs in (True, False):
        parts_BMD = parts_of(name, as_pairs, *parameters)
        results.append([parts_BMD, *torch.autograd.grad((parts_BMD * upstream_BMD).sum(), parameters)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.any() and torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 9, 2**15 - 1, 2**15, 70_000])
def test_grouped_sorts_stably_and_says_where_each_group_starts(groups):
    """Around the largest number of two bytes; the last group is among them."""
    group_N = torch.randint(0, groups, (500,), generator=toys.seeded(0))
    group_N[::50] = groups - 1
    order_N, ends_S = grouped(group_N, groups)
    assert order_N.tolist() == sorted(range(500), key=lambda place: (group_N[place], place))
    assert torch.equal(ends_S.diff(), group_N.bincount(minlength=groups)) and ends_S.dtype == torch.int64


def test_sums_and_products_of_rows():
    rows_RD, left_RD = (torch.randn(LATENTS, WIDTH, generator=toys.seeded(seed)) for seed in (1, 2))
    row_N, left_N = (torch.randint(0, LATENTS, (30,), generator=toys.seeded(seed)) for seed in (3, 4))
    weight_N = torch.randn(30, generator=toys.seeded(5))
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 0.02)):
        found_N = row_products(left_RD.to(dtype), left_N, rows_RD.to(dtype), row_N)
        assert torch.allclose(found_N.float(), (left_RD[left_N] * rows_RD[row_N]).sum(1), atol=2 * tolerance)
        sums_SD = sum_rows(rows_RD.to(dtype), row_N, weight_N, torch.tensor([0, 7, 7, 30]))
        parts = (weight_N[:, None] * rows_RD[row_N]).split([7, 0, 23])
        assert torch.allclose(sums_SD.float(), torch.stack([part.sum(0) for part in parts]), atol=4 * tolerance)
    assert row_products(left_RD, left_N[:0], rows_RD, row_N[:0]).shape == (0,)


def test_under_autocast_rows_are_bfloat16_and_gradients_close_to_float32():
    x_BD, parameters, level_F = weights()
    x_BD, parameters = x_BD.float(), [part.detach().float().requires_grad_() for part in parameters]
    codes = TopK(3)((x_BD @ parameters[0].T + parameters[1]).detach(), as_pairs=True)
    upstream_BMD = torch.randn(BATCH, LEVELS, WIDTH, generator=toys.seeded(4))
    results = []
    for autocast in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            parts_BMD = decode_levels(attach(codes, x_BD, *parameters[:2]), parameters[2], level_F, LEVELS)
        assert parts_BMD.dtype == (torch.bfloat16 if autocast else torch.float32)
        loss = (parts_BMD.float() * upstream_BMD).sum()
        results.append([parts_BMD.detach().float(), *torch.autograd.grad(loss, parameters)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == torch.float32 and 0 < (ours - theirs).norm() < 0.01 * theirs.norm()


def test_sums_do_not_depend_on_the_number_of_threads():
    """Every segment is one thread's, so the order of a sum is fixed."""
    generator = toys.seeded(5)
    x_BD, dec_FD = torch.randn(300, 24, generator=generator), torch.randn(500, 24, generator=generator)
    codes = TopK(16)(x_BD @ dec_FD.T, as_pairs=True)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        parameters = [part.clone().requires_grad_() for part in (dec_FD, torch.zeros(500), dec_FD)]
        parts_BMD = decode_levels(attach(codes, x_BD, *parameters[:2]), parameters[2], torch.arange(500) % 3, 3)
        results.append([parts_BMD, *torch.autograd.grad(parts_BMD.pow(3).sum(), parameters)])
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


# Steps


def trained(name: str, sparse: bool, architecture: str, steps: int = 8) -> TrainState:
    """Some latents long dead, so that the auxiliary term is at work from the first step."""
    config = toys.run_config(name, steps=20, architecture=architecture, aux_weight=0.1)
    state = toys.fresh(replace(config, workload=toys.workload(20, latents=64)))
    state.sae.activation.sparse = sparse
    state.sae.enc_bias_F.data[[3, 8, 9]] = -1.0
    state.importance.silent_tokens_F[[3, 8, 9]] = 10**6
    for acts_BD in toys.activations(steps):
        report = train_step(state, acts_BD)
        assert isinstance(report.codes, Codes) == sparse
    return state


@pytest.mark.parametrize("architecture", SPARSE)
@pytest.mark.parametrize("name", ["topk", "run_3", "run_6"])
def test_a_step_is_that_of_the_dense_path(name, architecture):
    """All parts of the method, to 1e-5 of every gradient's norm; then eight steps and what they leave."""
    sparse, dense = (trained(name, kind, architecture, steps=1) for kind in (True, False))
    for parameter, other in zip(sparse.sae.parameters(), dense.sae.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() <= 1e-5 * other.grad.norm() > 0
        assert parameter.is_contiguous() and parameter.grad.is_contiguous(), "fused Adam would copy it"
    sparse, dense = (trained(name, kind, architecture).state_dict() for kind in (True, False))
    for key, value in dense.items():
        if value.is_floating_point() and not key.startswith("reservoir"):
            assert torch.allclose(sparse[key], value, rtol=1e-3, atol=1e-4), key


def test_the_auxiliary_term_reaches_the_encoder_of_dead_latents():
    state = trained("topk", True, "topk", steps=1)
    before, now = trained("topk", True, "topk", steps=0).sae, state.sae
    assert (state.importance.silent_tokens_F[[3, 8, 9]] >= 10**6).all(), "they did not fire"
    assert (now.enc_FD[[3, 8]] != before.enc_FD[[3, 8]]).all(), "the third has no positive pre-activation"


def test_levels_are_sorted_within_a_token():
    state = trained("run_6", True, "batchtopk", steps=2)
    x_BD = toys.activations(1, seed=7)[0]
    _, codes = state.sae.training_codes(x_BD, 3)
    level_F = latent_levels(ranks(state.config.levels, state.importance.values()), [0.25, 0.5])
    parts_BMD, dense_BMD = (decode_levels(c, state.sae.dec_FD, level_F, 3) for c in (codes, codes.dense()))
    assert torch.allclose(parts_BMD, dense_BMD, atol=1e-5)


@pytest.mark.parametrize("one_dnn", [True, False])
def test_affine_is_a_product_and_a_bias(monkeypatch, one_dnn):
    x_BD, weight_FD, bias_F = (torch.randn(*shape, generator=toys.seeded(1)) for shape in ((9, 32), (17, 32), (17,)))
    assert torch.allclose(affine(x_BD, weight_FD, bias_F), x_BD @ weight_FD.T + bias_F, atol=1e-5)
    monkeypatch.setattr(sparse, "_one_dnn", lambda: one_dnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_BF = affine(x_BD, weight_FD, bias_F)
    exact_BF = x_BD.bfloat16().double() @ weight_FD.bfloat16().double().T + bias_F.bfloat16().double()
    assert found_BF.dtype == torch.bfloat16 and (found_BF - exact_BF).abs().max() < 0.01 * exact_BF.abs().max()
