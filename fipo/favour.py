"""How much a latent's codes count where codes vie for one budget: by its importance.

    favour_F = (σ_F / σ̄)^p · (1 + σ_F / σ̄)^q        σ̄ = mean σ;  the codes kept are the k·B largest a_F · favour_F

A code's value alone does not tell whether its feature is present. Where the budget is short, latents of little
importance would hardly ever be chosen, and not learn: p < 0, as in a competition with a conscience (DeSieno 1988).
Where it is ample, the last codes kept are mostly false positives, fewer of them of important (frequent, strong)
latents, as the prior odds of a feature shift the threshold of a detector: q > 0 sets the few important latents apart
from all others, and hardly those from one another. Codes keep their values. Shapes: F latents.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 1e-3
"""σ over its mean at which favours end: a latent that never fired is neither out of reach nor of infinite favour."""


def favours(powers: Sequence[float], sigma_F: Tensor, way: float | Tensor, spare: float | Tensor) -> Tensor:
    """[F]; as `way` goes from 0 to 1, p goes from the first of the powers to the second, where the budget is short
    (`spare` 0), or to 0, and q from 0 to the third, where it is not (`spare` 1)."""
    first, short, ample = powers
    mean = sigma_F.mean().clamp_min(torch.finfo(sigma_F.dtype).tiny)
    relative_F = (sigma_F / mean).clamp_min(LEAST)
    rare, important = first + way * ((1 - spare) * short - first), way * spare * ample
    return relative_F.pow(rare) * (1 + relative_F).pow(important)
