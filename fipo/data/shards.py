"""The files of a store: shards of activations in safetensors, and a manifest that names them with their SHA-256.

Shapes: N tokens, L layers, D model width.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors

from fipo.checkpoint import write_tensors
from fipo.data.harvest import Chunk
from fipo.errors import UserError
from fipo.files import flush, read_json, sha256_file, write_json

FORMAT = 3
MANIFEST = "manifest.json"
SHARD_TOKENS = 65_536
"""Tokens of every shard but the last."""


def write_shard(folder: Path, number: int, shard: Chunk) -> dict[str, Any]:
    """Write it to the disk; gives what the manifest says of it."""
    file = folder / _name(number)
    write_tensors(file, shard._asdict())
    flush(file)
    return {"file": file.name, "tokens": len(shard.text_N), "sha256": sha256_file(file)}


def write_manifest(folder: Path, key: dict[str, Any], order: str, shards: list[dict[str, Any]]) -> None:
    """The manifest of these shards, in the place of the one before."""
    about = {"format": FORMAT, "key": key, "order": order, "tokens": tokens_of(shards)}
    write_json(folder / MANIFEST, {**about, "shards": shards})


def tokens_of(shards: list[dict[str, Any]]) -> int:
    """Tokens in all of these, by what the manifest says of them."""
    return sum(shard["tokens"] for shard in shards)


def checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store; one that does not say what ours say, and no more, is a `UserError`."""
    manifest = read_json(folder / MANIFEST)
    file = folder / MANIFEST
    if not isinstance(manifest, dict) or {*manifest, "order"} != {"format", "key", "order", "tokens", "shards"}:
        raise UserError(f"{file} is no manifest of stored activations")
    shards, tokens = manifest["shards"], manifest["tokens"]
    manifest.setdefault("order", "")  # of before it was told
    plain = (
        isinstance(manifest["order"], str)
        and isinstance(shards, list)
        and type(tokens) is int
        and 0 < tokens <= len(shards) * SHARD_TOKENS
    )
    if manifest["format"] != FORMAT or not plain or len(shards) != -(-tokens // SHARD_TOKENS):
        raise UserError(f"{file} is damaged: format, tokens and shards do not fit together")
    for number, shard in enumerate(shards):
        expected = {"file": _name(number), "tokens": min(SHARD_TOKENS, tokens - number * SHARD_TOKENS)}
        if not isinstance(shard, dict) or {**shard, "sha256": None} != {**expected, "sha256": None}:
            raise UserError(f"{file} is damaged: shard {number} is not {expected}")
    return manifest


def checked_shard(folder: Path, shard: dict[str, Any], *, hashed: bool = True) -> tuple[str, int, int]:
    """Dtype, layers and width of a shard that the manifest names; `UserError` where it is not what was written, or
    (not `hashed`) does not look like it."""
    file = folder / shard["file"]
    if not file.is_file() or file.is_symlink() or (hashed and sha256_file(file) != shard["sha256"]):
        raise UserError(f"{file} is damaged")
    with opened(file) as tensors:
        if set(tensors.keys()) != set(Chunk._fields):
            raise UserError(f"{file} is damaged: it holds other tensors")
        acts, *columns = (tensors.get_slice(name) for name in Chunk._fields)
        shape, dtype = acts.get_shape(), acts.get_dtype()
        fits = len(shape) == 3 and shape[0] == shard["tokens"] and dtype in ("F32", "BF16", "F16")
        if not fits or any((one.get_shape(), one.get_dtype()) != ([shard["tokens"]], "I64") for one in columns):
            raise UserError(f"{file} is damaged: its tensors have another shape or dtype")
    return dtype, shape[1], shape[2]


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A shard's tensors, which are read when they are asked for."""
    try:
        with safetensors.safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} is damaged: {error}; give the same command again") from error


def _name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"
