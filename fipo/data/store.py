"""Activations on disk, in shards (fipo.data.shards), found again under a key that names all they depend on.

A store appears under its name only when it is complete; of two processes that need the same one, the second waits. A
harvest that was stopped or killed goes on after its last whole shard. On opening, every shard is checked against the
manifest and its SHA-256; a damaged store is dropped and harvested again. Shapes: N tokens, L layers, D model width.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fipo.checkpoint import load_tensors
from fipo.data import shards
from fipo.data.harvest import Chunk
from fipo.data.shards import MANIFEST
from fipo.errors import UserError
from fipo.files import cannot_write, put_in_place, remove, sha256_json, touch
from fipo.lock import locked
from fipo.progress import say

UNFINISHED = ".unfinished"
"""How the name of a store ends that is being made, or was when its process was stopped."""


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

    def __init__(self, folder: Path, *, hashed: bool = True, made: bool = False) -> None:
        """Open and check; a missing or damaged store is a `UserError`. Not `hashed`: by its looks alone. `made`: by
        this process, just now, from the first token on."""
        self.folder, self.made = folder, made
        self.manifest = shards.checked_manifest(folder)
        self.tokens: int = self.manifest["tokens"]
        self.order: str = self.manifest["order"]
        self._files = [folder / shard["file"] for shard in self.manifest["shards"]]
        if len({shards.checked_shard(folder, shard, hashed=hashed) for shard in self.manifest["shards"]}) > 1:
            raise UserError(f"{folder} is damaged: its shards differ in layers, width or dtype")

    def read(self, start: int, count: int) -> Tensor:
        """Activations [count, L, D] from token `start`; never past the end."""
        pieces, size = [], shards.SHARD_TOKENS
        for number in range(start // size, -(-(start + count) // size)):
            first, last = max(0, start - number * size), min(size, start + count - number * size)
            # Opened anew each time: a mapped file counts as this process's memory for as long as it stays open.
            with shards.opened(self._files[number]) as shard:
                pieces.append(shard.get_slice("acts_NLD")[first:last].clone())
        return torch.cat(pieces)

    def gather(self, places_N: Tensor) -> Tensor:
        """Activations at any places, [N, L, D], in the order given."""
        shard_N, row_N = places_N // shards.SHARD_TOKENS, places_N % shards.SHARD_TOKENS
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
    key: dict[str, Any],
    produce: Callable[[int], Iterable[Chunk]],
    tokens: int | None,
    needed: int = 0,
    order: str = "",
) -> ActivationStore:
    """The store of this key, made where there is none (or a damaged one) by `produce`, which is given how many tokens
    are there already and gives those that follow.

    `tokens`: how many to keep, or None for all that come; `needed`: bytes that the disk must have free, or `UserError`
    before anything is harvested; `order`: names what the order of the tokens depends on beside the key. Any will do,
    but a harvest goes on in its own alone.
    """
    folder = cache_root() / sha256_json({"format": shards.FORMAT, **key})[:32]
    if (store := _find(folder, key, lambda _: None)) is not None:  # what is damaged is told below, once
        if lock_of(folder).exists():  # a killed process left it, or another is about to remove it
            with contextlib.suppress(UserError), locked(lock_of(folder)):
                pass
        return store
    with locked(lock_of(folder), wait=True):
        if (store := _find(folder, key, say)) is None:  # else another process has made it meanwhile
            made = _harvest(folder, key, produce, tokens, needed, order)
            store = ActivationStore(folder, hashed=False, made=made)  # hashes were taken of what was written
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


def lock_of(folder: Path) -> Path:
    """The file that is locked while the store in `folder`, or what is to be one, in its temporary folder, is made or
    removed."""
    return folder.with_name(f".{folder.name.lstrip('.').partition('.')[0]}.lock")


def _harvest(
    folder: Path,
    key: dict[str, Any],
    produce: Callable[[int], Iterable[Chunk]],
    tokens: int | None,
    needed: int,
    order: str,
) -> bool:
    """Make the store beside its place, from where a harvest before it ended, and put it there once it is whole. What is
    stopped, is killed or fails leaves the shards that are whole. Did it begin with nothing?"""
    beside = folder.with_name(f".{folder.name}.{order}{UNFINISHED}")
    if beside.is_symlink() or beside.is_file():
        remove(beside)
    written = _whole_shards(beside, key)
    names = {MANIFEST, *(shard["file"] for shard in written)} if written else set()
    others = [other for other in folder.parent.glob(f".{folder.name}.*{UNFINISHED}") if other != beside]
    for left in [*others, *(file for file in beside.glob("*") if file.name not in names)]:
        remove(left)
    done = shards.tokens_of(written)
    if done:
        say(f"the harvest of before goes on after {done:,} tokens")
    _check_room(folder.parent, needed - sum((beside / shard["file"]).stat().st_size for shard in written))
    try:
        beside.mkdir(parents=True, exist_ok=True)
        _write(beside, key, order, produce(done), tokens, written)
        put_in_place(beside, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        if not (beside / MANIFEST).exists():
            remove(beside)
    return done == 0


def _whole_shards(beside: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """What the manifest says of the first shards of an unfinished store: those that are undamaged."""
    written: list[dict[str, Any]] = []
    with contextlib.suppress(UserError):
        manifest = shards.checked_manifest(beside)
        for shard in manifest["shards"] if manifest["key"] == key else []:
            shards.checked_shard(beside, shard)
            written.append(shard)
    return written


def _write(
    folder: Path,
    key: dict[str, Any],
    order: str,
    chunks: Iterable[Chunk],
    tokens: int | None,
    written: list[dict[str, Any]],
) -> None:
    """Write what follows the shards that are `written`: each beside the harvest of the next one, at most one at a
    time."""

    def write(shard: Chunk) -> None:
        written.append(shards.write_shard(folder, len(written), shard))
        shards.write_manifest(folder, key, order, written)

    done = shards.tokens_of(written)
    writing: Future[None] | None = None
    with ThreadPoolExecutor(max_workers=1) as writer:
        for shard in _filled(chunks, None if tokens is None else tokens - done):
            if writing is not None:
                writing.result()  # its memory is filled anew from here on
            writing = writer.submit(write, shard)
    if writing is not None:
        writing.result()
    total = shards.tokens_of(written)
    if tokens is not None and 0 < total < tokens:
        remove(folder / MANIFEST)  # there will never be more of it
        raise too_short(total, tokens)
    if total == 0:
        raise UserError("the text has no content token: it is empty, or holds special tokens only; give other text")


def _filled(chunks: Iterable[Chunk], tokens: int | None) -> Iterator[Chunk]:
    """Chunks put together, full shards but for the last, at most `tokens` in all. A shard is written over once the
    next one has been taken: there are two, filled in turns, since fresh memory costs as much as the copy."""
    held: list[Chunk] = []
    size, filled, total = shards.SHARD_TOKENS, 0, 0
    for chunk in chunks:
        room = len(chunk.text_N) if tokens is None else min(len(chunk.text_N), tokens - total)
        total += room
        if not held:
            shapes = [(part.dtype, (size, *part.shape[1:])) for part in chunk]
            held = [Chunk(*(torch.empty(shape, dtype=dtype) for dtype, shape in shapes)) for _ in range(2)]
        done = 0
        while done < room:
            count = min(room - done, size - filled)
            for whole, part in zip(held[0], chunk, strict=True):
                whole[filled : filled + count] = part[done : done + count]
            done, filled = done + count, filled + count
            if filled == size:
                yield held[0]
                held.reverse()
                filled = 0
        if total == tokens:
            break
    if filled:
        yield Chunk(*(part[:filled] for part in held[0]))
