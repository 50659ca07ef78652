"""Which level of the nested reconstruction a latent is in (METHOD 4b): by its rank in importance, or by its index.

Levels order what a cut separates, so the cuts are drawn at every step: beyond the smallest first level, any two latents
are in different levels now and then. Small levels take more codes than a short budget has, hence they are large where
it is short. Nearest prior art: Nabeshima 2024 ("Matryoshka Sparse Autoencoders") draws prefixes too, of latents sorted
by an EMA of their squared norms. Shapes: F latents, M levels.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fipo.method import Levels


def ranks(levels: Levels, sigma_F: Tensor) -> Tensor:
    """Place of every latent in the order, [F] from 0: its index, or how many have a larger σ. Nothing is permuted."""
    rank_F = torch.arange(len(sigma_F), device=sigma_F.device)
    if levels.order == "importance":
        rank_F[sigma_F.argsort(descending=True, stable=True)] = rank_F.clone()
    return rank_F


def spare_share(levels: Levels, shortage: Tensor) -> Tensor:
    """How far the budget is not short, from 0 to 1, 0-d, at this `Activation.shortage`."""
    first, last = levels.short
    return ((last - shortage) / (last - first)).clamp(0, 1)


def cuts(levels: Levels, way: float | Tensor, generator: torch.Generator) -> list[float | Tensor]:
    """Shares of the dictionary in the first 1 .. M - 1 levels at one step, rising, each 0-d.

    A cut lies between its own share and the next one, evenly in the logarithm, all by one draw, to a power that goes
    from `short_power` to 1 as `way` goes from 0 to 1.
    """
    power = 1 - (1 - levels.short_power) * (1 - way)
    drawn = torch.rand((), generator=generator, device=generator.device) if levels.drawn else 0.0
    return [(share * (following / share) ** drawn) ** power for share, following in pairwise(levels.shares)]


def latent_levels(rank_F: Tensor, found: list[float | Tensor]) -> Tensor:
    """Level of every latent, [F] from 0, by the `cuts` found. The first has one latent at least."""
    return sum((rank_F >= len(rank_F) * cut for cut in found), torch.zeros_like(rank_F))


def nested(
    levels: Levels,
    sigma_F: Tensor,
    shortage: Tensor,
    way: float | Tensor,
    hold: float | Tensor,
    generator: torch.Generator,
) -> dict[str, Any]:
    """What `fipo.reconstruction` takes of one step's levels. `way`: from `short_power` to 1, and `hold`: the strength s
    of the stop-gradient; both in force as far as the budget is not short."""
    spare = spare_share(levels, shortage)
    level_F = latent_levels(ranks(levels, sigma_F), cuts(levels, way * spare, generator))
    settings = {"stop_gradient": hold * spare, "plain": levels.plain, "robust": levels.robust}
    return {"level_F": level_F, "levels": len(levels.shares), **settings}
