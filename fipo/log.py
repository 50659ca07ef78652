"""`training_log.jsonl`: one line a layer every few steps. Reading a state never changes it."""

import json
from pathlib import Path
from typing import Any

import torch

from fipo.errors import UserError
from fipo.files import write_text
from fipo.metrics import max_cosines
from fipo.train import StepReport, TrainState, learning_rate

SIGMA_QUANTILES = (0.1, 0.5, 0.9, 0.99)
HISTOGRAM_BINS = 50


def log_line(state: TrainState, step: StepReport, layer: int, tokens_per_second: float) -> dict[str, Any]:
    """All loss terms, L0, FVU, dead latents, σ quantiles, cosines and candidate pairs after a step."""
    workload = state.config.workload
    cosines_F = max_cosines(state.sae.dec_FD).float()
    quantiles = torch.tensor(SIGMA_QUANTILES, device=cosines_F.device)
    return {
        "step": state.step,
        "tokens": state.step * workload.batch_tokens,
        "layer": layer,
        "loss": step.terms.total.item(),
        **{name: term.item() for name, term in step.terms._asdict().items()},
        "fvu": step.fvu,
        "l0": step.l0,
        "dead_share": (state.importance.silent_tokens_F >= workload.dead_tokens).double().mean().item(),
        "sigma_quantiles": state.importance.values().quantile(quantiles).tolist(),
        "mean_max_cosine": cosines_F.mean().item(),
        "max_cosine_histogram": torch.histc(cosines_F.clamp(0, 1), HISTOGRAM_BINS, min=0, max=1).int().tolist(),
        "candidate_pairs": state.pairs_P2.shape[0],
        "learning_rate": learning_rate(state.config, state.step - 1),
        "tokens_per_second": tokens_per_second,
    }


def append_log(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines."""
    try:
        with open(path, "a", encoding="utf-8") as log:
            log.write("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space, then give the same command") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a run killed while writing may have left half a one at the end."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def trim_log(path: Path, step: int) -> None:
    """Drop what was logged after `step`, where the run goes on from, so that no line is doubled."""
    if path.exists():
        kept = [line for line in read_log(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
