"""Toy configs and planted activations, shared by the tests: seconds on one core, and no chance without a generator."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fipo.config import LSH, Importance, Levels, Optimiser, Penalty, Probing, Reservoir, RunConfig, Text, Workload
from fipo.data.harvest import Chunk
from fipo.state import TrainState, build_state

WIDTH, LATENTS, BATCH = 8, 16, 16


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of the test's own."""
    return torch.Generator().manual_seed(seed)


def workload(steps: int = 12, **changes: Any) -> Workload:
    """A workload of `steps` steps of 16 tokens for 16 latents of width 8."""
    toy = Workload(
        name="toy",
        model="none",
        layers=(0,),
        text=Text(source="none", tokens=1000, held_out_tokens=100, packed=True, buffer_tokens=100),
        probing=Probing(datasets=("none",), ks=(1, 2)),
        latents=LATENTS,
        k=3,
        sparsity_penalty=0.01,
        learning_rate=0.01,
        batch_tokens=BATCH,
        train_tokens=BATCH * steps,
        dead_tokens=2 * BATCH,
    )
    return replace(toy, **changes)


def run_config(name: str, steps: int = 12, **changes: Any) -> RunConfig:
    """The parts of experiments/run_0, run_3 and run_6 at toy size, and jumprelu."""
    trackers = {
        "importance": Importance(decay=0.9),
        "reservoir": Reservoir(slots=8, half_life_steps=5.0, revive_every=3),
        "lsh": LSH(tables=4, bits=2, capacity=8, min_cosine=0.0, refresh_every=5),
        "penalty": Penalty(weight=0.3, every=1),
    }
    parts: dict[str, dict[str, Any]] = {
        "run_0": {},
        "run_3": trackers,
        "run_6": trackers
        | {
            "architecture": "batchtopk",
            "aux_weight": 0.03,
            "levels": Levels(shares=(0.25, 0.5, 1.0), short=(0.0, 1.0)),
        },
        "jumprelu": {"architecture": "jumprelu"},
        "topk": {"architecture": "topk"},
    }
    given = {"run": name, "workload": workload(steps), "optimiser": Optimiser(autocast=False)}
    return RunConfig(**(given | parts[name] | changes))


def fresh(config: RunConfig, width: int = WIDTH) -> TrainState:
    """A new training state for standardised activations."""
    return build_state(config, 0, torch.zeros(width), 1.0)


def after(chunks: Iterable[Chunk], skip: int) -> Iterator[Chunk]:
    """The chunks without their first tokens, as a harvest that goes on gives them."""
    for chunk in chunks:
        left = min(skip, len(chunk.text_N))
        skip -= left
        if left < len(chunk.text_N):
            yield Chunk(*(part[left:] for part in chunk))


def activations(batches: int, seed: int = 1, batch: int = BATCH, width: int = WIDTH) -> list[Tensor]:
    """Gaussian batches [B, D]."""
    generator = seeded(seed)
    return [torch.randn(batch, width, generator=generator) for _ in range(batches)]


def planted(
    batches: int, *, seed: int = 2, features: int = 24, width: int = 16, batch: int = 64, active: float = 0.08
) -> list[Tensor]:
    """Sparse non-negative combinations of random unit directions, of mean squared norm about D."""
    generator = seeded(seed)
    truth_GD = torch.randn(features, width, generator=generator)
    truth_GD /= truth_GD.norm(dim=1, keepdim=True)
    scale = (width / (features * active * 7 / 3)) ** 0.5
    result = []
    for _ in range(batches):
        on_BG = torch.rand(batch, features, generator=generator) < active
        size_BG = 1 + torch.rand(batch, features, generator=generator)
        result.append(scale * (on_BG * size_BG) @ truth_GD)
    return result
