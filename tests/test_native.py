"""fipo.native against the torch code that it stands for."""

import pytest
import torch
import toys

pytest.importorskip("numba")

from fipo import native, reconstruction, search, sparse, update  # noqa: E402
from fipo.errors import UserError  # noqa: E402
from fipo.reconstruction import reconstruction_error  # noqa: E402
from fipo.sparse import Codes, attach, pairs  # noqa: E402
from fipo.state import build_state  # noqa: E402

BATCH, WIDTH, LATENTS, LEVELS = 300, 45, 64, 3


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=toys.seeded(seed))


def some_codes() -> Codes:
    """Tokens of 0 to about 12 pairs; every seventh has none, and latent 0 as well."""
    generator = toys.seeded(1)
    keep_BF = torch.rand(BATCH, LATENTS, generator=generator) < 0.1
    keep_BF[::7], keep_BF[:, 0] = False, False
    token_N, latent_N = keep_BF.nonzero(as_tuple=True)
    values_N = torch.rand(len(token_N), generator=generator)
    values_N[::9] = 0
    return pairs(values_N, token_N, latent_N, BATCH, LATENTS)


def loss_and_gradients(
    codes: Codes, hold: float, plain: float, levels: int = LEVELS, factor: float = 1.0, robust: float = 0.0
):
    """L_rec, x - x̂ and the gradients of values, decoder and bias, under autocast."""
    dec_FD = (drawn(LATENTS, WIDTH, seed=2) / WIDTH**0.5).requires_grad_()
    bias_D, values_N = drawn(WIDTH, seed=3).requires_grad_(), codes.values_N.clone().requires_grad_()
    level_F = torch.arange(LATENTS) % levels if levels > 1 else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = codes._replace(values_N=values_N), dec_FD, bias_D, drawn(BATCH, WIDTH, seed=4)
        loss, residual_BD = reconstruction_error(*given, level_F, levels, hold, plain, robust)
    return loss, residual_BD, *torch.autograd.grad(factor * loss, (values_N, dec_FD, bias_D))


@pytest.mark.parametrize(("hold", "plain"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.3, 0.25), (0.0, 1.0)])
@pytest.mark.parametrize("levels", [1, LEVELS])
@pytest.mark.parametrize("robust", [0.0, 1.0])
def test_error_of_pairs_is_that_of_their_parts(monkeypatch, hold, plain, levels, robust):
    codes = some_codes()
    found = loss_and_gradients(codes, hold, plain, levels, 2.0, robust)
    monkeypatch.setattr(reconstruction, "native_for", lambda *_given: None)
    expected = loss_and_gradients(codes, hold, plain, levels, 2.0, robust)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() < 0.01 * other.norm()


def test_error_of_pairs_in_float64():
    """Rows and gradients rounded to bfloat16, sums exact: closer to the truth than one bit of eight."""
    codes = some_codes()
    loss, residual_BD, *_ = loss_and_gradients(codes, 0.5, 0.0)
    dec_FD = (drawn(LATENTS, WIDTH, seed=2) / WIDTH**0.5).bfloat16().double()
    x_BD, total_BD, errors = drawn(BATCH, WIDTH, seed=4).double(), drawn(WIDTH, seed=3).double(), []
    for level in range(LEVELS):
        codes_BF = codes.dense().double() * (torch.arange(LATENTS) % LEVELS == level)
        total_BD = total_BD + codes_BF @ dec_FD
        errors.append((total_BD - x_BD).square().mean())
    assert torch.allclose(residual_BD.double(), x_BD - total_BD, atol=1e-6)
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-6)


def test_threads_do_not_change_a_bit():
    codes, threads, found = some_codes(), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(loss_and_gradients(codes, 0.5, 0.25))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_no_pairs_at_all():
    none = pairs(torch.zeros(0), *torch.zeros(2, 0, dtype=torch.int64), BATCH, LATENTS)
    loss, residual_BD, values_N, dec_FD, _bias_D = loss_and_gradients(none, 0.5, 0.0)
    bias_D, x_BD = drawn(WIDTH, seed=3), drawn(BATCH, WIDTH, seed=4)
    assert torch.allclose(residual_BD, x_BD - bias_D, atol=1e-6) and values_N.shape == (0,)
    assert not dec_FD.any() and loss.item() == pytest.approx((bias_D - x_BD).square().mean().item(), rel=1e-5)


def test_what_is_not_finite_stays_so():
    """Else a step would take it for a good one."""
    for bad in (float("nan"), float("inf")):
        codes = some_codes()
        codes.values_N[3] = bad
        assert not loss_and_gradients(codes, 0.5, 0.0)[0].isfinite()


def test_only_bfloat16_on_a_processor_is_for_it():
    assert sparse.native_for(torch.zeros(1, dtype=torch.bfloat16), torch.bfloat16) is native
    assert sparse.native_for(torch.zeros(1), torch.bfloat16) is None
    assert sparse.native_for(torch.zeros(1, dtype=torch.bfloat16, device="meta"), torch.bfloat16) is None


@pytest.mark.parametrize(("latents", "k"), [(3072, 32), (4096, 3), (1024, 40), (777, 5), (64, 64), (65_536, 2)])
def test_the_largest_of_rows_are_those_that_torch_finds(monkeypatch, latents, k):
    """Of equal ones too, of which bfloat16 has many; rows of more parts than one, through one, two and no tiles."""
    pre_BF = drawn(3 if latents > 5000 else 300, latents, seed=7).bfloat16()
    pre_BF[1] = 0.5
    found_BK = search.largest_of_rows(pre_BF, k)
    monkeypatch.setattr(search, "native_for", lambda *_given: None)
    expected_BK = search.largest_of_rows(pre_BF, k)
    assert found_BK.dtype == torch.int64
    assert torch.equal(found_BK.sort(dim=1).values, expected_BK.sort(dim=1).values)


def test_rows_too_long_for_it_get_their_tiles_from_torch(monkeypatch):
    """Else two places would have one number."""
    pre_BF, lengths, largest = drawn(2, native.LONGEST + 8, seed=7).bfloat16(), [], native.largest
    monkeypatch.setattr(native, "largest", lambda keys_BF, k: lengths.append(keys_BF.shape[1]) or largest(keys_BF, k))
    found_BK = pre_BF.gather(1, search.largest_of_rows(pre_BF, 3))
    assert torch.equal(found_BK.sort(dim=1).values, pre_BF.topk(3).values.flip(1))
    assert lengths == [len(pre_BF[0]) // search.TILE, 3 * search.TILE]


def test_bfloat16_rounds_as_torch_does():
    """To the nearest, of two the even one: through a gradient that is the residual itself."""
    x_BD = torch.cat([drawn(3584, seed=5), 1 + torch.arange(512) * 2.0**-9])[None]  # 4,096: no scale but a power of 2
    starts_S, zeros_D = torch.tensor([0, 0]), torch.zeros(x_BD.shape[1])
    empty_N, rows_FD = torch.zeros(0, dtype=torch.int64), torch.zeros(1, x_BD.shape[1], dtype=torch.bfloat16)
    given = torch.zeros(0), empty_N, starts_S, empty_N, rows_FD, zeros_D, -x_BD
    grad_BMD = native.nested_error(*given, levels=1, stop_gradient=0.0, plain=0.0)[0]
    scale = torch.tensor(2 / x_BD.numel())
    assert torch.equal(grad_BMD[:, 0], (x_BD * scale).bfloat16())


def test_attached_codes_learn_through_it():
    """The gradient of a value reaches the encoder."""
    codes, x_BD = some_codes(), drawn(BATCH, WIDTH, seed=4)
    enc_FD, bias_F = drawn(LATENTS, WIDTH, seed=6).requires_grad_(), torch.zeros(LATENTS, requires_grad=True)
    dec_FD, bias_D = drawn(LATENTS, WIDTH, seed=2), torch.zeros(WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attached = attach(codes, x_BD.bfloat16(), enc_FD, bias_F)
        loss, _ = reconstruction_error(attached, dec_FD, bias_D, x_BD)
    loss.backward()
    assert enc_FD.grad.abs().sum() > 0 and not enc_FD.grad[0].any() and not bias_F.grad[0].any()


@pytest.mark.parametrize("name", ["run_6", "topk", "run_0"])
def test_the_update_is_that_of_torch(monkeypatch, name):
    """Three updates with the same gradients, one of them clipped; then one that is not finite and changes nothing."""
    states = []
    for module in (native, None):
        monkeypatch.setattr(update, "native_for", lambda *_given, module=module: module)
        state = build_state(toys.run_config(name), 0, torch.zeros(toys.WIDTH), 1.0)
        weights, terms = list(state.sae.parameters()), [torch.zeros(())] * 4
        for step, size in enumerate((1e-3, 1e3, 1.0)):
            for place, weight in enumerate(weights):
                weight.grad = size * drawn(*weight.shape, seed=10 * step + place)
            update.update(state.sae, state.optimizer, terms, state.faults, step, 0.01, 1.0)
            assert torch.allclose(state.sae.dec_FD.norm(dim=1), torch.ones(toys.LATENTS))
        before = [weight.detach().clone() for weight in weights]
        weights[0].grad[0, 0] = float("nan")
        with pytest.raises(UserError, match="not finite"):
            update.update(state.sae, state.optimizer, terms, state.faults, step, 0.01, 1.0)
        assert all(torch.equal(new, old) for new, old in zip(weights, before, strict=True))
        states.append([*weights, *(state.optimizer.state[weight]["exp_avg_sq"] for weight in weights)])
        assert {state.optimizer.state[weight]["step"].item() for weight in weights} == {3}
    for ours, theirs in zip(*states, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_update_of_the_last_phase_leaves_the_encoder_alone():
    state = build_state(toys.run_config("topk"), 0, torch.zeros(toys.WIDTH), 1.0)
    encoder_FD, decoder_FD = state.sae.enc_FD.detach().clone(), state.sae.dec_FD.detach().clone()
    state.sae.dec_FD.grad = drawn(*decoder_FD.shape, seed=1)
    update.update(state.sae, state.optimizer, [torch.zeros(())] * 4, state.faults, 0, 0.01, 1.0)
    assert torch.equal(state.sae.enc_FD, encoder_FD) and not torch.equal(state.sae.dec_FD, decoder_FD)
