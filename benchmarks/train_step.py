"""A training step: against SAELens, dictionary_learning and sparsify, and what it costs as F grows.

    make bench-env    # once: the environment of the rivals
    .venv/bin/python -m benchmarks.train_step --rivals .venv-bench/bin/python --json OUT

FIPO's step has every part of the method on, bfloat16 autocast, and a fiftieth of a refresh of the candidate pairs, as
every 50th step has one. Its two paths: `pairs`, where codes leave the encoder as (token, latent) pairs, and `matrix`,
the dense reference. Every trainer has a process of its own (benchmarks/trainer_process.py), the same Gaussian batches
and the same threads. Each rival first tries the settings that it offers (table `tried`: the quickest of three steps);
the fastest then takes turns with ours. A turn is a second of steps, as in training: their mean, and the median of the
turns, counts. One more goes before them, since a step after a pause is slower.

Ratios of time are theirs / ours, ratios of memory ours / theirs: of the peak of the processes, and of what that is
beyond their imports. `penalty_share`: of a step at F = 16,384 that Ω takes. `growth_vs_gemm`: by how much a step grows
from the smallest F to the largest, over the growth of the encoder's bfloat16 product alone. `step_over_encoder_gemm`:
our step over that product.
"""

import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, as_found, command, interleaved, program, publish
from benchmarks.our_step import Shape, fresh_state, gaussian, occasional
from benchmarks.trainer_process import DEVICE, SETTINGS
from fipo import objective
from fipo.config import LSH, Penalty
from fipo.errors import UserError
from fipo.train import train_step

SHAPES: dict[str, Shape] = {
    "minilm": (384, 3072, 4096, 32),
    "16k": (768, 16_384, 2048, 32),
    "gemma_16k": (2304, 16_384, 2048, 64),
    "gemma_65k": (2304, 65_536, 2048, 64),
}
USUAL = "gemma_16k,gemma_65k" if DEVICE == "cuda" else "minilm,16k"
RIVALS = ("saelens", "dictionary_learning", "sparsify")
GROWTH = (4096, 8192, 16_384, 32_768, 65_536)
TURN = 0.2 if DEVICE == "cuda" else 1.0
"""Seconds of steps in a turn."""
MIB = 2**20

Row = dict[str, Any]


class Trainer:
    """A trainer in a process of its own."""

    def __init__(self, python: str, name: str, architecture: str, setting: str, shape: Shape) -> None:
        self.name, self.setting, self.seconds = name, setting, [0.0]
        self.peak, self.before = 0, 0
        worker = str(Path(__file__).with_name("trainer_process.py"))
        numbers = [str(number) for number in (torch.get_num_threads(), *shape)]
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `end`
        self.process = subprocess.Popen(
            [python, "-P", worker, name, architecture, setting, *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
            env=as_found(),
        )

    def step(self, count: int = 1) -> float:
        """Seconds of a step, the mean of so many; `RuntimeError` with the last line that it wrote where the process
        ends."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(f"{count}\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            self.process.wait()
            self.complaints.seek(0)
            lines = [line for line in self.complaints.read().splitlines() if "Error" in line] or ["it ended"]
            raise RuntimeError(lines[-1][:80]) from error
        self.peak, self.before = answer["peak"], answer["before"]
        return answer["seconds"]

    def measure(self, rounds: int) -> "Trainer":
        """Two steps to warm up, then as many that count."""
        for _ in range(2):
            self.step()
        self.seconds = [self.step() for _ in range(rounds)]
        return self

    def turn(self) -> None:
        """A step after a pause and another, then `TURN` seconds of steps, at least one; their mean is what counts."""
        self.step()
        self.seconds.append(self.step(math.ceil(TURN / self.step())))

    def end(self) -> None:
        """Let the process go."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, with a line unread
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.complaints.close()

    @property
    def row(self) -> Row:
        """What was measured."""
        return {
            "trainer": self.name,
            "setting": self.setting,
            "ms a step": 1000 * statistics.median(self.seconds),
            "peak MiB": self.peak / MIB,
            "beyond imports MiB": (self.peak - self.before) / MIB,
        }


def start(shape: Shape, architecture: str, rivals: str) -> dict[str, list[Trainer]]:
    """The processes of all trainers of one architecture in all their settings: they import at once, then wait."""
    names = ("fipo", *RIVALS) if rivals else ("fipo",)
    return {
        name: [
            Trainer(rivals if name in RIVALS else sys.executable, name, architecture, setting, shape)
            for setting in SETTINGS[name, architecture]
        ]
        for name in names
        if (name, architecture) in SETTINGS
    }


def fastest(trainers: list[Trainer], what: str) -> tuple[Trainer | None, list[Row]]:
    """A rival in its fastest setting, still running, and what its settings took; None where none of them runs.

    Settings try one after the other, so what disturbs one spares the next: the quickest of three steps decides.
    """
    tried, best = [], None
    for trainer in trainers:
        with suppress(RuntimeError):
            trainer.step()
    for trainer in trainers:
        try:
            row = trainer.measure(3).row
            tried.append({"tried": what, **row, "ms a step": 1000 * min(trainer.seconds)})
        except RuntimeError as error:
            tried.append({"tried": what, "trainer": trainer.name, "setting": trainer.setting, "failed": str(error)})
            trainer.end()
            continue
        slower = trainer
        if best is None or min(trainer.seconds) < min(best.seconds):
            slower, best = best, trainer
        if slower is not None:
            slower.end()
    return best, tried


def step_rows(started: dict[str, list[Trainer]], what: str, batch: int, rounds: int) -> tuple[list[Row], list[Row]]:
    """All trainers of one architecture at one shape, and what their settings took."""
    trainers, tried = list(started["fipo"]), []
    for name, settings in started.items():
        if name != "fipo":
            best, rows = fastest(settings, what)
            trainers += [best] if best is not None else []
            tried += rows
    for trainer in trainers:
        trainer.measure(0)
    for _ in range(rounds):
        for trainer in trainers:
            trainer.turn()
    rows = [{"what": what, **trainer.row, "tokens/s": 1000 * batch / trainer.row["ms a step"]} for trainer in trainers]
    for trainer in trainers:
        trainer.end()
    return rows, tried


def compared(rows: list[Row], architecture: str, name: str) -> dict[str, float]:
    """Ours, the first row, against each of the others."""
    ours, found = rows[0], {}
    for row in rows[1:]:
        key = f"{'matrix' if row['trainer'] == 'fipo' else row['trainer']}_{architecture}_{name}"
        found[key] = row["ms a step"] / ours["ms a step"]
        found[f"{key}_memory"] = ours["peak MiB"] / row["peak MiB"]
        found[f"{key}_memory_beyond_imports"] = ours["beyond imports MiB"] / row["beyond imports MiB"]
    return found


def penalty_rows(shape: Shape, rounds: int) -> tuple[list[Row], dict[str, float]]:
    """Share of the step that Ω by LSH pairs takes, beside OrtSAE's chunks and the whole Gram matrix."""
    state, acts = fresh_state("batchtopk", shape, True, DEVICE), gaussian(shape, DEVICE)
    dec_FD, grad_FD = state.sae.dec_FD, torch.zeros_like(state.sae.dec_FD)
    order_F = torch.arange(shape[1], device=DEVICE)

    def ortsae(chunk: int) -> Callable[[], object]:
        return lambda: grad_FD.add_(
            torch.autograd.grad(objective.chunked_orthogonality(dec_FD, order_F, chunk), dec_FD)[0]
        )

    rare = occasional(state, acts[0], rounds)
    seconds = interleaved({"step": lambda: train_step(state, acts[state.step % 4]), "chunks": ortsae(8192)}, rounds)
    gram = interleaved({"gram": ortsae(shape[1])}, 1)
    pairs = f"Ω, LSH pairs, every {Penalty().every} steps, refreshed every {LSH().refresh_every}"
    costs = {
        pairs: (rare["omega"], rare["refresh"]),
        "OrtSAE, chunks of 8,192": (seconds["chunks"], 0.0),
        "OrtSAE's penalty on the whole Gram matrix": (gram["gram"], 0.0),
    }
    what = f"D={shape[0]} F={shape[1]:,} B={shape[2]:,}, {len(state.pairs_P2):,} pairs"
    rows = [
        {
            "penalty": f"{name}; {what}",
            "gradient ms a step": 1000 * own,
            "refresh ms a step": 1000 * refreshed,
            "share of step": (own + refreshed) / (own + refreshed + seconds["step"]),
        }
        for name, (own, refreshed) in costs.items()
    ]
    shares = [row["share of step"] for row in rows]
    return rows, dict(zip(("penalty_share", "ortsae_share", "gram_share"), shares, strict=True))


def growth_rows(
    sizes: tuple[int, ...], rounds: int, width: int = 768, batch: int = 1024, k: int = 32
) -> tuple[list[Row], dict[str, float]]:
    """Our step, with its share of a refresh and of Ω, and the encoder's bfloat16 product alone, as F grows."""
    jobs: dict[str, Callable[[], object]] = {}
    acts, rare = gaussian((width, 0, batch, k), DEVICE), {}
    low_BD = acts[0].bfloat16()
    for latents in sizes:
        state = fresh_state("batchtopk", (width, latents, batch, k), True, DEVICE)
        low_DF = state.sae.enc_FD.detach().bfloat16().T
        rare[latents] = sum(occasional(state, acts[0], rounds).values())
        jobs[f"step {latents}"] = lambda state=state: train_step(state, acts[state.step % 4])
        jobs[f"gemm {latents}"] = lambda low_DF=low_DF: low_BD @ low_DF
    seconds = interleaved(jobs, rounds)
    rows = []
    for latents in sizes:
        step, gemm = seconds[f"step {latents}"] + rare[latents], seconds[f"gemm {latents}"]
        cost = {"step ms": 1000 * step, "gemm ms": 1000 * gemm, "step / gemm": step / gemm}
        rows.append({"growth": f"D={width} B={batch:,} K={k}", "F": latents, **cost})
    growth = {part: rows[-1][f"{part} ms"] / rows[0][f"{part} ms"] for part in ("step", "gemm")}
    ratios = {"growth_of_step": growth["step"], "growth_of_gemm": growth["gemm"]}
    return rows, {**ratios, "growth_vs_gemm": growth["step"] / growth["gemm"]}


def gemm_row(shape: Shape, rounds: int) -> Row:
    """The encoder's product alone, in bfloat16."""
    low_BD, low_DF = (torch.randn(*sizes, device=DEVICE).bfloat16() for sizes in ((shape[2], shape[0]), shape[:2]))
    seconds = interleaved({"gemm": lambda: low_BD @ low_DF}, rounds)
    what = "D={} F={:,} B={:,}".format(*shape)
    return {
        "what": f"encoder's product {what}",
        "trainer": "torch.mm",
        "setting": "bfloat16",
        "ms a step": 1000 * seconds["gemm"],
    }


def main() -> None:
    """Measure and publish."""
    given = arguments(__doc__, rivals="", rounds=5, shapes=USUAL, penalty=1, growth=1)
    if given.rivals:
        program(given.rivals, "--rivals", "give the Python that `make bench-env` builds")
    if unknown := [name for name in filter(None, given.shapes.split(",")) if name not in SHAPES]:
        raise UserError(f"--shapes {unknown[0]} is unknown; expected some of {', '.join(SHAPES)}, by commas")
    rows, tried, ratios = [], [], {}
    wanted = list(itertools.product(filter(None, given.shapes.split(",")), ("topk", "batchtopk")))
    starting = {}
    if DEVICE == "cuda":  # its machine has room for all at once
        starting = {(name, kind): start(SHAPES[name], kind, given.rivals) for name, kind in wanted}
        for trainer in (one for started in starting.values() for trainers in started.values() for one in trainers):
            with suppress(RuntimeError):
                trainer.step(0)  # when all have imported what they need, the clocks may start
    for name, architecture in wanted:
        shape = SHAPES[name]
        if architecture == "topk":
            gemm = gemm_row(shape, given.rounds)
            rows.append(gemm)
        started = starting.get((name, architecture)) or start(shape, architecture, given.rivals)
        what = "{} D={} F={:,} B={:,} K={}".format(architecture, *shape)
        more, settings = step_rows(started, what, shape[2], given.rounds)
        rows, tried, ratios = rows + more, tried + settings, ratios | compared(more, architecture, name)
        ratios[f"step_over_encoder_gemm_{architecture}_{name}"] = more[0]["ms a step"] / gemm["ms a step"]
        publish("train_step", rows + tried, ratios, given.json, so_far=True)
    if given.penalty:
        more, shares = penalty_rows(SHAPES["gemma_16k" if DEVICE == "cuda" else "16k"], given.rounds)
        rows, ratios = rows + more, ratios | shares
        publish("train_step", rows + tried, ratios, given.json, so_far=True)
    if given.growth:
        more, growth = growth_rows(GROWTH, given.rounds)
        rows, ratios = rows + more, ratios | growth
    publish("train_step", rows + tried, ratios, given.json)


if __name__ == "__main__":
    sys.exit(command(main))
