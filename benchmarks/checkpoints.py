"""What checkpoints cost: seconds spent in writing them against seconds of training, at the default settings.

    python -m benchmarks.checkpoints [--json OUT] [--steps 410]

The training loop itself, at the shapes of the default workload (three layers of width 384, 3,072 latents, 1,024 tokens
a step), on random activations in place of a language model's. `size_mb`: of one checkpoint.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import arguments, command, publish
from fipo import checkpoint, loop, runs
from fipo.signals import StopSignals

WIDTH = 384


class RandomSource:
    """Gaussian activations [N, L, D], read over and over."""

    key = "random"

    def __init__(self, tokens: int, layers: int) -> None:
        self.acts_NLD = torch.randn(tokens, layers, WIDTH, generator=torch.Generator().manual_seed(0))
        self.position = 0

    def take(self, count: int) -> Tensor:
        """The next rows; a call ends at the end of an epoch."""
        start = self.position % len(self.acts_NLD)
        acts_NLD = self.acts_NLD[start : start + count]
        self.position += len(acts_NLD)
        return acts_NLD

    def seek(self, position: int) -> None:
        """Go on from there."""
        self.position = position

    def recall(self, places_N: Tensor) -> Tensor:
        """Rows again."""
        return self.acts_NLD[places_N % len(self.acts_NLD)]


def row(run: str, steps: int) -> dict[str, object]:
    """One run of so many steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / run
        config = runs.resolve(folder, Path(__file__).parent.parent / "experiments")
        workload = config.workload
        config = replace(config, workload=replace(workload, train_tokens=steps * workload.batch_tokens))
        writes, sizes = [], []
        write = checkpoint.save_checkpoint

        def timed(place: Path, step: int, *given: object) -> None:
            started = time.perf_counter()
            write(place, step, *given)  # type: ignore[arg-type]
            writes.append(time.perf_counter() - started)
            sizes.append((place / f"step_{step}" / checkpoint.STATE).stat().st_size)

        checkpoint.save_checkpoint = timed
        folder.mkdir()
        source = RandomSource(workload.text.buffer_tokens + 4096, len(workload.layers))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        started = time.perf_counter()
        with StopSignals() as stop:
            loop.train_all(config, source, folder, device, stop)
        seconds = time.perf_counter() - started
        checkpoint.save_checkpoint = write
    return {
        "run": run,
        "steps": steps,
        "every": config.checkpoint_every,
        "seconds": seconds,
        "checkpoints": len(writes),
        "seconds_writing": sum(writes),
        "size_mb": sizes[0] / 2**20,
        "share": sum(writes) / seconds,
    }


def main() -> None:
    """Measure and publish."""
    given = arguments(__doc__, steps=410)
    rows = [row(run, given.steps) for run in ("run_3", "run_6")]
    publish("checkpoints", rows, {"largest_share": max(float(str(one["share"])) for one in rows)}, given.json)


if __name__ == "__main__":
    sys.exit(command(main))
