"""FIPO's training step with every part of the method on, as the benchmarks run it.

Importance, reservoir, LSH, Ω, levels, auxiliary term, bfloat16 autocast. A random dictionary has no similar latents,
and Ω would cost little: here they come in families, with about as many candidate pairs as a trained one. K is that of
the rivals' steps: in a run ours falls to it from twice as many (`fipo.schedules`) and is 1.4 K in the mean. No latent
is dead, so the auxiliary term and revival find nothing to do, as in most steps. Shapes are (D, F, B, K): model width,
latents, tokens a batch, active latents a token.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.common import interleaved
from fipo.config import LSH, Importance, Levels, Optimiser, Penalty, Probing, Reservoir, RunConfig, Text, Workload
from fipo.state import TrainState, build_state
from fipo.train import decoder_penalty, refresh_pairs, train_step

Shape = tuple[int, int, int, int]

FAMILY = 4
"""Latents with cosine 0.5 to one another. Training keeps up to two candidates a latent (6,000 at F = 3,072)."""
MEAN_K = 1.4
"""Mean over a run of the falling k, in units of the k that it falls to."""
NEVER = 100_000
"""Steps between what is not to fall into a timed step."""


def whole_method(
    architecture: str, workload: Workload, *, refresh_every: int, revive_every: int, penalty_every: int
) -> RunConfig:
    """Every part of the method, at the workload's k throughout."""
    return RunConfig(
        run="benchmark",
        workload=workload,
        architecture=architecture,  # type: ignore[arg-type]
        aux_weight=1 / 32,
        importance=Importance(),
        reservoir=Reservoir(revive_every=revive_every),
        lsh=LSH(refresh_every=refresh_every),
        optimiser=Optimiser(k_start=1.0),
        penalty=Penalty(every=penalty_every),
        levels=Levels(),
    )


def fresh_state(architecture: str, shape: Shape, sparse: bool, device: str) -> TrainState:
    """A state at step 1, with candidate pairs, so that no step refreshes them."""
    width, latents, batch, k = shape
    workload = Workload(
        name="benchmark",
        model="none",
        layers=(0,),
        text=Text(source="none", tokens=1, held_out_tokens=2, packed=True, buffer_tokens=batch),
        probing=Probing(datasets=("none",), ks=(1,)),
        latents=latents,
        k=k,
        sparsity_penalty=0.0,
        batch_tokens=batch,
        train_tokens=batch * NEVER,
        dead_tokens=10_000_000,
    )
    config = whole_method(architecture, workload, refresh_every=NEVER, revive_every=NEVER, penalty_every=NEVER)
    state = build_state(config, 0, torch.zeros(width), 1.0, device)
    state.sae.activation.sparse = sparse
    make_families(state)
    train_step(state, gaussian(shape, device)[0])
    return state


@torch.no_grad()
def make_families(state: TrainState) -> None:
    """Give the latents of each family a direction in common, as long as each one's own."""
    dec_FD = state.sae.dec_FD
    common_GD = torch.randn(len(dec_FD) // FAMILY, dec_FD.shape[1], generator=torch.Generator().manual_seed(1))
    common_GD /= common_GD.norm(dim=1, keepdim=True)
    dec_FD += common_GD.to(dec_FD.device).repeat_interleave(FAMILY, 0)
    state.sae.normalise_decoder()
    state.sae.enc_FD.copy_(dec_FD)


def gaussian(shape: Shape, device: str) -> list[Tensor]:
    """Four batches [B, D]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape[2], shape[0], generator=generator).to(device) for _ in range(4)]


def occasional(state: TrainState, acts_BD: Tensor, rounds: int) -> dict[str, float]:
    """Seconds that fall to each step of what a step does not always do: a refresh of the candidate pairs, and Ω with
    its gradient. On a GPU, where Ω is a part of the recording, that is what a step with it takes longer."""
    assert state.config.penalty is not None
    penalty = state.config.penalty

    def refresh() -> None:
        step, state.step = state.step, 0
        refresh_pairs(state)
        state.step = step

    def omega() -> None:
        decoder_penalty(state, penalty, state.pairs_P2).backward()  # onto the gradient of the last step, as in a step

    def step(every: int) -> None:
        state.config = replace(state.config, penalty=replace(penalty, every=every))
        train_step(state, acts_BD)
        state.config = replace(state.config, penalty=penalty)

    if state.graphs is None:
        seconds = interleaved({"refresh": refresh, "omega": omega}, rounds)
    else:
        for _ in range(2):  # the first is no recording
            step(1)
        jobs = {"refresh": refresh, "with": lambda: step(1), "without": lambda: step(NEVER)}
        seconds = interleaved(jobs, rounds)
        seconds["omega"] = max(0.0, seconds["with"] - seconds["without"])
    return {"refresh": seconds["refresh"] / LSH().refresh_every, "omega": seconds["omega"] / Penalty().every}


def stepper(architecture: str, shape: Shape, sparse: bool, device: str) -> Callable[[Tensor], float]:
    """One step a call without what it does not always do; returns the seconds of that which fall to each step."""
    state = fresh_state(architecture, shape, sparse, device)

    @functools.cache
    def share() -> float:
        """Measured at the first step: before it, other trainers may be starting on the same cores."""
        return sum(occasional(state, gaussian(shape, device)[0], 3).values())

    def step(acts_BD: Tensor) -> float:
        train_step(state, acts_BD)
        return share()

    return step
