"""Saved SAEs found on disk: what each reads, and the one model that all of them read.

A folder is a run (all its layers) or a single SAE in SAELens' format, ours or anyone's. All must read the residual
stream of the same model at the same context.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from fipo.config import LEAST_CONTEXT, Dtype
from fipo.data.lm import LanguageModel
from fipo.errors import UserError
from fipo.files import read_json
from fipo.names import flat
from fipo.yamlfile import read_yaml

DTYPES = get_args(Dtype)
_HOOK = re.compile(r"(?:[a-z_]+\.)*(\d{1,6})(\.hook_resid_post|\.hook_resid_pre)?")
"""Hook points of the residual stream: TransformerLens' names, or a block's own in transformers."""


class Saved(NamedTuple):
    """An SAE on disk."""

    name: str
    """Unique among those probed together; a run's name is part of it."""
    folder: Path
    layer: int
    """The block whose output it reads."""
    config: dict[str, Any]
    """Content of its cfg.json."""
    run: dict[str, Any]
    """The config of the run it is from; empty for an SAE from elsewhere."""

    @property
    def described(self) -> dict[str, Any]:
        """What a result says of it; `config` is what tells its run from others of the name (fipo.names)."""
        origin = {key: self.run.get(key) for key in ("run", "seed")}
        return {"name": self.name, "layer": self.layer, **origin, "config": flat(self.run)}


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
            config = _config(one)
            found.append(Saved("", one, _layer(one, config["metadata"]), config, _run_of(one)))
    parts = [one.folder.resolve().parts for one in found]
    within_run = [bool(one.run) or one.folder not in folders for one in found]
    common = max(1, min(len(part) - 1 - inside for part, inside in zip(parts, within_run, strict=True)))
    while common and len({part[:common] for part in parts}) > 1:
        common -= 1
    names = ["/".join(part[common:]) for part in parts]
    if len(set(names)) < len(names):
        raise UserError(f"the SAE {max(names, key=names.count)} is given twice; give each folder once")
    return [one._replace(name=name) for one, name in zip(found, names, strict=True)]


def file_names(saved: Sequence[Saved]) -> dict[str, str]:
    """Name of every SAE -> how its files begin; two that begin alike are a `UserError`."""
    files = {one.name: one.name.replace("/", "_") for one in saved}
    beginnings = list(files.values())
    for name, file in files.items():
        if beginnings.count(file) > 1:
            raise UserError(f"the results of {name} and of another SAE would both be {file}; probe them apart")
    return files


def _config(folder: Path) -> dict[str, Any]:
    """Content of cfg.json, with what it says of the model checked; what it leaves out is for the command to say."""
    file = folder / "cfg.json"
    config = read_json(file)
    if isinstance(config, dict) and "metadata" not in config and config.keys() & {"hook_name", "hook_point"}:
        raise UserError(
            f"{file} was saved by SAELens before version 6, without `metadata`; load it in SAELens 6 and save it anew"
        )
    metadata = config.get("metadata", {}) if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(metadata, dict):
        raise UserError(f"{file} is no mapping with a mapping `metadata`; expected an SAE in SAELens' format")
    model, context = metadata.get("model_name"), metadata.get("context_size")
    if not isinstance(model, str | None):
        raise UserError(f"{file}: metadata.model_name is {str(model)[:80]!r}; expected text")
    if context is not None and not (type(context) is int and context > 0):
        raise UserError(f"{file}: metadata.context_size is {str(context)[:80]!r}; expected a positive whole number")
    return {**config, "metadata": metadata}


def _layer(folder: Path, metadata: dict[str, Any]) -> int:
    """The block whose output the SAE reads: what goes into block N is what comes out of block N - 1."""
    name, layer = metadata.get("hook_name"), metadata.get("hook_layer")
    found = _HOOK.fullmatch(name) if isinstance(name, str) else None
    if name is not None and found is None:
        raise UserError(
            f"{folder} reads {str(name)[:80]}; only SAEs of the residual stream can be probed, as at "
            "blocks.N.hook_resid_post"
        )
    block = int(found[1]) if found else layer
    if type(block) is not int or (layer is not None and (type(layer) is not int or layer != block)):
        raise UserError(
            f"{folder}/cfg.json names no layer: metadata.hook_name is {name!r}, hook_layer {str(layer)[:80]}; correct "
            "it"
        )
    block -= found is not None and found[2] == ".hook_resid_pre"
    if block < 0:
        raise UserError(f"{folder} reads what goes into block 0 of the model, or before; only outputs can be probed")
    return block


def _run_of(folder: Path) -> dict[str, Any]:
    """The config of the run that the SAE in `folder` is from; empty where what lies beside it is none of ours."""
    beside = folder.parent / "config.yaml"
    run = read_yaml(beside) if beside.is_file() else {}
    ours = isinstance(run.get("run"), str) and isinstance(run.get("workload", {}), dict)
    ours = ours and type(run.get("seed", 0)) is int
    return run if ours else {}


def load_model(
    saved: Sequence[Saved], *, model: str | None = None, dtype: str | None = None, context: int | None = None
) -> LanguageModel:
    """The one model that all SAEs read, with hooks on their layers."""
    metadata = [one.config["metadata"] for one in saved]
    model = model or _agreed("model", [one.get("model_name") for one in metadata], saved)
    dtype = dtype or _agreed("dtype", [one.run.get("workload", {}).get("dtype", "float32") for one in saved], saved)
    if dtype not in DTYPES:
        raise UserError(f"dtype {str(dtype)[:80]} is not one of {', '.join(DTYPES)}; give --dtype")
    if context is None:
        context = _agreed("context", [one.get("context_size") for one in metadata], saved)
    if context < LEAST_CONTEXT:
        raise UserError(
            f"the context is {context} tokens; expected {LEAST_CONTEXT} at least, two special: give --context"
        )
    return LanguageModel(
        model,
        sorted({one.layer for one in saved}),
        dtype=dtype,
        context=context,
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


def _number(folder: Path) -> int:
    digits = folder.name.removeprefix("layer_")
    return int(digits) if digits.isascii() and digits.isdecimal() else -1
