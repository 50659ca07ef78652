"""A training step: pairs against matrices, against SAELens, and what the penalty adds to it.

    python -m benchmarks.train_step [--saelens PYTHON] [--json OUT]

FIPO's step has every part of the method on (importance, reservoir, LSH, Ω, levels, auxiliary term), bfloat16 autocast,
Gaussian batches. Its two paths: `pairs`, where codes leave the encoder as (token, latent) pairs, and `matrix`, the
dense reference. `--saelens` names the Python of an environment with sae-lens; its trainer then takes turns with ours.
Times are those of a step between refreshes of the candidate pairs; a refresh, every n steps, is in the table of
penalties, spread over its n steps.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import arguments, interleaved, publish
from fipo import objective
from fipo.config import LSH, Importance, Levels, Penalty, Probing, Reservoir, RunConfig, Text, Workload
from fipo.train import TrainState, build_state, decoder_penalty, refresh_pairs, train_step

SHAPES = {"minilm": (384, 3072, 4096, 32), "16k": (768, 16_384, 2048, 32)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fresh_state(architecture: str, shape: tuple[int, int, int, int], sparse: bool) -> TrainState:
    """A state with every part of the method on, at step 1, so that no timed step refreshes the pairs."""
    width, latents, batch, k = shape
    workload = Workload(
        name="benchmark",
        model="none",
        layers=(0,),
        text=Text(source="none", tokens=1, held_out_tokens=1, packed=True),
        probing=Probing(datasets=("none",)),
        latents=latents,
        k=k,
        sparsity_penalty=0.0,
        batch_tokens=batch,
        train_tokens=batch * 100_000,
        dead_tokens=10_000_000,
    )
    config = RunConfig(
        run="benchmark",
        workload=workload,
        architecture=architecture,  # type: ignore[arg-type]
        aux_weight=1 / 32,
        importance=Importance(),
        reservoir=Reservoir(revive_every=100_000),
        lsh=LSH(bits=max(5, (latents // 128).bit_length() - 1), refresh_every=100_000),
        penalty=Penalty(),
        levels=Levels(),
    )
    state = build_state(config, 0, torch.zeros(width), 1.0, DEVICE)
    state.sae.activation.sparse = sparse
    train_step(state, batches(shape)[0])
    return state


def batches(shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Four Gaussian batches."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape[2], shape[0], generator=generator).to(DEVICE) for _ in range(4)]


def stepper(architecture: str, shape: tuple[int, int, int, int], sparse: bool) -> Callable[[], object]:
    """One step a call."""
    state, acts = fresh_state(architecture, shape, sparse), batches(shape)
    return lambda: train_step(state, acts[state.step % 4])


def saelens_stepper(python: str, architecture: str, shape: tuple[int, int, int, int]) -> Callable[[], object]:
    """One step a call, in a process of its own environment."""
    worker = Path(__file__).with_name("saelens_step.py")
    process = subprocess.Popen(
        [python, str(worker), architecture, *map(str, shape)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    asked, answers = process.stdin, process.stdout

    def step() -> None:
        asked.write("\n")
        asked.flush()
        assert answers.readline() == "done\n", "the rival's process ended"

    return step


def step_row(name: str, architecture: str, saelens: str, rounds: int) -> dict[str, Any]:
    """One architecture at one shape."""
    shape = SHAPES[name]
    width, latents, batch, k = shape
    jobs = {"pairs": stepper(architecture, shape, True), "matrix": stepper(architecture, shape, False)}
    if saelens:
        jobs["saelens"] = saelens_stepper(saelens, architecture, shape)
    seconds = interleaved(jobs, rounds)
    tokens = {f"{path} tokens/s": batch / value for path, value in seconds.items()}
    times = {f"{path} / pairs": value / seconds["pairs"] for path, value in seconds.items() if path != "pairs"}
    return {"what": f"{architecture} D={width} F={latents:,} B={batch:,} K={k}", **tokens, **times}


def penalty_rows(rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Share of the step at F = 16,384 that Ω by LSH pairs takes, beside OrtSAE's chunks and the whole Gram matrix."""
    shape = SHAPES["16k"]
    state, acts = fresh_state("batchtopk", shape, True), batches(shape)
    dec_FD, refresh_every = state.sae.dec_FD, LSH().refresh_every
    order_F = torch.arange(shape[1], device=DEVICE)

    def refresh() -> None:
        step, state.step = state.step, 0
        refresh_pairs(state)
        state.step = step

    def gradient(penalty: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(penalty(), dec_FD)

    refresh()
    assert state.config.penalty is not None
    seconds = interleaved(
        {
            "step": lambda: train_step(state, acts[state.step % 4]),
            "pairs": gradient(lambda: decoder_penalty(state, state.config.penalty)),  # type: ignore[arg-type]
            "refresh": refresh,
            "chunks": gradient(lambda: objective.chunked_orthogonality(dec_FD, order_F, 8192)),
        },
        rounds,
    )
    gram = interleaved({"gram": gradient(lambda: objective.chunked_orthogonality(dec_FD, order_F, shape[1]))}, 1)
    plain = seconds["step"] - seconds["pairs"]
    costs = {
        f"Ω, LSH pairs, refreshed every {refresh_every} steps": seconds["pairs"] + seconds["refresh"] / refresh_every,
        "OrtSAE, chunks of 8,192": seconds["chunks"],
        "OrtSAE's penalty on the whole Gram matrix": gram["gram"],
    }
    what = f"D={shape[0]} F={shape[1]:,} B={shape[2]:,}, {len(state.pairs_P2):,} pairs"
    rows = [
        {"what": f"penalty {what}: {name}", "seconds": cost, "share of step": cost / (cost + plain)}
        for name, cost in costs.items()
    ]
    shares = [row["share of step"] for row in rows]
    return rows, dict(zip(("penalty_share", "ortsae_share", "gram_share"), shares, strict=True))


def main() -> None:
    """Measure and publish."""
    given = arguments(__doc__, saelens="", rounds=5, shapes="minilm,16k", penalty=1)
    rows, ratios = [], {}
    for name in given.shapes.split(","):
        for architecture in ("topk", "batchtopk"):
            row = step_row(name, architecture, given.saelens, given.rounds)
            rows.append(row)
            shown = {key.removesuffix(" / pairs"): value for key, value in row.items() if key.endswith(" / pairs")}
            ratios |= {f"{rival}_{architecture}_{name}": value for rival, value in shown.items()}
    if given.penalty:
        more, shares = penalty_rows(given.rounds)
        rows, ratios = rows + more, ratios | shares
    publish("train_step", rows, ratios, given.json)


if __name__ == "__main__":
    main()
