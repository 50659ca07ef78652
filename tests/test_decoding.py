"""fipo.decoding: the sparse path equals the dense one, and both the sums they stand for, in value and gradient."""

import pytest
import torch
import toys

from fipo.decoding import decode, decode_levels
from fipo.sparse import Codes, pairs_of

BATCH, LATENTS, WIDTH, LEVELS = 6, 9, 4, 3


def inputs(share: float = 0.4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sparse codes (one token silent), decoder rows, a level for every latent (level 1 has none)."""
    generator = toys.seeded(seed)
    codes_BF = torch.rand(BATCH, LATENTS, generator=generator, dtype=torch.float64) + 0.1
    codes_BF *= torch.rand(BATCH, LATENTS, generator=generator) < share
    codes_BF[2] = 0
    dec_FD = torch.randn(LATENTS, WIDTH, generator=generator, dtype=torch.float64)
    level_F = 2 * torch.randint(0, 2, (LATENTS,), generator=generator)
    return codes_BF.requires_grad_(), dec_FD.requires_grad_(), level_F


def given(codes_BF: torch.Tensor, sparse: bool) -> Codes | torch.Tensor:
    return pairs_of(codes_BF) if sparse else codes_BF


@pytest.mark.parametrize("sparse", [True, False])
def test_decode_is_the_weighted_sum_of_rows(sparse):
    codes_BF, dec_FD, _ = inputs()
    expected_BD = torch.stack([sum(c * d for c, d in zip(row, dec_FD, strict=True)) for row in codes_BF])
    assert torch.allclose(decode(given(codes_BF, sparse), dec_FD), expected_BD)


@pytest.mark.parametrize("sparse", [True, False])
def test_parts_hold_their_level_s_latents_alone(sparse):
    codes_BF, dec_FD, level_F = inputs()
    parts_BMD = decode_levels(given(codes_BF, sparse), dec_FD, level_F, LEVELS)
    assert parts_BMD.shape == (BATCH, LEVELS, WIDTH)
    for level in range(LEVELS):
        assert torch.allclose(parts_BMD[:, level], (codes_BF * (level_F == level)) @ dec_FD)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_sparse_and_dense_agree_in_value_and_gradient(share):
    codes_BF, dec_FD, level_F = inputs(share)
    upstream_BMD = torch.randn(BATCH, LEVELS, WIDTH, generator=toys.seeded(1), dtype=torch.float64)
    results = []
    for sparse in (True, False):
        parts_BMD = decode_levels(given(codes_BF, sparse), dec_FD, level_F, LEVELS)
        results.append((parts_BMD, *torch.autograd.grad((parts_BMD * upstream_BMD).sum(), (codes_BF, dec_FD))))
    (sparse_BMD, sparse_BF, sparse_FD), (dense_BMD, dense_BF, dense_FD) = results
    assert torch.allclose(sparse_BMD, dense_BMD) and torch.allclose(sparse_FD, dense_FD)
    active_BF = codes_BF > 0
    assert torch.allclose(sparse_BF, dense_BF * active_BF), "a silent code is a constant of the sparse path"


def test_decode_agrees_in_gradient():
    codes_BF, dec_FD, _ = inputs()
    grads = [
        torch.autograd.grad(decode(given(codes_BF, sparse), dec_FD).pow(2).sum(), (codes_BF, dec_FD))
        for sparse in (True, False)
    ]
    assert torch.allclose(grads[0][0], grads[1][0] * (codes_BF > 0)) and torch.allclose(grads[0][1], grads[1][1])


def test_gradcheck_of_the_sparse_path_in_float64():
    codes_BF, dec_FD, level_F = inputs()
    active = codes_BF.detach().nonzero(as_tuple=True)
    values_N = codes_BF.detach()[active].requires_grad_()

    def parts(values_N: torch.Tensor, dec_FD: torch.Tensor) -> torch.Tensor:
        placed_BF = torch.zeros(BATCH, LATENTS, dtype=torch.float64).index_put(active, values_N)
        return decode_levels(pairs_of(placed_BF), dec_FD, level_F, LEVELS)

    assert torch.autograd.gradcheck(parts, (values_N, dec_FD))


@pytest.mark.parametrize("sparse", [True, False])
def test_no_token_and_no_code(sparse):
    dec_FD = torch.randn(LATENTS, WIDTH, generator=toys.seeded())
    assert decode(given(torch.zeros(0, LATENTS), sparse), dec_FD).shape == (0, WIDTH)
    assert torch.equal(decode(given(torch.zeros(2, LATENTS), sparse), dec_FD), torch.zeros(2, WIDTH))
