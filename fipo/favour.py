"""How much a latent's codes count where codes vie for one budget: a power of its importance.

    favour_F = (σ_F / mean σ)^p,      the codes kept are the k·B largest a_F · favour_F

The value of a code tells less than all about whether its feature is there. Where the budget is spare, the last codes
kept are false positives, and of an important (frequent, strong) latent fewer are: p > 0, as the prior odds of a feature
shift the threshold of a detector. Where it is short, latents of little importance would hardly ever be chosen, and not
learn: p < 0, as in a competition with a conscience (DeSieno 1988). Values of codes are as they were. Shapes: F latents.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 1e-3
"""σ over its mean at which favours end: a latent that never fired is neither out of reach nor of infinite favour."""


def favours(powers: Sequence[float], sigma_F: Tensor, way: float | Tensor, spare: float | Tensor) -> Tensor:
    """[F]; the power goes from the first one to where the budget is as `way` goes from 0 to 1: to the second at `spare`
    0, where it is short, to the third at 1."""
    first, short, ample = powers
    power = first + way * (short + spare * (ample - short) - first)
    mean = sigma_F.mean().clamp_min(torch.finfo(sigma_F.dtype).tiny)
    return (sigma_F / mean).clamp_min(LEAST).pow(power)
