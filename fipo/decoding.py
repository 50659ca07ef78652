"""From codes to reconstructions, level by level; dense or sparse.

    part_m = Σ_{F in level m} a_F dec_F        the full reconstruction is bias + Σ_m part_m

Codes as a matrix are multiplied, codes as pairs (fipo.sparse) gather the decoder rows of the active latents only, a
share L0/F of the work, all levels at once. Both give the same numbers and gradients up to rounding; the dense path is
the other's oracle. Shapes: B tokens, D model width, F latents, M levels.
"""

import torch
from torch import Tensor

from fipo.sparse import Codes, decode_pairs


def decode(codes: Codes | Tensor, dec_FD: Tensor) -> Tensor:
    """Σ_F a_F dec_F, [B, D]."""
    if isinstance(codes, Codes):
        return decode_pairs(codes, dec_FD, None, 1)[:, 0]
    return codes @ dec_FD


def decode_levels(codes: Codes | Tensor, dec_FD: Tensor, level_F: Tensor, levels: int) -> Tensor:
    """The parts of M levels, [B, M, D]; `level_F` is every latent's level, from 0."""
    if isinstance(codes, Codes):
        return decode_pairs(codes, dec_FD, level_F, levels)
    parts = [codes @ (dec_FD * (level_F == level)[:, None]) for level in range(levels)]  # of one shape at every step
    return torch.stack(parts, dim=1)
