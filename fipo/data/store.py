"""Activations on disk: shards in safetensors with a manifest, found again under a key that names all they depend on.

A store appears under its name only when it is complete, so an interrupted harvest leaves nothing that looks whole; of
two processes that need the same one, the second waits. On opening, every shard is checked against the manifest and its
SHA-256; a damaged store is dropped and harvested again. Shapes: N tokens, L layers, D model width.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from fipo.checkpoint import load_tensors, write_tensors
from fipo.data.harvest import Chunk
from fipo.errors import UserError
from fipo.files import TEMPORARY, read_json, remove, replacing_folder, sha256_file, sha256_json, touch, write_json
from fipo.lock import locked
from fipo.progress import say

FORMAT = 3
MANIFEST = "manifest.json"
SHARD_TOKENS = 65_536


def cache_root() -> Path:
    """`FIPO_CACHE`, or `fipo` in the user's cache folder."""
    if given := os.environ.get("FIPO_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fipo"
    except RuntimeError as error:
        raise UserError("there is no home folder for the cache; name a folder in FIPO_CACHE") from error


class ActivationStore:
    """Activations [N, L, D], with the number of each token's text and its id."""

    def __init__(self, folder: Path, *, made: bool = False) -> None:
        """Open and check; a missing or damaged store is a `UserError`. `made`: by this process, just now; the hashes of
        its shards were taken of what was written."""
        self.folder, self.made = folder, made
        self.manifest = checked_manifest(folder)
        self.tokens: int = self.manifest["tokens"]
        self._files = [folder / shard["file"] for shard in self.manifest["shards"]]
        shapes = set()
        for file, shard in zip(self._files, self.manifest["shards"], strict=True):
            whole = file.is_file() and not file.is_symlink()
            if not whole or (not made and sha256_file(file) != shard["sha256"]):
                raise UserError(f"{file} is damaged")
            shapes.add(_shard_shape(file, shard["tokens"]))
        if len(shapes) > 1:
            raise UserError(f"{folder} is damaged: its shards differ in layers, width or dtype")

    def read(self, start: int, count: int) -> Tensor:
        """Activations [count, L, D] from token `start`; never past the end."""
        pieces = []
        for number in range(start // SHARD_TOKENS, -(-(start + count) // SHARD_TOKENS)):
            offset = number * SHARD_TOKENS
            first, last = max(0, start - offset), min(SHARD_TOKENS, start + count - offset)
            # Opened anew each time: a mapped file counts as this process's memory for as long as it stays open.
            with _shard(self._files[number]) as shard:
                pieces.append(shard.get_slice("acts_NLD")[first:last].clone())
        return torch.cat(pieces)

    def gather(self, places_N: Tensor) -> Tensor:
        """Activations at any places, [N, L, D], in the order given."""
        shard_N, row_N = places_N // SHARD_TOKENS, places_N % SHARD_TOKENS
        parts = [load_tensors(file)["acts_NLD"][row_N[shard_N == number]] for number, file in enumerate(self._files)]
        return torch.cat(parts)[shard_N.argsort(stable=True).argsort()]

    def texts(self) -> Tensor:
        """Number of the text of every token, [N]."""
        return self._column("text_N")

    def token_ids(self) -> Tensor:
        """Id of every token, [N]."""
        return self._column("token_N")

    def _column(self, name: str) -> Tensor:
        return torch.cat([load_tensors(file)[name].clone() for file in self._files])

    def batches(self, size: int) -> Iterator[Tensor]:
        """All activations in order, [<= size, L, D] at a time."""
        for start in range(0, self.tokens, size):
            yield self.read(start, min(size, self.tokens - start))

    def chunks(self, size: int) -> Iterator[Chunk]:
        """The same with the number of each token's text, and its id."""
        for parts in zip(self.batches(size), self.texts().split(size), self.token_ids().split(size), strict=True):
            yield Chunk(*parts)


def open_or_harvest(
    key: dict[str, Any], produce: Callable[[], Iterable[Chunk]], tokens: int | None, needed: int = 0
) -> ActivationStore:
    """The store of this key, made by `produce` where there is none (or a damaged one).

    `tokens`: how many to keep, or None for all that come; `needed`: bytes that the disk must have free, or `UserError`
    before anything is harvested.
    """
    folder = cache_root() / sha256_json({"format": FORMAT, **key})[:32]
    if (store := _find(folder, key, lambda _: None)) is not None:  # what is damaged is told below, once
        if lock_of(folder).exists():  # a killed process left it, or another is about to remove it
            with contextlib.suppress(UserError), locked(lock_of(folder)):
                pass
        return store
    with locked(lock_of(folder), wait=True):
        if (store := _find(folder, key, say)) is None:  # else another process has made it meanwhile
            _clear_stale(folder)
            _check_room(folder.parent, needed)
            with replacing_folder(folder) as temporary:
                _write(temporary, key, produce(), tokens)
            store = ActivationStore(folder, made=True)
    return store


def _check_room(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"the activations take {needed / 1e9:.1f} GB, and the disk of {root} has {free / 1e9:.1f} GB free; name "
            "another folder in FIPO_CACHE, lower text.tokens, or set text.cached to false, which keeps none"
        )


def too_short(total: int, tokens: int) -> UserError:
    """What is said of a text that has fewer content tokens than were asked for."""
    return UserError(f"the text ends after {total} content tokens; {tokens} were asked for: give more or ask less")


def _find(folder: Path, key: dict[str, Any], tell: Callable[[str], None]) -> ActivationStore | None:
    """The store in `folder`; None where there is none, or one of another key, or one that is damaged, which is told."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        store = ActivationStore(folder)
    except UserError as error:
        tell(f"warning: stored activations are harvested again: {error}")
        return None
    if store.manifest["key"] != key:
        return None
    touch(folder / MANIFEST)
    return store


def checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store; one that does not say what ours say, and no more, is a `UserError`."""
    manifest = read_json(folder / MANIFEST)
    file = folder / MANIFEST
    if not isinstance(manifest, dict) or manifest.keys() != {"format", "key", "tokens", "shards"}:
        raise UserError(f"{file} is no manifest of stored activations")
    shards, tokens = manifest["shards"], manifest["tokens"]
    plain = isinstance(shards, list) and type(tokens) is int and 0 < tokens <= len(shards) * SHARD_TOKENS
    if manifest["format"] != FORMAT or not plain or len(shards) != -(-tokens // SHARD_TOKENS):
        raise UserError(f"{file} is damaged: format, tokens and shards do not fit together")
    for number, shard in enumerate(shards):
        expected = {"file": _shard_name(number), "tokens": min(SHARD_TOKENS, tokens - number * SHARD_TOKENS)}
        if not isinstance(shard, dict) or {**shard, "sha256": None} != {**expected, "sha256": None}:
            raise UserError(f"{file} is damaged: shard {number} is not {expected}")
    return manifest


def _shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


@contextlib.contextmanager
def _shard(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, framework="pt") as shard:
            yield shard
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} is damaged: {error}; give the same command again") from error


def _shard_shape(file: Path, tokens: int) -> tuple[str, int, int]:
    """Dtype, layers and width of a shard that holds so many tokens."""
    with _shard(file) as shard:
        if set(shard.keys()) != set(Chunk._fields):
            raise UserError(f"{file} is damaged: it holds other tensors")
        acts, *columns = (shard.get_slice(name) for name in Chunk._fields)
        shape, dtype = acts.get_shape(), acts.get_dtype()
        fits = len(shape) == 3 and shape[0] == tokens and dtype in ("F32", "BF16", "F16")
        if not fits or any((one.get_shape(), one.get_dtype()) != ([tokens], "I64") for one in columns):
            raise UserError(f"{file} is damaged: its tensors have another shape or dtype")
    return dtype, shape[1], shape[2]


def lock_of(folder: Path) -> Path:
    """The file that is locked while the store in `folder`, or what is to be one, in its temporary folder, is made or
    removed."""
    return folder.with_name(f".{folder.name.lstrip('.').partition('.')[0]}.lock")


def _clear_stale(ours: Path) -> None:
    """Remove unfinished stores of processes that were killed: those whose lock nobody holds, or we do."""
    for path in sorted(ours.parent.glob(".*.tmp")):
        if TEMPORARY.fullmatch(path.name):
            lock = lock_of(path)
            with contextlib.suppress(UserError), contextlib.nullcontext() if lock == lock_of(ours) else locked(lock):
                remove(path)


def _write(folder: Path, key: dict[str, Any], chunks: Iterable[Chunk], tokens: int | None) -> None:
    """Write a store: a shard beside the harvest of the next one, at most one at a time."""
    writing: list[Future[dict[str, Any]]] = []
    with ThreadPoolExecutor(max_workers=1) as writer:
        for number, shard in enumerate(_shards(chunks, tokens)):
            if writing:
                writing[-1].result()  # its memory is filled anew from here on
            writing.append(writer.submit(_write_shard, folder / _shard_name(number), shard))
    shards = [one.result() for one in writing]
    total = sum(shard["tokens"] for shard in shards)
    if total == 0:
        raise UserError("the text has no content token: it is empty, or holds special tokens only; give other text")
    if tokens is not None and total < tokens:
        raise too_short(total, tokens)
    write_json(folder / MANIFEST, {"format": FORMAT, "key": key, "tokens": total, "shards": shards})


def _shards(chunks: Iterable[Chunk], tokens: int | None) -> Iterator[Chunk]:
    """Chunks put together, full shards but for the last, at most `tokens` in all. A shard is written over once the
    next one has been taken: there are two, filled in turns, since fresh memory costs as much as the copy."""
    held: list[Chunk] = []
    filled = total = 0
    for chunk in chunks:
        room = len(chunk.text_N) if tokens is None else min(len(chunk.text_N), tokens - total)
        total += room
        if not held:
            shapes = [(part.dtype, (SHARD_TOKENS, *part.shape[1:])) for part in chunk]
            held = [Chunk(*(torch.empty(shape, dtype=dtype) for dtype, shape in shapes)) for _ in range(2)]
        done = 0
        while done < room:
            count = min(room - done, SHARD_TOKENS - filled)
            for whole, part in zip(held[0], chunk, strict=True):
                whole[filled : filled + count] = part[done : done + count]
            done, filled = done + count, filled + count
            if filled == SHARD_TOKENS:
                yield held[0]
                held.reverse()
                filled = 0
        if total == tokens:
            break
    if filled:
        yield Chunk(*(part[:filled] for part in held[0]))


def _write_shard(file: Path, shard: Chunk) -> dict[str, Any]:
    """Write it; gives what the manifest says of it."""
    write_tensors(file, shard._asdict())
    return {"file": file.name, "tokens": len(shard.text_N), "sha256": sha256_file(file)}
