"""Probing saved SAEs: folders -> one pass of the texts through the model -> a result file each, and tables.

A folder is a finished run (all its layers) or a single SAE in SAELens' format, ours or anyone's. All must read the same
model at the same context.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fipo import report
from fipo.checkpoint import save_tensors
from fipo.config import Probing
from fipo.data.labelled import load_labelled
from fipo.data.lm import LanguageModel
from fipo.errors import UserError
from fipo.evaluate import load_subject, probe
from fipo.files import read_json, write_json
from fipo.provenance import hardware, provenance
from fipo.saebench import Setting, sparse_probing_record
from fipo.summary import accuracies, extras, outcomes
from fipo.yamlfile import read_yaml

RESULT_SUFFIX = "_eval_results.json"
OUTCOMES_SUFFIX = "_outcomes.safetensors"


class Saved(NamedTuple):
    """An SAE on disk."""

    name: str
    """Unique among those probed together."""
    folder: Path
    config: dict[str, Any]
    """Content of its cfg.json."""
    run: dict[str, Any]
    """The config of the run it is from; empty for an SAE from elsewhere."""

    @property
    def layer(self) -> int:
        """The block whose output it reads."""
        metadata = self.config.get("metadata", {})
        hook = str(metadata.get("hook_name", ""))
        numbers = [int(part) for part in hook.split(".") if part.isdigit()]
        layer = metadata.get("hook_layer", numbers[0] if numbers else None)
        if not isinstance(layer, int):
            raise UserError(f"{self.folder}/cfg.json names no layer: metadata.hook_layer is {layer!r}; add it")
        return layer


def find_saved(folders: Sequence[Path]) -> list[Saved]:
    """The SAEs in run folders and SAE folders, in the order given."""
    found = []
    for folder in folders:
        inside = [folder] if (folder / "cfg.json").is_file() else sorted(folder.glob("layer_*/"), key=_number)
        inside = [one for one in inside if (one / "cfg.json").is_file()]
        if not inside:
            raise UserError(
                f"{folder} holds no SAE: expected a run folder with layer_*/, or cfg.json and sae_weights.safetensors"
            )
        for one in inside:
            beside = one.parent / "config.yaml"
            run = read_yaml(beside) if beside.is_file() else {}
            found.append(Saved("", one, read_json(one / "cfg.json"), run))
    parts = [one.folder.resolve().parts for one in found]
    common = min(len(part) for part in parts) - 1
    while common and len({part[:common] for part in parts}) > 1:
        common -= 1
    names = ["/".join(part[common:]) for part in parts]
    if len(set(names)) < len(names):
        raise UserError(f"the SAE {max(names, key=names.count)} is given twice; give each folder once")
    return [one._replace(name=name) for one, name in zip(found, names, strict=True)]


def run(folders: Sequence[Path], probing: Probing, seed: int, out: Path | None, **chosen: Any) -> None:
    """Probe, print, and write `out`/NAME_eval_results.json; `chosen`: model, dtype and context where they are to differ
    from what the SAEs say."""
    saved = find_saved(folders)
    files = {one.name: one.name.replace("/", "_") for one in saved}
    if out is not None:
        for file in files.values():
            if (out / f"{file}{RESULT_SUFFIX}").exists():
                raise UserError(f"{out} already holds a result of {file}; name another --out, or remove it")
    lm = load_model(saved, **chosen)
    data = [load_labelled(name, probing, seed) for name in probing.datasets]
    subjects = {one.name: load_subject(one.folder, one.layer) for one in saved}
    scores = probe(lm, data, subjects, probing, seed)
    origin = {**provenance(), "hardware": hardware(lm.device)}
    console = report.make_console()
    for one in saved:
        setting = Setting(
            probing=probing,
            seed=seed,
            model=lm.name,
            dtype=str(lm.dtype).removeprefix("torch."),
            context=lm.context,
            release=f"fipo_{one.name}",
            training_tokens=_training_tokens(one.run),
            commit=origin["git_revision"],
        )
        found = scores[one.name]
        record = {
            **sparse_probing_record(setting, accuracies(found), one.config),
            **extras(found, data),
            "sae": {"name": one.name, "layer": one.layer, "run": one.run.get("run"), "seed": one.run.get("seed")},
            **origin,
        }
        console.print(report.probing_table(one.name, record, {}, tasks=True))
        if out is not None:
            save_tensors(out / f"{files[one.name]}{OUTCOMES_SUFFIX}", outcomes(found))
            write_json(out / f"{files[one.name]}{RESULT_SUFFIX}", record)


def load_model(
    saved: Sequence[Saved], *, model: str | None = None, dtype: str | None = None, context: int | None = None
) -> LanguageModel:
    """The one model that all SAEs read, with hooks on their layers."""
    metadata = [one.config.get("metadata", {}) for one in saved]
    values: dict[str, Any] = {
        "model": model or _agreed("model", [one.get("model_name") for one in metadata], saved),
        "context": context or _agreed("context", [one.get("context_size") for one in metadata], saved),
        "dtype": dtype
        or _agreed("dtype", [one.run.get("workload", {}).get("dtype", "float32") for one in saved], saved),
    }
    return LanguageModel(
        values["model"],
        sorted({one.layer for one in saved}),
        dtype=values["dtype"],
        context=values["context"],
        weights_sha256=None,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def _agreed(what: str, values: list[Any], saved: Sequence[Saved]) -> Any:
    """The one value of all; else the first two that differ are named."""
    for one, value in zip(saved, values, strict=True):
        if value is None:
            raise UserError(f"{one.folder}/cfg.json does not say its {what}; give --{what}")
        if value != values[0]:
            raise UserError(
                f"the SAEs differ in {what}: {values[0]} of {saved[0].name}, {value} of {one.name}; probe them apart, "
                f"or give --{what}"
            )
    return values[0]


def _training_tokens(run: dict[str, Any]) -> int | None:
    workload = run.get("workload", {})
    return workload.get("train_tokens")


def _number(folder: Path) -> int:
    digits = folder.name.removeprefix("layer_")
    return int(digits) if digits.isdigit() else -1
