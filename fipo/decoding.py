"""From codes to reconstructions, level by level; dense or sparse.

    part_m = Σ_{F in level m} a_F dec_F        the full reconstruction is bias + Σ_m part_m

The dense path is a matrix product; the sparse one gathers the decoder rows of the active latents only, a share L0/F of
the work, and serves all levels at once. Both give the same numbers and gradients up to rounding; the dense one is the
other's oracle. Shapes: B tokens, D model width, F latents, M levels, N active codes of the batch.
"""

import torch
from torch import Tensor
from torch.nn import functional


def decode(codes_BF: Tensor, dec_FD: Tensor, *, sparse: bool) -> Tensor:
    """Σ_F a_F dec_F, [B, D]."""
    if not sparse:
        return codes_BF @ dec_FD
    return _gather_levels(codes_BF, dec_FD, None, 1)[:, 0]


def decode_levels(codes_BF: Tensor, dec_FD: Tensor, level_F: Tensor, levels: int, *, sparse: bool) -> Tensor:
    """The parts of M levels, [B, M, D]; `level_F` is every latent's level, from 0."""
    if sparse:
        return _gather_levels(codes_BF, dec_FD, level_F, levels)
    parts = []
    for level in range(levels):
        members = (level_F == level).nonzero().squeeze(1)
        parts.append(codes_BF[:, members] @ dec_FD[members])
    return torch.stack(parts, dim=1)


def _gather_levels(codes_BF: Tensor, dec_FD: Tensor, level_F: Tensor | None, levels: int) -> Tensor:
    """One bag of weighted rows a (token, level)."""
    batch = codes_BF.shape[0]
    token_N, latent_N = codes_BF.detach().nonzero(as_tuple=True)
    values_N = codes_BF[token_N, latent_N].to(dec_FD.dtype)
    bag_N = token_N
    if level_F is not None:
        bag_N, order_N = (token_N * levels + level_F[latent_N]).sort(stable=True)
        latent_N, values_N = latent_N[order_N], values_N[order_N]
    starts = torch.searchsorted(bag_N, torch.arange(batch * levels, device=bag_N.device))
    bags = functional.embedding_bag(latent_N, dec_FD, starts, mode="sum", per_sample_weights=values_N)
    return bags.unflatten(0, (batch, levels))
