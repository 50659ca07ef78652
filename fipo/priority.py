"""Of two latents the less important one yields: which that is, and how firmly the other holds its direction.

    ω_ij = σ_i / (σ_i + σ_j)      free of units, and of the size of the dictionary

Used by Ω, which makes the less important of a pair pay (fipo.objective), and by the search for its pairs (fipo.lsh).
Shapes: F latents, P pairs.
"""

import torch
from torch import Tensor


def by_priority(sigma_F: Tensor, pairs_P2: Tensor) -> tuple[Tensor, Tensor]:
    """The more and the less important latent of every pair; of equal ones the first is the more important."""
    first_P, second_P = pairs_P2.unbind(1)
    swap_P = sigma_F[second_P] > sigma_F[first_P]
    return torch.where(swap_P, second_P, first_P), torch.where(swap_P, first_P, second_P)


def precedence(own: Tensor, other: Tensor) -> Tensor:
    """ω of latents with σ `own` against latents with σ `other`; 1/2 where both are 0."""
    tiny = torch.finfo(own.dtype).tiny
    return (own + tiny) / (own + other + 2 * tiny)
