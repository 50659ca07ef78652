"""The whole gemma-2-2b job in 18 minutes of one card: measured on a GPU, predicted elsewhere.

    python -m benchmarks.eighteen_minutes [--json OUT] [--tiny 1]

The job: three SAEs (layers 5, 12, 19; F = 16,384; K = 64; B = 2,048) on 50 M tokens of the residual stream, which come
from the model as they are needed, then sparse probing of all three (36 classes of 2,500 texts of up to 128 tokens).
Measured: the real architecture with random weights on random tokens, a warm-up, then a slice of every phase, scaled to
the job; training once more as a run does it, which waits for no phase: that is what the minutes count. Predicted: what
every phase does, counted by running a part of it on the CPU (benchmarks/roofline.py), at assumed efficiencies. What is
counted is torch's way, which kernels of a GPU that read less can outrun. Left out of both: reading weights and text,
tokenising, mean and scale of the first pool, checkpoints. `--tiny 1` measures a toy model, on any device: it tries the
code and says nothing of the card.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks import roofline
from benchmarks.common import arguments, command, publish
from benchmarks.gemma_job import (
    GEMMA,
    PHASES,
    TINY,
    TRAINING,
    Job,
    RandomModel,
    feature_maps,
    measured,
    run_config,
    scales,
)
from benchmarks.our_step import make_families
from benchmarks.roofline import Card, Cost, counted
from fipo import sparse
from fipo.config import LSH
from fipo.data.harvest import BATCH_TOKENS_GPU, Chunk
from fipo.pooling import pool
from fipo.randomness import generator_for
from fipo.state import build_state
from fipo.train import train_step

BUDGET = 18 * 60
"""Seconds."""
EPOCHS, DENSITY = 30, 0.1
"""Assumed of the fits: epochs until a probe on everything stops, share of nonzeros in pooled codes."""


def costs(job: Job) -> dict[str, Cost]:
    """What every phase of the job does."""
    workload = job.workload
    layers, width = len(workload.layers), job.model["hidden_size"]
    rows = workload.train_tokens / (workload.context - 1)  # a begin token leads every row, and is not trained on
    texts = job.classes * (workload.probing.train_per_class + workload.probing.test_per_class)
    row = block_cost(job).times(max(workload.layers) + 1)
    # Stacked, cut to content and turned, checked, put into the pool, drawn, moved into holes: read and written each.
    buffered = Cost(moved=12 * layers * width * 2, kernels=40 / workload.batch_tokens)
    found = (
        row.times(rows),
        buffered.times(workload.train_tokens),
        step_cost(job).times(layers * workload.steps),
        row.times(texts),
        pooling_cost(job).times(layers * texts),
        fit_cost(job),
    )
    return dict(zip(PHASES, found, strict=True))


def block_cost(job: Job) -> Cost:
    """One block of the model on one row of text. Kernels are those of a forward pass, shared by all tokens of it."""
    found = []
    for layers in (1, 2):
        sizes = job.model | {"num_hidden_layers": layers, "vocab_size": 16}
        lm = RandomModel(job._replace(model=sizes, workload=replace(job.workload, layers=(layers - 1,))), "cpu")
        ids_BS = torch.full((1, lm.context), 3)
        found.append(counted(lambda lm=lm, ids_BS=ids_BS: lm.activations(ids_BS, torch.ones_like(ids_BS).bool())))
    cost = found[1].plus(found[0], -1)
    return of_a_pass(cost, lm.context)


def of_a_pass(cost: Cost, tokens: int) -> Cost:
    """The cost of so many tokens as a part of a whole pass, whose kernels all its tokens share."""
    return cost._replace(kernels=cost.kernels * tokens / max(BATCH_TOKENS_GPU, tokens))


def step_cost(job: Job) -> Cost:
    """One step of one SAE, between refreshes of the pairs, which one call starts (`fipo.graphs`), and a share of a
    refresh."""
    workload, width = job.workload, job.model["hidden_size"]
    config = run_config(workload)
    state = build_state(config, 0, torch.zeros(width), 1.0)
    make_families(state)
    acts_BD = torch.randn(workload.batch_tokens, width, generator=generator_for(0, "acts"))
    with mock.patch.multiple(sparse, _native=lambda: None, _one_dnn=lambda: False):  # a processor's own: not counted
        first = counted(lambda: train_step(state, acts_BD))
        step = counted(lambda: train_step(state, acts_BD))
    return step._replace(kernels=1).plus(first.plus(step, -1), 1 / LSH().refresh_every)


def pooling_cost(job: Job) -> Cost:
    """Encoding and pooling of one text for one layer: channels, latents, random control. Kernels as of a whole pass."""
    workload, width = job.workload, job.model["hidden_size"]
    state = build_state(run_config(workload), 0, torch.zeros(width), 1.0)
    lm: Any = SimpleNamespace(width=width, device="cpu")
    maps = feature_maps(lm, {workload.layers[0]: state})
    acts_BLD = torch.randn(workload.context, 1, width, generator=generator_for(0, "acts"))
    text_B = torch.zeros(workload.context, dtype=torch.int64)
    cost = counted(lambda: pool([Chunk(acts_BLD, text_B, text_B)], 1, maps, workload.layers[:1]))
    return of_a_pass(cost, workload.context)


def fit_cost(job: Job) -> Cost:
    """The probes, by formula: singular values, and what a probe on everything reads."""
    probing, width, latents = job.workload.probing, job.model["hidden_size"], job.workload.latents
    train, each = probing.train_per_class, probing.train_per_class + probing.test_per_class
    datasets, layers = job.classes / job.slice_classes, len(job.workload.layers)
    texts, rows = job.slice_classes * each, 2 * train
    flop = 6 * job.slice_classes * train * width**2 + 20 * width**3  # thin SVD
    flop += 2 * texts * width**2 + 8 * job.slice_classes * texts * (width + latents)  # components, mean differences
    numbers = rows * (width + DENSITY * latents * 5)  # of a sparse row also places, gathered and scattered
    moved = job.slice_classes * EPOCHS * 2 * 4 * numbers + 2 * 4 * texts * (width + 2 * latents)
    return Cost(host_flop=flop, host_moved=moved).times(datasets * layers)


def table(seconds: dict[str, float], kind: str, found: dict[str, Cost], card: Card) -> list[dict[str, Any]]:
    """One row a phase, and one of training as a whole; `seconds` are those of the whole job."""
    rows = []
    for phase in PHASES:
        cost, took = found[phase], seconds[phase]
        rows.append(
            {
                "phase": phase,
                f"seconds, {kind}": took,
                "of 18 minutes": took / BUDGET,
                "PFLOP": (cost.flop + cost.flop_32 + cost.host_flop) / 1e15,
                "TB": (cost.moved + cost.host_moved) / 1e12,
                "M kernels": cost.kernels / 1e6,
                "roofline seconds": cost.roofline(card),
                "share of roofline": cost.roofline(card) / took,
            }
        )
    if TRAINING in seconds:  # where it was measured
        took = seconds[TRAINING]
        rows.append({"phase": TRAINING, f"seconds, {kind}": took, "of 18 minutes": took / BUDGET})
    return rows


def in_time(job: Job, seconds: dict[str, float]) -> dict[str, float]:
    """Minutes of the job, and the tokens that can be trained on in 18 minutes with the probing in them."""
    training, probing = (sum(seconds[phase] for phase in part) for part in (PHASES[:3], PHASES[3:]))
    training = seconds.get(TRAINING, training)
    share = max(0.0, BUDGET - probing) / training
    tokens = share * job.workload.train_tokens / 1e6
    return {"minutes": (training + probing) / 60, "million_tokens_in_18_minutes": tokens, "share_of_the_plan": share}


def main() -> None:
    """Measure or predict, and publish."""
    given = arguments(__doc__, tiny=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    job, card = TINY if given.tiny else GEMMA, roofline.card_here()
    if given.tiny or device == "cuda":
        kind, settings = "measured", {"kind": "measured", "rooflines are those of": card.name}
        times = scales(job)
        seconds = {phase: times[phase] * value for phase, value in measured(job, device).items()}
        rows = [{"phase": phase, "seconds, measured": took} for phase, took in seconds.items()]
        publish("eighteen_minutes", rows, in_time(job, seconds), given.json, settings, so_far=True)  # counting is slow
        found = costs(job)
    else:
        found = costs(job)
        kind, seconds = "prediction", {phase: cost.predicted(card) for phase, cost in found.items()}
        settings = {"kind": "prediction, not measured", "card": card.name, **assumptions(card)}
    publish("eighteen_minutes", table(seconds, kind, found, card), in_time(job, seconds), given.json, settings)


def assumptions(card: Card) -> dict[str, float]:
    """All that a prediction assumes."""
    names = ("HOST_FLOPS", "HOST_BYTES", "FLOP_EFFICIENCY", "BYTES_EFFICIENCY", "LAUNCH_SECONDS")
    assumed = {"FLOPS": card.flops, "FLOPS_32": card.flops_32, "BYTES": card.bytes}
    return assumed | {name: getattr(roofline, name) for name in names} | {"epochs": EPOCHS, "density": DENSITY}


if __name__ == "__main__":
    sys.exit(command(main))
