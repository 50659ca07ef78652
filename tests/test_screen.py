"""fipo.screen against the dense path: nothing that is on is missed, however narrowly, and the values are the same."""

import pytest
import torch
from toys import seeded

from fipo.activations import BatchTopK, JumpReLU, ReLU, TopK
from fipo.sae import SAE
from fipo.screen import Pairs, Screen, _minus_latents, screened

WIDTH, LATENTS, TOKENS = 96, 512, 200


def build(activation, share=0.01, gain=3.0):
    """An SAE whose latents are each on at about a `share` of the tokens."""
    sae = SAE(WIDTH, LATENTS, activation, gain=gain, generator=seeded(1)).eval()
    with torch.no_grad():
        sae.mean_D.normal_(generator=seeded(2))
        sae.scale.fill_(0.7)
        if isinstance(activation, BatchTopK):
            activation.threshold_F.uniform_(0.4, 0.625, generator=seeded(5))
        pre_BF = sae.pre_codes(sae.standardise(tokens(400, 3)))
        sae.enc_bias_F.sub_(pre_BF.quantile(1 - share, dim=0) - 0.4)
    return sae


def tokens(count=TOKENS, seed=4):
    return 2 * torch.randn(count, WIDTH, generator=seeded(seed))


def dense(pairs, tokens):
    assert isinstance(pairs, Pairs)
    return torch.zeros(tokens, LATENTS).index_put((pairs.token_N, pairs.latent_N), pairs.values_N, accumulate=True)


@pytest.mark.parametrize("count", [1, 3, TOKENS])
@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(LATENTS, threshold=0.6), BatchTopK(LATENTS, 8)])
@torch.no_grad()
def test_codes_are_those_of_the_dense_path(activation, count):
    sae = build(activation)
    expected_BF = sae.encode(tokens(count))
    torch.testing.assert_close(dense(Screen(sae)(tokens(count)), count), expected_BF, rtol=1e-5, atol=1e-5)
    assert expected_BF.any() or count < TOKENS


def narrow(margin, spread, offset):
    """x [B, D], and an SAE of which latent f is on, at token f alone of interest, by `margin` of |x| |w|."""
    x_BD = tokens(64, 5)
    x_BD[:, 0] *= spread  # one channel far larger than the others, as language models have
    x_BD[:, 1] = offset
    sae = SAE(WIDTH, 64, ReLU(), gain=3.0, generator=seeded(6))
    with torch.no_grad():
        sae.enc_FD[:, 1] = 1.0
        pre_F = (x_BD.double() @ sae.enc_FD.double().T).diagonal()
        size_F = x_BD.double().norm(dim=1) * sae.enc_FD.double().norm(dim=1)
        sae.enc_bias_F.copy_(margin * size_F - pre_F)
    return x_BD, sae


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("spread", [1.0, 100.0])
@torch.no_grad()
def test_nothing_that_is_narrowly_on_is_missed(spread, offset):
    x_BD, sae = narrow(1e-5, spread, offset)
    latent_N, token_N = Screen(sae)._left(x_BD)
    assert set(range(64)) <= set(token_N[latent_N == token_N].tolist())


@pytest.mark.parametrize("rounded", ["tokens", "weights", "offset"])
@torch.no_grad()
def test_nothing_is_missed_where_the_rounding_is_at_its_worst(rounded):
    """One side exact in bfloat16 and along what the other loses, so that the bound is nearly reached; or both exact,
    and the offset nearly in the middle of two bfloat16."""
    x_BD, sae = tokens(64, 5), SAE(WIDTH, 64, ReLU(), generator=seeded(6))
    lost_BD = x_BD - x_BD.bfloat16().float()
    if rounded == "tokens":
        sae.enc_FD.copy_(lost_BD.sign())
    elif rounded == "weights":
        sae.enc_FD.copy_(x_BD)
        x_BD = lost_BD.sign()
    else:
        x_BD, sae.enc_FD[:] = 1.421875 * torch.eye(WIDTH)[:64], 1.4453125 * torch.eye(WIDTH)[:64]
    pre_F = (x_BD.double() @ sae.enc_FD.double().T).diagonal()
    size_F = x_BD.double().norm(dim=1) * sae.enc_FD.double().norm(dim=1)
    sae.enc_bias_F.copy_(1e-5 * size_F - pre_F)
    latent_N, token_N = Screen(sae)._left(x_BD)
    assert set(range(64)) <= set(token_N[latent_N == token_N].tolist())


@torch.no_grad()
def test_numbers_exact_in_bfloat16_still_have_the_margin_of_sums_in_float32():
    """A sum of D products in float32 is off by up to D 2^-24 of ‖x‖ ‖w‖, in whichever order it is taken."""
    sae = SAE(WIDTH, 64, ReLU(), generator=seeded(6))
    sae.enc_FD.copy_(sae.enc_FD.bfloat16())
    margin_F = -_minus_latents(sae)[:, WIDTH + 1].float()
    assert (margin_F >= WIDTH * 2**-24 * sae.enc_FD.norm(dim=1)).all()


@torch.no_grad()
def test_what_is_clearly_off_is_not_looked_at():
    x_BD, sae = narrow(-0.01, 1.0, 0.0)
    latent_N, token_N = Screen(sae)._left(x_BD)
    assert not (latent_N == token_N).any()


@torch.no_grad()
def test_little_more_is_left_than_is_on():
    sae = build(ReLU())
    left = len(Screen(sae)._left(sae.standardise(tokens()))[0])
    assert (sae.encode(tokens()) > 0).sum() <= left <= 1.3 * (sae.encode(tokens()) > 0).sum()


@torch.no_grad()
def test_no_token_has_no_code():
    assert not any(len(part) for part in Screen(build(ReLU()))(tokens()[:0]))


@torch.no_grad()
def test_a_call_changes_nothing():
    screen, acts_BD = Screen(build(ReLU())), tokens()
    first = screen(acts_BD)
    kept = [part.clone() for part in first]
    screen(tokens(50, 8))
    assert all(torch.equal(one, other) for one, other in zip(first, kept, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(screen(acts_BD), kept, strict=True))
    assert torch.equal(acts_BD, tokens())


@pytest.mark.parametrize(
    ("sae", "capabilities", "share", "expected"),
    [
        (build(ReLU()), {"avx512_bf16": True}, 0.03, Screen),
        (build(ReLU()), {"amx_bf16": True}, 0.01, Screen),
        (build(ReLU()), {"amx_bf16": True}, 0.031, None),
        (build(ReLU()), {"avx512_f": True}, 0.01, None),
        (build(TopK(8)), {"avx512_bf16": True}, 0.01, None),
        (SAE(4, 6, ReLU(), generator=seeded()), {"avx512_bf16": True}, 0.01, None),
    ],
)
def test_only_what_is_quicker_is_screened(monkeypatch, sae, capabilities, share, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    found = screened(sae, share * sae.latents)
    assert isinstance(found, Screen) if expected else found == sae.encode
