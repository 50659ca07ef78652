"""Ω on the pairs that LSH finds against Ω on all pairs: how much of its gain is left, and at what cost?

    python -m benchmarks.omega --json OUT.json [--seeds 3] [--latents 4096] [--steps 600] [--wide 32768]

Gain: BatchTopK SAEs of as many latents as the truth has features are trained on the same tokens of a known truth
(`fipo.synthetic`): without Ω; with Ω on LSH's pairs at the default settings, with those sought at every step, and so by
twice as many tables; and with Ω on every latent's dearest pair with a more important one, searched among all pairs at
each step. All are judged by Ω over all pairs and by the mean max cosine; the share is what LSH's pairs took off Ω, of
what all pairs took off. Ratios that end in `_often..` are of the pairs sought at every step.

Cost: seconds a step of both at --wide latents of width 768 (groups of four with cosines near .4, σ at random), a
refresh of the pairs spread over its steps; the share is of a search through all pairs at every step. All pairs need the
whole Gram matrix; it is made without a gradient, some rows at a time, and only the dearest pairs are differentiated:
the cheapest exact form that we know.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import arguments, command, interleaved, publish
from benchmarks.ground_truth import PARTS, config_of, evaluate
from fipo.config import LSH, Importance
from fipo.data.prepare import statistics as mean_and_scale
from fipo.errors import UserError
from fipo.lsh import candidate_pairs
from fipo.metrics import max_cosines
from fipo.objective import orthogonality
from fipo.priority import precedence
from fipo.randomness import generator_for
from fipo.state import TrainState, build_state
from fipo.synthetic import SyntheticModel, Truth, build
from fipo.train import train_step


def how(lsh: LSH) -> str:
    """How pairs are sought, in words."""
    every = "every step" if lsh.refresh_every == 1 else f"every {lsh.refresh_every} steps"
    return f"LSH's pairs, sought {every} by {lsh.tables} tables"


SOUGHT = {"": LSH(), "_often": LSH(refresh_every=1), "_often_by_twice_the_tables": LSH(refresh_every=1, tables=16)}
"""How LSH's pairs are sought, by the ending of their ratios."""
WAYS: dict[str, dict[str, Any]] = {
    "none": {"importance": Importance()},
    **{how(lsh): PARTS | {"lsh": lsh} for lsh in SOUGHT.values()},
    "all pairs": PARTS | {"lsh": LSH(refresh_every=10**9)},
}
"""What each differs in from BatchTopK; the dearest of all pairs are set from outside, step by step."""


@torch.no_grad()
def dearest_pairs(unit_FD: Tensor, sigma_F: Tensor, rows: int = 1024) -> Tensor:
    """Every row's pair [P, 2] with a more important row for which it pays most, ω cos² with ω = σ / (σ + own σ): with
    these alone Ω (`max`) is that of all pairs. Sorted by σ, so that each row meets the more important ones alone."""
    order_F = sigma_F.argsort(descending=True)
    unit_FD, sigma_F, found = unit_FD[order_F], sigma_F[order_F], []
    for start in range(0, len(unit_FD), rows):
        end = min(start + rows, len(unit_FD))
        own_N1 = sigma_F[start:end, None]
        cost_NE = (unit_FD[start:end] @ unit_FD[:end].T).relu_().square_() * precedence(sigma_F[:end], own_N1)
        cost_N, partner_N = cost_NE.masked_fill_(sigma_F[None, :end] <= own_N1, 0.0).max(1)
        found.append(torch.stack([order_F[start:end], order_F[partner_N]], 1)[cost_N > 0])
    return torch.cat(found)


def omega_of_all(dec_FD: Tensor, sigma_F: Tensor) -> float:
    """Ω over all pairs."""
    unit_FD = dec_FD / dec_FD.norm(dim=1, keepdim=True)
    return orthogonality(unit_FD, sigma_F, dearest_pairs(unit_FD, sigma_F)).item()


def trained(truth: SyntheticModel, latents: int, k: int, steps: int, seed: int) -> dict[str, TrainState]:
    """A state of every way, trained in step on the same tokens."""
    configs = {way: config_of(parts, latents, k, steps, 3e-3, seed) for way, parts in WAYS.items()}
    first_BD = truth.sample(20_000, generator_for(seed, "statistics")).acts_BD
    mean_LD, scale_L = mean_and_scale(first_BD[:, None])
    states = {way: build_state(config, 0, mean_LD[0], scale_L[0].item()) for way, config in configs.items()}
    for sample in truth.batches(1024 * steps, 1024, generator_for(seed, "data")):
        for way, state in states.items():
            if way == "all pairs":
                state.pairs_P2 = dearest_pairs(state.sae.dec_FD.detach(), state.importance.values())
            train_step(state, sample.acts_BD)
    return states


def gain_rows(truth: SyntheticModel, given: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row a seed and way, and the share of the gain: its mean and its smallest over the seeds."""
    rows: list[dict[str, Any]] = []
    shares: dict[str, list[float]] = {ending: [] for ending in SOUGHT}
    for seed in range(1, given.seeds + 1):
        left = {}
        for way, state in trained(truth, given.latents, given.k, given.steps, seed).items():
            dec_FD = state.sae.dec_FD.detach()
            left[way] = omega_of_all(dec_FD, state.importance.values())
            found = evaluate(state, truth, 10_000)
            row = {"what": f"F={given.latents:,}, {given.steps} steps", "pairs": way, "seed": seed, "Ω": left[way]}
            row |= {
                "mean max cosine": max_cosines(dec_FD).mean().item(),
                "explained variance": found.explained_variance,
            }
            rows.append(row | {"mcc": found.mcc, "f1": found.f1})
        without, *lsh, exact = left.values()
        for of, omega in zip(shares.values(), lsh, strict=True):
            of.append((without - omega) / (without - exact))
    ratios = {}
    for ending, of in shares.items():
        ratios |= {f"gain_share{ending}": statistics.fmean(of), f"smallest_gain_share{ending}": min(of)}
    return rows, ratios


def cost_rows(latents: int, rounds: int, width: int = 768) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Seconds a step of all, and LSH's shares."""
    generator = torch.Generator().manual_seed(0)
    dec_FD = torch.randn(latents, width, generator=generator)
    dec_FD += 0.8 * torch.randn(latents // 4, width, generator=generator).repeat(4, 1)
    dec_FD = (dec_FD / dec_FD.norm(dim=1, keepdim=True)).requires_grad_()
    sigma_F = torch.rand(latents, generator=generator)
    held: dict[str, Tensor] = {}

    def refresh(lsh: LSH) -> None:
        held[how(lsh)] = candidate_pairs(
            dec_FD.detach(),
            sigma_F,
            tables=lsh.tables,
            bits=lsh.bits_of(latents),
            capacity=lsh.capacity,
            min_cosine=lsh.min_cosine,
            generator=generator,
            partners=lsh.partners,
            autocast=lsh.autocast,
            held_P2=held.get(how(lsh)),
        )

    def search() -> None:
        held["all pairs"] = dearest_pairs(dec_FD.detach(), sigma_F)

    def gradient(way: str) -> object:
        return torch.autograd.grad(orthogonality(dec_FD, sigma_F, held[way]), dec_FD)

    search()
    work: dict[str, Callable[[], object]] = {"search": search, "all pairs": lambda: gradient("all pairs")}
    for lsh in SOUGHT.values():
        refresh(lsh)
        work |= {f"refresh {how(lsh)}": partial(refresh, lsh), how(lsh): partial(gradient, how(lsh))}
    seconds = interleaved(work, rounds)
    exact = seconds["all pairs"] + seconds["search"]
    costs, ratios = {"all pairs, searched every step": exact}, {}
    for ending, lsh in SOUGHT.items():
        costs[how(lsh)] = seconds[how(lsh)] + seconds[f"refresh {how(lsh)}"] / lsh.refresh_every
        ratios[f"cost_share{ending}"] = costs[how(lsh)] / exact
    few, every = len(held[how(SOUGHT[""])]), len(held["all pairs"])
    what = f"cost F={latents:,} D={width}, {few:,} and {every:,} pairs"
    return [{"what": what, "pairs": pairs, "seconds a step": cost} for pairs, cost in costs.items()], ratios


def main() -> None:
    """Measure and publish."""
    given = arguments(__doc__, seeds=3, latents=4096, features=4096, k=12, steps=600, wide=32_768, rounds=3)
    if given.wide % 4:
        raise UserError(f"--wide is {given.wide}; expected a multiple of 4, the size of a group")
    truth = build(Truth(features=given.features), generator_for(0, "truth"))
    rows, gains = gain_rows(truth, given)
    publish("omega", rows, gains, given.json, so_far=True)
    more, costs = cost_rows(given.wide, given.rounds)
    publish("omega", [*rows, *more], gains | costs, given.json)


if __name__ == "__main__":
    sys.exit(command(main))
