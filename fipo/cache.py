"""What lies in the cache of activations and pooled texts, and what of it can go. No tensor is read.

A cache only saves time: whatever is removed is made again by the next command that needs it. Whatever lies there must
not keep this command from listing and removing the rest.
"""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fipo.data.shards import MANIFEST, checked_manifest
from fipo.data.store import UNFINISHED, cache_root, lock_of
from fipo.errors import UserError
from fipo.files import remove
from fipo.lock import locked
from fipo.pooling import POOLED
from fipo.report import make_console

STORE = re.compile("[0-9a-f]{32}")
OF_A_STORE = re.compile(r"\.[0-9a-f]{32}\.")
"""How the name of one begins that is not finished (of before: ends in .tmp)."""
SHOWN, SHORTEST = 12, 8
"""Characters of a name in the list, and those that `--remove` asks for at least."""
UNREADABLE, ALL = "unreadable", "all"
"""Names for what this version cannot read, and for everything."""
HOLDS = {"first": "held-out text", "next": "training text", None: "labelled text"}
"""What a store is of, by the `rows` of its key."""


class Entry(NamedTuple):
    """A store of activations, what is left of one that was never finished, or all that was pooled."""

    folder: Path
    size: int
    """Bytes."""
    used: float
    """When a command last used it, in seconds since 1970; 0 where that is not known."""
    content: str
    """In words."""
    readable: bool = True
    """By this version."""

    @property
    def name(self) -> str:
        """What it is called in the list."""
        return self.folder.name.lstrip(".")


def entries(root: Path) -> list[Entry]:
    """All that lies in the cache, what was used last first."""
    found = []
    for folder in _inside(root):
        if STORE.fullmatch(folder.name):
            content = _content(folder)
            told = content or f"{UNREADABLE}: of another version, or damaged"
            found.append(Entry(folder, _size(folder), _changed(folder / MANIFEST), told, bool(content)))
        elif folder.name.endswith((UNFINISHED, ".tmp")) and OF_A_STORE.match(folder.name):
            found.append(Entry(folder, _size(folder), _changed(folder), f"{UNREADABLE}: not finished", False))
        elif folder.name == POOLED:
            files = _inside(folder)
            used = max(map(_changed, files), default=0.0)
            found.append(Entry(folder, _size(folder), used, f"pooled texts and measures, {len(files):,} files"))
    return sorted(found, key=lambda entry: -entry.used)


def run(names: Sequence[str]) -> None:
    """List the cache; with `names`, remove those first: entries (or how they begin), `unreadable`, or `all`."""
    from rich.table import Table
    from rich.text import Text

    root = cache_root()
    before = entries(root)
    gone = list(dict.fromkeys(entry for name in names for entry in _chosen(name, before)))
    for entry in gone:
        _remove(entry)
    left = entries(root) if gone else before
    table = Table(title=Text(str(root)), title_justify="left")
    for column, side in (("name", "left"), ("size", "right"), ("last used", "left"), ("content", "left")):
        table.add_column(column, justify=side)
    for entry in left:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used)) if entry.used else "-"
        table.add_row(entry.name[:SHOWN], _text(entry.size), day, Text(entry.content))
    console = make_console()
    console.print(table)
    freed = f"; {_text(sum(entry.size for entry in gone))} freed" if names else ""
    console.print(f"{_text(sum(entry.size for entry in left))} in {len(left)} entries{freed}")


def _chosen(name: str, found: Sequence[Entry]) -> list[Entry]:
    if name == ALL:
        return list(found)
    if name == UNREADABLE:
        return [entry for entry in found if not entry.readable]
    matches = [entry for entry in found if entry.name.startswith(name) and len(name) >= min(SHORTEST, len(entry.name))]
    if len(matches) != 1:
        raise UserError(
            f"--remove {name} is {'no entry' if not matches else f'{len(matches)} entries'} of {cache_root()}; give a "
            f"name that `fipo cache` lists, {UNREADABLE} or {ALL}"
        )
    return matches


def _remove(entry: Entry) -> None:
    """The manifest goes first: what is left of an interrupted removal is no store any more. Of a link, what it leads
    to."""
    with locked(lock_of(entry.folder)):
        remove(entry.folder / MANIFEST)
        remove(entry.folder.resolve())
        if entry.folder.is_symlink():
            entry.folder.unlink()
    if os.path.lexists(entry.folder):
        raise UserError(f"{entry.folder} cannot be removed; check who owns it")


def _content(folder: Path) -> str:
    """What a store holds, in words; empty where this version cannot read it."""
    try:
        manifest = checked_manifest(folder)
    except (UserError, OSError):
        return ""
    key = manifest["key"]
    rows = key.get("rows") if isinstance(key, dict) else ""
    if not isinstance(rows, str | None) or rows not in HOLDS:
        return ""
    context, dtype, model = key.get("context"), str(key.get("dtype")).removeprefix("torch."), str(key.get("model"))[:8]
    told = (
        f"{manifest['tokens']:,} tokens of {HOLDS[rows]}; layers {str(key.get('layers')).strip('[]')}, context "
        f"{context}, {dtype}, model {model}"
    )
    return ascii(told)[1:-1]  # a hostile key may hold anything


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, as far as they can be seen; they may be going away."""
    return sum(found.st_size for file in _inside(folder) if (found := _stat(file)) is not None)


def _changed(file: Path) -> float:
    found = _stat(file)
    return 0.0 if found is None else found.st_mtime


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None


def _text(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
