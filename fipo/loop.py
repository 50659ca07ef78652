"""The training loop: one SAE a layer, all in step on the same tokens, with log and checkpoints.

A checkpoint that cannot be written is no reason to stop: the run goes on, and the one before it stays. Shapes: B tokens
of a batch, L layers, D model width.
"""

import time
from pathlib import Path

import torch
from torch import Tensor

from fipo import checkpoint
from fipo.config import RunConfig
from fipo.data.buffer import ActivationSource, ShuffleBuffer
from fipo.data.prepare import statistics
from fipo.errors import UserError
from fipo.files import sha256_json
from fipo.log import append_log, log_line, trim_log
from fipo.memory import enough_memory
from fipo.progress import progress, say
from fipo.randomness import generator_for
from fipo.records import to_dict
from fipo.signals import StopSignals
from fipo.state import TrainState, build_state
from fipo.train import train_step

LOG = "training_log.jsonl"
CHECKPOINTS = "checkpoints"
TO_LOWER = (
    "workload.batch_tokens, workload.latents, workload.text.buffer_tokens, reservoir.slots or the number of "
    "workload.layers"
)


class Saver:
    """When a checkpoint is due, and what its writing costs: never more than a share of the training time."""

    def __init__(self, config: RunConfig, folder: Path, key: str) -> None:
        self.config, self.folder, self.key = config, folder, key
        self.spent, self._last, self._began = 0.0, 0.0, time.monotonic()

    def due(self, step: int) -> bool:
        """Every `checkpoint_every` steps, unless with one more like the last `checkpoint_share` would be exceeded."""
        afford = self.spent + self._last <= self.config.checkpoint_share * (time.monotonic() - self._began)
        return step % self.config.checkpoint_every == 0 and step < self.config.workload.steps and afford

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write the state after `step`."""
        start = time.monotonic()
        try:
            checkpoint.save_checkpoint(self.folder, step, self.key, tensors)
        except UserError as error:
            say(f"warning: no checkpoint at step {step}, the run goes on: {str(error).partition(';')[0]}")
        self._last = time.monotonic() - start
        self.spent += self._last


def train_all(
    config: RunConfig, source: ActivationSource, out_dir: Path, device: str, stop: StopSignals
) -> dict[int, TrainState]:
    """Train the SAEs of all layers; goes on from the folder's last checkpoint where there is one."""
    key = sha256_json([to_dict(config), source.key])
    saver = Saver(config, out_dir / CHECKPOINTS, key)
    with enough_memory("training", TO_LOWER):
        tensors = checkpoint.load_checkpoint(saver.folder, key, say)
        buffer, states = build_all(config, source, tensors, device)
        step = next(iter(states.values())).step
        if trim_log(out_dir / LOG, step) < step // config.log_every * len(states):
            say(f"warning: {out_dir / LOG} is damaged: lines before step {step} are lost; training is not concerned")
        with stop.deferred():
            _train(config, buffer, states, out_dir / LOG, saver, stop)
    return states


def _train(
    config: RunConfig,
    buffer: ShuffleBuffer,
    states: dict[int, TrainState],
    log: Path,
    saver: Saver,
    stop: StopSignals,
) -> None:
    workload = config.workload
    step = next(iter(states.values())).step
    with progress("training", (workload.steps - step) * workload.batch_tokens, "tokens") as advance:
        started, logged, note = time.monotonic(), step, ""
        while step < workload.steps:
            batch_BLD = buffer.next_batch()
            reports = [train_step(state, batch_BLD[:, place]) for place, state in enumerate(states.values())]
            step += 1
            if step % config.log_every == 0 or step == workload.steps:
                rate = (step - logged) * workload.batch_tokens / (time.monotonic() - started)
                lines = [log_line(states[n], report, n, rate) for n, report in zip(states, reports, strict=True)]
                append_log(log, lines)
                started, logged, note = time.monotonic(), step, f"FVU {lines[-1]['fvu']:.3f}"
            if saver.due(step) or stop.received is not None:
                saver.save(step, collect(states, buffer))
                stop.leave()
            advance(workload.batch_tokens, note)


def build_all(
    config: RunConfig, source: ActivationSource, tensors: dict[str, Tensor] | None, device: str
) -> tuple[ShuffleBuffer, dict[int, TrainState]]:
    """Buffer and states: fresh, standardised by the first pool of activations, or from a checkpoint's tensors."""
    workload = config.workload
    shuffle = generator_for(config.seed, "shuffle")
    buffer = ShuffleBuffer(source, workload.text.buffer_tokens, workload.batch_tokens, shuffle, device)
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
