"""Codes of which few are on: found by a product in bfloat16, computed in float32.

    on_bf  =  ⟨x_b, w_f⟩ + c_f > 0                                    c = bias - threshold
    s_bf   =  ⟨x'_b, w'_f⟩ + ‖x_b - x'_b‖ ‖w_f‖ + ‖x'_b‖ ‖w_f - w'_f‖ + c_f    x', w': rounded to bfloat16

s is never below ⟨x_b, w_f⟩ + c_f (Cauchy and Schwarz), so only where s is positive can a code be on. Its last three
terms are four more columns of the rounded matrices, rounded up: one product in bfloat16, two to three times as fast as
in float32 where the processor has instructions for it, and its signs are all that is read. What they leave is computed
in float32 pair by pair. The dense path is the oracle (tests/test_screen.py).

Shapes: B tokens, D model width, F latents, E = D + 4 columns, N pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fipo.activations import threshold_of
from fipo.sae import SAE
from fipo.sparse import row_products

MOST = 0.03
"""Share of pairs on from which computing all of them is as quick; the screen leaves up to 1.3 times as many."""
SIGNS = -0x7FFF7FFF7FFF8000
"""The sign bits of four bfloat16 side by side, as one int64."""
UP = 1 + 2**-7
"""Rounded to bfloat16 (by at most 2^-8), a positive number times this is not below the number."""


class Pairs(NamedTuple):
    """The codes [B, F] that are on, and a few that are 0."""

    values_N: Tensor
    token_N: Tensor
    latent_N: Tensor


def screened(sae: SAE, l0: float) -> Callable[[Tensor], Tensor | Pairs]:
    """Model activations [B, D] -> codes of an SAE of this L0: by the screen where that is quicker, else the matrix of
    `sae.encode`. Decided once, so that pooling some texts again gives the same bits."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    usable = sae.enc_FD.device.type == "cpu" and threshold_of(sae.activation) is not None and sae.latents % 4 == 0
    return Screen(sae) if fast and usable and l0 <= MOST * sae.latents else sae.encode


class Screen:
    """The codes of one SAE whose activation is a threshold, on a CPU; its weights must stay as they are."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self._rounded_FE: Tensor | None = None
        self._signs = torch.empty(0, dtype=torch.bfloat16)

    @torch.no_grad()
    def __call__(self, acts_BD: Tensor) -> Pairs:
        """Codes of model activations [B, D]."""
        x_BD, latents = self.sae.standardise(acts_BD), self.sae.latents
        latent_N, token_N = self._left(x_BD)
        values_N = row_products(x_BD, token_N, self.sae.enc_FD, latent_N) + self.sae.enc_bias_F[latent_N]
        on_N = values_N > threshold_of(self.sae.activation).expand(latents)[latent_N]
        return Pairs(torch.where(on_N, values_N, 0), token_N, latent_N)

    def _left(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (rising) and tokens of the pairs that may be on; the signs of four are read together."""
        if self._rounded_FE is None:
            self._rounded_FE = _minus_latents(self.sae)
        cells = self.sae.latents * len(x_BD)
        if len(self._signs) < cells:  # kept, since fresh memory takes as long as the product
            self._signs = torch.empty(cells, dtype=torch.bfloat16)
        signs_C = self._signs[:cells]
        torch.mm(self._rounded_FE, _tokens(x_BD).T, out=signs_C.view(self.sae.latents, len(x_BD)))
        fours = signs_C.view(torch.int64).bitwise_and_(SIGNS)
        four_N = fours.nonzero()[:, 0]
        place_N, member_N = fours[four_N].view(torch.int16).view(-1, 4).nonzero(as_tuple=True)
        cell_N = 4 * four_N[place_N] + member_N
        return cell_N // len(x_BD), cell_N % len(x_BD)


def _tokens(x_BD: Tensor) -> Tensor:
    """x' with its four columns, [B, E]."""
    rounded_BD = x_BD.bfloat16()
    lost_B1, size_B1 = (part_BD.norm(dim=1, keepdim=True) for part_BD in (x_BD - rounded_BD, rounded_BD.float()))
    ones_B1 = torch.ones_like(size_B1)
    return torch.cat([rounded_BD, *(part.bfloat16() for part in (UP * lost_B1, UP * size_B1, ones_B1, ones_B1))], 1)


def _minus_latents(sae: SAE) -> Tensor:
    """-w' with its four columns, [F, E]; negative, since it is easier to look for the sign bit than for its absence.

    `error` bounds what the sums in float32, here and of the exact values, lose, and c in two parts: where s is near 0
    (and only there does it matter) c is no larger than ‖x‖ ‖w‖.
    """
    weights_FD, error = sae.enc_FD, 2**-14 + sae.d_in * 2**-22
    rounded_FD = weights_FD.bfloat16()
    size_F1, lost_F1 = (part_FD.norm(dim=1, keepdim=True) for part_FD in (weights_FD, weights_FD - rounded_FD))
    offset_F1 = (sae.enc_bias_F - threshold_of(sae.activation))[:, None]
    head_F1 = offset_F1.bfloat16()
    columns = UP * size_F1, UP * (lost_F1 + error * size_F1), head_F1, offset_F1 - head_F1
    return -torch.cat([rounded_FD, *(part.bfloat16() for part in columns)], 1)
