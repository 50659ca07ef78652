"""The whole job, in its order: text and model -> activations -> three SAEs in step -> saved SAEs -> probing -> report.

Everything that a run leaves is written by this module and `fipo.report`; every file is written whole or not at all.
A finished folder is left alone, an unfinished one goes on from its last checkpoint. Shapes: B tokens, L layers, D
model width, N tokens or texts.
"""

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fipo import checkpoint, report, runs
from fipo.config import RunConfig
from fipo.data.buffer import ActivationSource, LiveSource, ShuffleBuffer, StoredSource
from fipo.data.harvest import Chunk, harvest
from fipo.data.lm import LanguageModel
from fipo.data.store import ActivationStore, open_or_harvest
from fipo.data.text import open_text
from fipo.errors import UserError
from fipo.evaluate import probe
from fipo.export import save_sae
from fipo.files import write_json, write_text
from fipo.metrics import max_cosines, quality
from fipo.progress import progress
from fipo.provenance import git_revision, hardware, versions
from fipo.randomness import generator_for
from fipo.train import StepReport, TrainState, build_state, learning_rate, train_step

LOG = "training_log.jsonl"
FINAL = "final_info.json"
CHECKPOINT = "checkpoint.safetensors"


class Phases:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds = {"set_up": 0.0, "harvest": 0.0, "training": 0.0, "probing": 0.0}
        self._last = time.monotonic()

    def end(self, phase: str) -> None:
        """Count the time since the last call to `phase`."""
        now = time.monotonic()
        self.seconds[phase] += now - self._last
        self._last = now


def run(out_dir: Path, experiments: Path) -> None:
    """Do, or finish, the run in `out_dir`."""
    if (out_dir / FINAL).exists():
        raise UserError(f"{out_dir} holds a finished run, which is never overwritten; name another folder or remove it")
    config = runs.resolve(out_dir, experiments)
    prepare_folder(config, out_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    phases, workload = Phases(), config.workload
    lm = LanguageModel(
        workload.model,
        workload.layers,
        dtype=workload.dtype,
        context=workload.context,
        weights_sha256=workload.weights_sha256,
        device=device,
    )
    phases.end("set_up")
    held_out, source = training_activations(config, lm)
    phases.end("harvest")
    states = train_all(config, source, lm, out_dir, device)
    phases.end("training")
    sae_configs = export_all(config, states, out_dir)
    measures = {layer: measure(state, held_out, index) for index, (layer, state) in enumerate(states.items())}
    phases.end("training")
    accuracies = probe(config, lm, {layer: out_dir / f"layer_{layer}" for layer in states}, phases.end)
    phases.end("probing")
    finish(config, out_dir, states, measures, accuracies, sae_configs, phases, device)


def prepare_folder(config: RunConfig, out_dir: Path) -> None:
    """Make the folder and write down what will run."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out_dir}: {error.strerror}; choose another --out_dir") from error
    runs.save(config, out_dir)


def training_activations(config: RunConfig, lm: LanguageModel) -> tuple[ActivationStore, ActivationSource]:
    """Held-out activations, and the stream to train on: the first tokens of the text are held out, the next trained."""
    text = config.workload.text
    source = open_text(text)
    key = {
        "model": lm.weights_hash,
        "layers": list(lm.layers),
        "tokenizer": lm.tokenizer_hash,
        "text": source.fingerprint,
        "context": lm.context,
        "packed": text.packed,
        "dtype": str(lm.dtype),
    }

    def produce(skip: int, tokens: float, title: str) -> Iterator[Chunk]:
        rows = (lm.packed_rows if text.packed else lm.token_rows)(source.texts())
        with progress(title, tokens, "tokens") as advance:
            for chunk in harvest(lm, rows, skip=skip):
                advance(len(chunk.text_N), "")
                yield chunk

    held, tokens = text.held_out_tokens, text.tokens
    store, _ = open_or_harvest(
        {**key, "from": 0, "tokens": held}, lambda: produce(0, held, "held-out text"), held
    )
    if not text.cached:
        return store, LiveSource(
            lambda skip: harvest(lm, (lm.packed_rows if text.packed else lm.token_rows)(source.texts()), skip=held + skip)
        )
    train_store, _ = open_or_harvest(
        {**key, "from": held, "tokens": tokens}, lambda: produce(held, tokens, "harvest"), tokens
    )
    return store, StoredSource(train_store)


def statistics(acts_NLD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [L, D], and the scale [L] that brings the mean squared norm of the centred rows to D; from float64 sums."""
    width = acts_NLD.shape[2]
    sum_LD = torch.zeros(acts_NLD.shape[1:], dtype=torch.float64)
    square_L = torch.zeros(acts_NLD.shape[1], dtype=torch.float64)
    for part_NLD in acts_NLD.split(8192):
        part_NLD = part_NLD.cpu().double()
        sum_LD += part_NLD.sum(0)
        square_L += part_NLD.pow(2).sum((0, 2))
    mean_LD = sum_LD / acts_NLD.shape[0]
    variance_L = square_L / acts_NLD.shape[0] - mean_LD.pow(2).sum(1)
    if not (variance_L > 0).all():
        raise UserError("the activations of a layer do not vary: every token has the same; check model and text")
    return mean_LD.float(), (width / variance_L).sqrt().float()


def train_all(
    config: RunConfig, source: ActivationSource, lm: LanguageModel, out_dir: Path, device: str
) -> dict[int, TrainState]:
    """One SAE a layer, in step on the same tokens; resumes from the folder's checkpoint."""
    workload = config.workload
    shuffle = generator_for(config.seed, "shuffle")
    buffer = ShuffleBuffer(source, workload.text.buffer_tokens, workload.batch_tokens, shuffle, device)
    saved = checkpoint.load_tensors(out_dir / CHECKPOINT) if (out_dir / CHECKPOINT).exists() else None
    if saved is None:
        mean_LD, scale_L = statistics(buffer.fill())
    else:
        mean_LD, scale_L = torch.zeros(len(workload.layers), lm.width), torch.ones(len(workload.layers))
    states = {
        layer: build_state(config, layer, mean_LD[index], scale_L[index].item(), device)
        for index, layer in enumerate(workload.layers)
    }
    if saved is not None:
        restore(saved, states, buffer)
    step = next(iter(states.values())).step
    trim_log(out_dir / LOG, step)
    with progress("training", workload.steps * workload.batch_tokens, "tokens") as advance:
        advance(step * workload.batch_tokens, "resumed" if step else "")
        started = time.monotonic()
        for step in range(step, workload.steps):
            batch_BLD = buffer.next_batch()
            reports = {
                layer: train_step(state, batch_BLD[:, index]) for index, (layer, state) in enumerate(states.items())
            }
            done = step + 1
            if done % config.log_every == 0 or done == workload.steps:
                rate = config.log_every * workload.batch_tokens / (time.monotonic() - started)
                append_log(out_dir / LOG, [log_line(states[n], reports[n], n, rate) for n in states])
                started = time.monotonic()
            if done % config.checkpoint_every == 0 and done < workload.steps:
                checkpoint.save_tensors(out_dir / CHECKPOINT, collect(states, buffer))
            advance(workload.batch_tokens, f"FVU {reports[workload.layers[-1]].fvu.item():.3f}")
    return states


def collect(states: dict[int, TrainState], buffer: ShuffleBuffer) -> dict[str, Tensor]:
    """Everything a resumed run needs."""
    tensors = {f"buffer/{name}": value for name, value in buffer.state_dict().items()}
    for layer, state in states.items():
        tensors |= {f"layer_{layer}/{name}": value for name, value in state.state_dict().items()}
    return tensors


def restore(tensors: dict[str, Tensor], states: dict[int, TrainState], buffer: ShuffleBuffer) -> None:
    """Put back what `collect` gathered."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, inner = name.partition("/")
        grouped.setdefault(owner, {})[inner] = tensor
    buffer.load_state_dict(grouped["buffer"])
    for layer, state in states.items():
        state.load_state_dict(grouped[f"layer_{layer}"])


def log_line(state: TrainState, step: StepReport, layer: int, rate: float) -> dict[str, Any]:
    """One line of the training log. Reads the state, changes nothing."""
    config = state.config
    cosines_F = max_cosines(state.sae.dec_FD)
    quantiles = torch.tensor([0.1, 0.5, 0.9, 0.99], device=cosines_F.device)
    sigma = state.importance.values().quantile(quantiles).tolist()
    dead = (state.importance.silent_tokens_F >= config.workload.dead_tokens).float().mean().item()
    return {
        "step": state.step,
        "tokens": state.step * config.workload.batch_tokens,
        "layer": layer,
        "loss": step.terms.total.item(),
        **{name: term.item() for name, term in step.terms._asdict().items()},
        "fvu": step.fvu.item(),
        "l0": step.l0.item(),
        "dead_share": dead,
        "sigma_quantiles": dict(zip(("0.1", "0.5", "0.9", "0.99"), sigma, strict=True)),
        "mean_max_cosine": cosines_F.mean().item(),
        "max_cosine_histogram": torch.histc(cosines_F.float().clamp(0, 1), bins=50, min=0, max=1).int().tolist(),
        "candidate_pairs": state.pairs_P2.shape[0],
        "learning_rate": learning_rate(config, state.step - 1),
        "tokens_per_second": rate,
    }


def append_log(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines to a JSONL file."""
    try:
        with open(path, "a", encoding="utf-8") as log:
            log.write("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space, then give the same command") from error


def trim_log(path: Path, step: int) -> None:
    """Drop what an interrupted run logged after its last checkpoint, so that no line is doubled."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        write_text(path, "".join(line + "\n" for line in kept))


def export_all(config: RunConfig, states: dict[int, TrainState], out_dir: Path) -> dict[int, dict[str, Any]]:
    """Save every SAE with σ and the dead clock beside it; returns their cfg.json contents."""
    workload = config.workload
    return {
        layer: save_sae(
            out_dir / f"layer_{layer}",
            state.sae,
            model=workload.model,
            layer=layer,
            context=workload.context,
            dataset=workload.text.source,
            beside={
                "sigma_F": state.importance.values(),
                "silent_tokens_F": state.importance.silent_tokens_F,
                "training_mean_D": state.sae.mean_D,
                "training_scale": state.sae.scale,
            },
        )
        for layer, state in states.items()
    }


def measure(state: TrainState, held_out: ActivationStore, index: int) -> dict[str, float]:
    """Quality of a trained SAE on held-out text, and its dictionary's mean max cosine."""
    device = state.sae.dec_FD.device
    held = quality(state.sae, (acts_NLD[:, index].to(device) for acts_NLD in held_out.batches(4096)))
    dead = (state.importance.silent_tokens_F >= state.config.workload.dead_tokens).double().mean().item()
    return {
        "held_out_fvu": held.fvu,
        "held_out_l0": held.l0,
        "held_out_tokens": held.tokens,
        "dead_share": dead,
        "mean_max_cosine": max_cosines(state.sae.dec_FD).mean().item(),
    }


def finish(
    config: RunConfig,
    out_dir: Path,
    states: dict[int, TrainState],
    measures: dict[int, dict[str, float]],
    accuracies: dict[int, dict[str, dict[str, dict[str, float]]]],
    sae_configs: dict[int, dict[str, Any]],
    phases: Phases,
    device: str,
) -> None:
    """Check that this is a result, then write the records, the picture and, last of all, `final_info.json`."""
    last_lines = {line["layer"]: line for line in report.read_log(out_dir / LOG)}
    layers = {
        layer: report.layer_info(config, layer, last_lines[layer], measures[layer], accuracies[layer], sae_configs[layer])
        for layer in states
    }
    report.check_is_result(config, layers)
    origin = {"git_revision": git_revision(), "versions": versions(), "hardware": hardware(device)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    write_json(out_dir / "runtime.json", {**phases.seconds, "peak_memory_gib": peak, **origin})
    report.draw(out_dir / LOG, out_dir / "training.png", title=f"{config.run}, {config.workload.name}")
    write_json(
        out_dir / FINAL,
        {
            **layers[config.workload.layers[-1]],
            "run": config.run,
            "workload": config.workload.name,
            "seed": config.seed,
            **origin,
            "layers": {str(layer): info for layer, info in layers.items()},
        },
    )
    (out_dir / CHECKPOINT).unlink(missing_ok=True)
    report.print_results(out_dir)
