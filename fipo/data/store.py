"""Activations on disk: shards in safetensors with a manifest, found again under a key that names all they depend on.

A store appears under its name only when it is complete, so an interrupted harvest leaves nothing that looks whole. On
opening, every shard is checked against its SHA-256; a damaged store is dropped and harvested again. Shapes: N tokens,
L layers, D model width.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fipo.checkpoint import write_tensors
from fipo.data.harvest import Chunk
from fipo.errors import UserError
from fipo.files import read_json, replacing_folder, sha256_file, sha256_json, write_json

FORMAT = 1
SHARD_TOKENS = 65_536


def cache_root() -> Path:
    """`FIPO_CACHE`, or `fipo` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FIPO_CACHE") or Path(base) / "fipo")


class ActivationStore:
    """Activations [N, L, D] with the number of the text each token comes from."""

    def __init__(self, folder: Path) -> None:
        """Open and check; a missing or damaged store is a `UserError`."""
        self.folder = folder
        self.manifest = read_json(folder / "manifest.json")
        for shard in self.manifest["shards"]:
            file = folder / shard["file"]
            if not file.is_file() or sha256_file(file) != shard["sha256"]:
                raise UserError(f"{file} is damaged")
        self.tokens: int = self.manifest["tokens"]
        self._files = [folder / shard["file"] for shard in self.manifest["shards"]]

    def read(self, start: int, count: int) -> Tensor:
        """Activations [count, L, D] from token `start`; never past the end."""
        pieces = []
        for number in range(start // SHARD_TOKENS, -(-(start + count) // SHARD_TOKENS)):
            offset = number * SHARD_TOKENS
            first, last = max(0, start - offset), min(SHARD_TOKENS, start + count - offset)
            # Opened anew each time: a mapped file counts as this process's memory for as long as it stays open.
            with safetensors.safe_open(self._files[number], framework="pt") as shard:
                pieces.append(shard.get_slice("acts_NLD")[first:last].clone())
        return torch.cat(pieces)

    def gather(self, places_N: Tensor) -> Tensor:
        """Activations at any places, [N, L, D], in the order given."""
        shard_N, row_N = places_N // SHARD_TOKENS, places_N % SHARD_TOKENS
        parts = [
            safetensors.torch.load_file(file)["acts_NLD"][row_N[shard_N == number]]
            for number, file in enumerate(self._files)
        ]
        return torch.cat(parts)[shard_N.argsort(stable=True).argsort()]

    def texts(self) -> Tensor:
        """Number of the text of every token, [N]."""
        return torch.cat([safetensors.torch.load_file(file)["text_N"].clone() for file in self._files])

    def batches(self, size: int) -> Iterator[Tensor]:
        """All activations in order, [<= size, L, D] at a time."""
        for start in range(0, self.tokens, size):
            yield self.read(start, min(size, self.tokens - start))

    def chunks(self, size: int) -> Iterator[Chunk]:
        """The same with the number of each token's text."""
        text_N = self.texts()
        for start, acts_NLD in zip(range(0, self.tokens, size), self.batches(size), strict=True):
            yield Chunk(acts_NLD, text_N[start : start + size])


def open_or_harvest(key: dict[str, Any], produce: Callable[[], Iterable[Chunk]], tokens: int | None) -> ActivationStore:
    """The store of this key, made by `produce` where there is none (or a damaged one).

    `tokens`: how many to keep, or None for all that come.
    """
    folder = cache_root() / sha256_json({"format": FORMAT, **key})[:32]
    if (folder / "manifest.json").is_file():
        try:
            return ActivationStore(folder)
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)
    with replacing_folder(folder) as temporary:
        _write(temporary, key, produce(), tokens)
    return ActivationStore(folder)


def _write(folder: Path, key: dict[str, Any], chunks: Iterable[Chunk], tokens: int | None) -> None:
    shards: list[dict[str, Any]] = []
    held: list[Chunk] = []
    waiting = total = 0

    def flush(limit: int) -> None:
        nonlocal held, waiting
        acts_NLD = torch.cat([chunk.acts_NLD.cpu() for chunk in held])
        text_N = torch.cat([chunk.text_N for chunk in held])
        file = folder / f"shard_{len(shards):05d}.safetensors"
        write_tensors(file, {"acts_NLD": acts_NLD[:limit], "text_N": text_N[:limit]})
        shards.append({"file": file.name, "tokens": min(limit, len(text_N)), "sha256": sha256_file(file)})
        held = [Chunk(acts_NLD[limit:], text_N[limit:])]
        waiting -= shards[-1]["tokens"]

    for chunk in chunks:
        room = len(chunk.text_N) if tokens is None else min(len(chunk.text_N), tokens - total)
        held.append(Chunk(chunk.acts_NLD[:room], chunk.text_N[:room]))
        waiting, total = waiting + room, total + room
        while waiting >= SHARD_TOKENS:
            flush(SHARD_TOKENS)
        if total == tokens:
            break
    if total == 0:
        raise UserError("the text has no content token: it is empty, or holds special tokens only; give other text")
    if tokens is not None and total < tokens:
        raise UserError(f"the text ends after {total} content tokens; {tokens} were asked for: give more or ask less")
    if waiting:
        flush(waiting)
    write_json(folder / "manifest.json", {"format": FORMAT, "key": key, "tokens": total, "shards": shards})
