"""Tensors on disk, and checkpoints: tensors with a manifest, of which the last two are kept.

A checkpoint is a folder `step_N` with `state.safetensors` and `checkpoint.json` (format version, step, what it belongs
to, SHA-256). It is written whole or not at all, the one before it is removed only afterwards, and what does not match
its manifest is reported and passed over. No pickle; knows no SAE.
"""

import re
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fipo.errors import UserError
from fipo.files import read_json, remove, replacing, replacing_folder, sha256_file, write_json

FORMAT = 2
"""Of what is held, and of how a run goes on from it."""
KEPT = 2
STATE, MANIFEST = "state.safetensors", "checkpoint.json"
_NAME = re.compile(r"step_(\d{1,18})")


def save_checkpoint(folder: Path, step: int, key: str, tensors: dict[str, Tensor]) -> None:
    """Add the state after `step` to the checkpoints in `folder`. `key` names what it belongs to."""
    with replacing_folder(folder / f"step_{step}") as temporary:
        write_tensors(temporary / STATE, tensors)
        manifest = {"format": FORMAT, "step": step, "key": key, "sha256": sha256_file(temporary / STATE)}
        write_json(temporary / MANIFEST, manifest)
    held = _newest_first(folder)
    later = [path for path in held if _step(path) > step]  # damaged, else the run would have gone on from there
    for path in later + held[len(later) + KEPT :]:
        remove(path)


def load_checkpoint(folder: Path, key: str, say: Callable[[str], None]) -> dict[str, Tensor] | None:
    """The newest checkpoint that is whole; None where there is none. Of a damaged one `say` is told."""
    for path in _newest_first(folder):
        try:
            return _load(path, key)
        except _Damaged as error:
            say(f"warning: checkpoint {path} is damaged ({error}); going back to the one before it")
    return None


class _Damaged(Exception):
    """A checkpoint is not what its manifest says."""


def _load(path: Path, key: str) -> dict[str, Tensor]:
    try:
        manifest = read_json(path / MANIFEST)
    except UserError as error:
        raise _Damaged(str(error)) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise _Damaged(f"{MANIFEST} has no format version")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {manifest['format']}, this version of FIPO reads {FORMAT}; finish the run "
            f"with the version that began it, or remove {path.parent} to begin anew"
        )
    if manifest.get("key") != key:
        raise UserError(
            f"checkpoint {path} belongs to another config, text or model, or to stored activations in another order "
            f"(as other kinds of device make them); put config.yaml and FIPO_CACHE back as they were, or remove "
            f"{path.parent} to begin anew"
        )
    file = path / STATE
    if path.is_symlink() or file.is_symlink() or not file.is_file():
        raise _Damaged(f"{STATE} is missing or a link")
    if f"step_{manifest.get('step')}" != path.name or sha256_file(file) != manifest.get("sha256"):
        raise _Damaged("step or checksum do not match")
    return load_tensors(file)


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors atomically; views and devices do not matter."""
    with replacing(path) as temporary:
        write_tensors(temporary, tensors)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors to a path that nobody reads yet."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    owned, seen = {}, set()
    for name, tensor in plain.items():
        owned[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    try:
        safetensors.torch.save_file(owned, path)
    except safetensors.SafetensorError as error:  # its name for a full disk
        raise OSError(str(error)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote; a damaged file is a `UserError` that names it."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}; delete it and start again") from error


def check_tensors(given: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Names, shapes and dtypes must be those of `expected`, and no number NaN: nothing is bent to fit."""
    for name in sorted(given.keys() ^ expected.keys()):
        raise UserError(f"{what}: tensor {name} is {'unknown' if name in given else 'missing'}")
    for name, tensor in given.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise UserError(
                f"{what}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}; expected {wanted.dtype} "
                f"{tuple(wanted.shape)}"
            )
        if tensor.is_floating_point() and torch.isnan(tensor).any():
            raise UserError(f"{what}: tensor {name} holds NaN")
