"""Measures of a dictionary and its codes. Pure: none changes a model, a tracker or a generator.

    FVU = Σ ‖x - x̂‖² / Σ ‖x - mean‖²      fraction of variance unexplained; explained variance is 1 - FVU
    L0  = mean over tokens of the number of active latents
    max cosine of a latent = its largest cosine with another decoder row (1: a duplicate, 0: distinct)

Shapes: B tokens, D model width, F latents, N rows of a chunk.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fipo.errors import UserError
from fipo.sae import SAE

LEAST_VARIANCE = 1e-12
"""Share of the mean square below which a variance is rounding, of numbers that are all the same."""


class Quality(NamedTuple):
    """What held-out text says about an SAE."""

    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Active latents a token."""
    dead_share: float
    """Share of the latents that never fired on these tokens."""
    tokens: int
    """Tokens evaluated."""


@torch.no_grad()
def quality(sae: SAE, batches: Iterable[Tensor]) -> Quality:
    """FVU, L0 and dead latents over batches of model activations [B, D], in evaluation mode and float32.

    Numerators and denominators are summed before dividing; the mean is that of these tokens.
    """
    mode = sae.training
    sae.eval()
    error = active = tokens = 0.0
    sum_D = torch.zeros(sae.d_in, dtype=torch.float64, device=sae.dec_FD.device)
    square = 0.0
    fired_F = torch.zeros(sae.latents, dtype=torch.bool, device=sae.dec_FD.device)
    for acts_BD in batches:
        x_BD = sae.standardise(acts_BD)
        codes_BF = sae.activation(sae.pre_codes(x_BD))
        error += (x_BD - sae.reconstruct(codes_BF)).double().pow(2).sum().item()
        square += x_BD.double().pow(2).sum().item()
        sum_D += x_BD.double().sum(0)
        active += (codes_BF > 0).sum().item()
        fired_F |= (codes_BF > 0).any(0)
        tokens += acts_BD.shape[0]
    sae.train(mode)
    if tokens == 0:
        raise ValueError("quality: no activations were given")
    variance = square - sum_D.pow(2).sum().item() / tokens
    if variance <= LEAST_VARIANCE * square:
        raise UserError(
            f"the {int(tokens)} held-out tokens are all alike, so that there is nothing to explain; hold out more"
        )
    return Quality(error / variance, active / tokens, 1 - fired_F.double().mean().item(), int(tokens))


@torch.no_grad()
def max_cosines(dec_FD: Tensor, rows: int = 4096, chunk: int = 1024) -> Tensor:
    """The largest cosine of a latent with another one, [N]; for at most `rows` latents, evenly spaced, against all."""
    latents = dec_FD.shape[0]
    if latents < 2:
        return torch.zeros(latents, device=dec_FD.device)
    chosen_N = torch.linspace(0, latents - 1, min(rows, latents), device=dec_FD.device).round().long()
    return torch.cat([cos_NF.amax(1) for cos_NF in _with_others(dec_FD, chosen_N, chunk)])


@torch.no_grad()
def nearest(dec_FD: Tensor, latents: Sequence[int]) -> tuple[list[int], list[float]]:
    """Of every one of these latents the other one whose decoder row is most similar, and their cosine (-inf where there
    is no other)."""
    found = [cos_NF.max(1) for cos_NF in _with_others(dec_FD, torch.tensor(latents, device=dec_FD.device))]
    return [n for one in found for n in one.indices.tolist()], [cos for one in found for cos in one.values.tolist()]


def _with_others(dec_FD: Tensor, latents_N: Tensor, chunk: int = 1024) -> Iterator[Tensor]:
    """Cosines of these latents with all, [<= chunk, F] at a time; -inf with themselves."""
    unit_FD = normalize(dec_FD, dim=1)
    for part_N in latents_N.split(chunk):
        cos_NF = unit_FD[part_N] @ unit_FD.T
        cos_NF[torch.arange(part_N.shape[0], device=dec_FD.device), part_N] = -torch.inf
        yield cos_NF
