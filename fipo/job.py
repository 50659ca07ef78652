"""The whole job, in its order: text and model -> activations -> SAEs in step -> saved SAEs -> probing -> report.

A finished folder is left alone, an unfinished one goes on from its last checkpoint; every file is written whole or
not at all, and `final_info.json` last. One process at a time works in a folder.
"""

import resource
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fipo import page, report, runs
from fipo.checkpoint import save_tensors
from fipo.config import RunConfig
from fipo.data.buffer import StoredSource
from fipo.data.labelled import load_all
from fipo.data.lm import LanguageModel
from fipo.data.prepare import training_activations
from fipo.data.store import ActivationStore, cache_root
from fipo.data.text import pinned
from fipo.errors import UserError
from fipo.evaluate import Subject, load_subject, probe
from fipo.export import save_sae
from fipo.features import activities
from fipo.files import remove, remove_temporaries, writable, write_json
from fipo.lock import locked
from fipo.log import read_log
from fipo.loop import CHECKPOINTS, LOG, train_all
from fipo.memory import enough_memory, keep_freed
from fipo.metrics import max_cosines, quality
from fipo.pooling import POOLED
from fipo.provenance import hardware, provenance
from fipo.report import OUTCOMES
from fipo.results import FINAL, RUNTIME
from fipo.signals import StopSignals
from fipo.state import TrainState
from fipo.summary import outcomes
from fipo.yamlfile import read_yaml

LOCK = ".lock"
PICTURE, PAGE = "training.png", "features.html"
TO_LOWER = "workload.context, workload.latents or workload.probing.train_per_class"


class Phases:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.harvested = True
        """Did the harvest make all activations that were trained on, held out and kept of the probes' texts, and find
        none on disk?"""
        self.seconds = {"set_up": 0.0, "harvest": 0.0, "training": 0.0, "probing": 0.0, "page": 0.0}
        self._last = time.monotonic()

    def end(self, phase: str) -> None:
        """Count the time since the last call to `phase`."""
        now = time.monotonic()
        self.seconds[phase] += now - self._last
        self._last = now

    def harvest_ends(self, made: Collection[bool]) -> None:
        """Count its time; `made`: was each of its stores made, and not found?"""
        self.end("harvest")
        self.harvested = self.harvested and all(made)


def run(out_dir: Path, experiments: Path) -> None:
    """Do, or finish, the run in `out_dir`; `experiments` holds the run files."""
    tidy_finished(out_dir)
    refuse_finished(out_dir)
    keep_freed()
    phases = Phases()
    config = runs.resolve(out_dir, experiments)
    with (
        StopSignals() as stop,
        writable(out_dir, "--out_dir"),
        locked(out_dir / LOCK),
        enough_memory("a run", TO_LOWER),
    ):
        refuse_finished(out_dir)
        refuse_without_config(out_dir)
        remove_temporaries(out_dir)
        remove_temporaries(cache_root() / POOLED, of_the_dead=True)
        workload = config.workload
        device = "cuda" if torch.cuda.is_available() else "cpu"
        lm = LanguageModel(
            workload.model,
            workload.layers,
            dtype=workload.dtype,
            context=workload.context,
            weights_sha256=workload.weights_sha256,
            device=device,
        )
        probed = load_all(workload.probing, config.seed)
        workload = replace(workload, text=pinned(workload.text))
        config = replace(config, workload=workload)
        phases.end("set_up")
        held_out, source = training_activations(workload.text, lm)
        phases.harvest_ends([held_out.made, isinstance(source, StoredSource) and source.store.made])
        runs.save(config, out_dir)
        states = train_all(config, source, out_dir, device, stop)
        lines = last_lines(out_dir, workload.layers)
        sae_configs = {layer: export(config, layer, state, out_dir) for layer, state in states.items()}
        measures = {layer: measure(state, held_out, place) for place, (layer, state) in enumerate(states.items())}
        phases.end("training")
        subjects = {f"layer_{layer}": load_subject(out_dir / f"layer_{layer}", layer) for layer in states}
        scores = probe(lm, probed, subjects, workload.probing, config.seed, keep=False, harvested=phases.harvest_ends)
        phases.end("probing")
        origin = {**provenance(), "hardware": hardware(device), "activations": held_out.manifest["key"]}
        layers = {}
        for n in workload.layers:
            found = scores[f"layer_{n}"]
            record = report.probing_record(config, n, found, probed, sae_configs[n], origin["git_revision"])
            layers[n] = report.layer_info(config, n, lines[n], measures[n], record)
            save_tensors(out_dir / f"layer_{n}" / OUTCOMES, outcomes(found, probed))
        report.check_is_result(config, layers)
        report.draw(out_dir / LOG, out_dir / PICTURE, title=f"{config.run}, {workload.name}")
        show(config, out_dir, layers, subjects, held_out, lm, origin["git_revision"])
        phases.end("page")
        finish(config, out_dir, layers, phases, origin)


def refuse_finished(out_dir: Path) -> None:
    """A finished run is never touched."""
    if (out_dir / FINAL).exists():
        raise UserError(f"{out_dir} holds a finished run, which is never overwritten; name another folder or remove it")


def refuse_without_config(out_dir: Path) -> None:
    """A run that was stopped goes on by its own config, and by no other that would take its place."""
    file = out_dir / "config.yaml"
    begun = any((out_dir / CHECKPOINTS).glob("step_*"))
    if begun and not (file.is_file() and {"run", "workload"} <= read_yaml(file).keys()):
        raise UserError(
            f"{out_dir} holds checkpoints and no config.yaml of their run; put it back to go on, or remove "
            f"{out_dir / CHECKPOINTS}"
        )


def last_lines(out_dir: Path, layers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The last line of every layer in the log, without which a run has no record."""
    lines = {line["layer"]: line for line in read_log(out_dir / LOG)}
    for layer in layers:
        if layer not in lines or not {"step", "loss"} <= lines[layer].keys():
            raise UserError(
                f"{out_dir / LOG} has lost its last line of layer {layer}; remove the newest folder in "
                f"{out_dir / CHECKPOINTS} and give the command again, which makes it anew"
            )
    return lines


def tidy_finished(out_dir: Path) -> None:
    """Remove what the process of a finished run had no time to."""
    if (out_dir / FINAL).exists() and any((out_dir / name).exists() for name in (CHECKPOINTS, LOCK)):
        with locked(out_dir / LOCK):
            remove(out_dir / CHECKPOINTS)
            remove_temporaries(out_dir)


def export(config: RunConfig, layer: int, state: TrainState, out_dir: Path) -> dict[str, Any]:
    """Save a trained SAE with σ and the dead clock beside it; returns the content of its cfg.json."""
    workload = config.workload
    return save_sae(
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


def measure(state: TrainState, held_out: ActivationStore, place: int) -> dict[str, float]:
    """Quality of a trained SAE on held-out text, its dead latents in training, and its mean max cosine."""
    device = state.sae.dec_FD.device
    held = quality(state.sae, (acts_NLD[:, place].to(device) for acts_NLD in held_out.batches(4096)))
    return {
        "held_out_fvu": held.fvu,
        "held_out_l0": held.l0,
        "held_out_tokens": held.tokens,
        "dead_share": state.importance.dead(state.config.workload.dead_tokens).double().mean().item(),
        "mean_max_cosine": max_cosines(state.sae.dec_FD).mean().item(),
    }


def show(
    config: RunConfig,
    out_dir: Path,
    layers: dict[int, dict[str, Any]],
    subjects: Mapping[str, Subject],
    held_out: ActivationStore,
    lm: LanguageModel,
    revision: str,
) -> None:
    """The page to look at: scores, concepts, and what the SAEs' latents respond to in held-out text."""
    workload = config.workload
    saes = {name: (one.sae, lm.layers.index(one.layer)) for name, one in subjects.items()}
    found = activities(saes, held_out.chunks(2048))
    shown = []
    for n, info in layers.items():
        measured = report.measures(info)
        told = {"latents": f"{info['dict_size']:,}", "L0": measured.pop("L0"), **measured}
        shown.append(page.Section(f"layer {n}", told, info, found[f"layer_{n}"], subjects[f"layer_{n}"].sae.dec_FD))
    page.write(
        out_dir / PAGE,
        f"{config.run}, {workload.name}, seed {config.seed}",
        f"{workload.model}; {workload.steps:,} steps of {workload.batch_tokens:,} tokens; git revision {revision}",
        "held-out text" + (", documents end to end" if workload.text.packed else ""),
        shown,
        lm.pieces,
        out_dir / PICTURE,
    )


def finish(
    config: RunConfig, out_dir: Path, layers: dict[int, dict[str, Any]], phases: Phases, origin: dict[str, Any]
) -> None:
    """Write times and, last, the record; print the table."""
    for folder in out_dir.glob("layer_*"):
        if folder.name not in {f"layer_{layer}" for layer in layers}:  # of a config that this run once had
            remove(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    write_json(out_dir / RUNTIME, {**phases.seconds, "harvested": phases.harvested, "peak_memory_gib": peak, **origin})
    importance, batch = config.importance, config.workload.batch_tokens
    half_life = importance.half_life_tokens(batch) if importance else None
    write_json(
        out_dir / FINAL,
        {
            **layers[config.workload.layers[-1]],
            "run": config.run,
            "workload": config.workload.name,
            "seed": config.seed,
            "importance_half_life_tokens": half_life,
            **origin,
            "layers": {str(layer): info for layer, info in layers.items()},
        },
    )
    remove(out_dir / CHECKPOINTS)
    report.print_results(out_dir)
