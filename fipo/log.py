"""`training_log.jsonl`: one line a layer every few steps. Reading a state never changes it.

A line is on the disk before the checkpoint of its step is; where a run goes on, what was logged after that is dropped.
"""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch

from fipo.errors import UserError
from fipo.files import parse_json, write_text
from fipo.metrics import max_cosines
from fipo.schedules import learning_rate
from fipo.state import TrainState
from fipo.train import StepReport

SIGMA_QUANTILES = (0.1, 0.5, 0.9, 0.99)
HISTOGRAM_BINS = 50
COSINE_ROWS = 1024
"""Latents, evenly spaced, whose largest cosine with any other is logged."""


def log_line(state: TrainState, step: StepReport, layer: int, tokens_per_second: float) -> dict[str, Any]:
    """All loss terms, L0, FVU, dead latents, σ quantiles, cosines and candidate pairs after a step."""
    workload = state.config.workload
    cosines_N = max_cosines(state.sae.dec_FD, rows=COSINE_ROWS).float()
    quantiles = torch.tensor(SIGMA_QUANTILES, device=cosines_N.device)
    return {
        "step": state.step,
        "tokens": state.step * workload.batch_tokens,
        "layer": layer,
        "loss": step.terms.total.item(),
        **{name: term.item() for name, term in step.terms._asdict().items()},
        "fvu": step.fvu,
        "l0": step.l0,
        "dead_share": state.importance.dead(workload.dead_tokens).double().mean().item(),
        "sigma_quantiles": state.importance.values().quantile(quantiles).tolist(),
        "mean_max_cosine": cosines_N.mean().item(),
        "max_cosine_histogram": torch.histc(cosines_N.clamp(0, 1), HISTOGRAM_BINS, min=0, max=1).int().tolist(),
        "candidate_pairs": state.pairs_P2.shape[0],
        "learning_rate": learning_rate(state.config, state.step - 1),
        "tokens_per_second": tokens_per_second,
    }


def append_log(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines and have them on the disk."""
    try:
        with open(path, "a", encoding="utf-8") as log:
            log.write("".join(json.dumps(line) + "\n" for line in lines))
            log.flush()
            os.fsync(log.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space, then give the same command") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines up to the first that is not whole: a run killed while writing may have left half a one."""
    return [json.loads(line) for line in _whole_lines(path)]


def trim_log(path: Path, step: int) -> int:
    """Drop what was logged after `step`, where the run goes on from, so that no line is doubled; returns how many
    lines are left."""
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    if path.exists():
        write_text(path, "".join(kept))
    return len(kept)


def _whole_lines(path: Path) -> list[str]:
    try:
        lines = path.read_bytes().decode("utf-8", "replace").split("\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return [line + "\n" for line in itertools.takewhile(_is_whole, lines[:-1])]


def _is_whole(line: str) -> bool:
    """Does it say all that a line says?"""
    try:
        value = parse_json(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("step"), int) and isinstance(value.get("layer"), int)
