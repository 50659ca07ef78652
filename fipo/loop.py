"""The training loop: one SAE a layer, all in step on the same tokens, with log and checkpoints.

Shapes: B tokens of a batch, L layers, D model width.
"""

import time
from pathlib import Path

import torch
from torch import Tensor

from fipo import checkpoint
from fipo.config import RunConfig
from fipo.data.buffer import ActivationSource, ShuffleBuffer
from fipo.data.prepare import statistics
from fipo.log import append_log, log_line, trim_log
from fipo.progress import progress
from fipo.randomness import generator_for
from fipo.train import TrainState, build_state, train_step

LOG = "training_log.jsonl"
CHECKPOINT = "checkpoint.safetensors"


def train_all(config: RunConfig, source: ActivationSource, out_dir: Path, device: str) -> dict[int, TrainState]:
    """Train the SAEs of all layers; goes on from the folder's checkpoint where there is one."""
    workload = config.workload
    buffer, states = build_all(config, source, out_dir / CHECKPOINT, device)
    step = first = next(iter(states.values())).step
    trim_log(out_dir / LOG, step)
    with progress("training", (workload.steps - first) * workload.batch_tokens, "tokens") as advance:
        started, logged, note = time.monotonic(), step, ""
        while step < workload.steps:
            batch_BLD = buffer.next_batch()
            reports = [train_step(state, batch_BLD[:, place]) for place, state in enumerate(states.values())]
            step += 1
            if step % config.log_every == 0 or step == workload.steps:
                rate = (step - logged) * workload.batch_tokens / (time.monotonic() - started)
                lines = [log_line(states[n], report, n, rate) for n, report in zip(states, reports, strict=True)]
                append_log(out_dir / LOG, lines)
                started, logged, note = time.monotonic(), step, f"FVU {lines[-1]['fvu']:.3f}"
            if step % config.checkpoint_every == 0 and step < workload.steps:
                checkpoint.save_tensors(out_dir / CHECKPOINT, collect(states, buffer))
            advance(workload.batch_tokens, note)
    return states


def build_all(
    config: RunConfig, source: ActivationSource, saved: Path, device: str
) -> tuple[ShuffleBuffer, dict[int, TrainState]]:
    """Buffer and states: fresh, standardised by the first pool of activations, or from the checkpoint `saved`."""
    workload = config.workload
    shuffle = generator_for(config.seed, "shuffle")
    buffer = ShuffleBuffer(source, workload.text.buffer_tokens, workload.batch_tokens, shuffle, device)
    tensors = checkpoint.load_tensors(saved) if saved.exists() else None
    if tensors is not None:
        buffer.load_state_dict(_part(tensors, "buffer/"))
    mean_LD, scale_L = statistics(buffer.fill()) if tensors is None else _placeholders(buffer.fill())
    states = {
        layer: build_state(config, layer, mean_LD[place], scale_L[place].item(), device)
        for place, layer in enumerate(workload.layers)
    }
    if tensors is not None:
        for layer, state in states.items():
            state.load_state_dict(_part(tensors, f"layer_{layer}/"))
    return buffer, states


def collect(states: dict[int, TrainState], buffer: ShuffleBuffer) -> dict[str, Tensor]:
    """Everything that a resumed run needs, as flat tensors."""
    tensors = {f"buffer/{name}": value for name, value in buffer.state_dict().items()}
    for layer, state in states.items():
        tensors |= {f"layer_{layer}/{name}": value for name, value in state.state_dict().items()}
    return tensors


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _placeholders(pool_RLD: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics to be overwritten by a checkpoint's."""
    return torch.zeros(pool_RLD.shape[1:]), torch.ones(pool_RLD.shape[1])
