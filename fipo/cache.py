"""What lies in the cache of activations and pooled texts, and what of it can go. No tensor is read.

A cache only saves time: whatever is removed is made again by the next command that needs it.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fipo.data.store import MANIFEST, cache_root, checked_manifest, lock_of
from fipo.errors import UserError
from fipo.files import remove
from fipo.lock import locked
from fipo.pooling import POOLED
from fipo.report import make_console

STORE = re.compile("[0-9a-f]{32}")
UNREADABLE, ALL = "unreadable", "all"
"""Names for those that this version cannot read, and for everything."""
HOLDS = {"first": "held-out text", "next": "training text", None: "labelled text"}
"""What a store is of, by the `rows` of its key."""


class Entry(NamedTuple):
    """A store of activations, or all that was pooled."""

    folder: Path
    size: int
    """Bytes."""
    used: float
    """When a command last asked for it, in seconds since 1970."""
    content: str
    """In words; empty where this version cannot read it."""


def entries(root: Path) -> list[Entry]:
    """All that lies in the cache, what was used last first."""
    folders = [path for path in root.glob("*") if STORE.fullmatch(path.name) and path.is_dir()]
    found = [Entry(path, _size(path), _used(path / MANIFEST), _content(path)) for path in folders]
    if (pooled := root / POOLED).is_dir():
        files = list(pooled.iterdir())
        content = f"{len(files):,} files of pooled texts and measures"
        found.append(Entry(pooled, _size(pooled), max(map(_used, files), default=0.0), content))
    return sorted(found, key=lambda entry: -entry.used)


def run(names: Sequence[str]) -> None:
    """List the cache; with `names`, remove those first: entries (or how they begin), `unreadable`, or `all`."""
    from rich.table import Table

    root = cache_root()
    gone = [entry for name in names for entry in _chosen(name, entries(root))]
    for entry in gone:
        _remove(entry.folder)
    table = Table(title=str(root), title_justify="left")
    for column, side in (("name", "left"), ("size", "right"), ("last used", "left"), ("content", "left")):
        table.add_column(column, justify=side)
    left = entries(root)
    for entry in left:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        content = entry.content or f"{UNREADABLE}: of another version, or damaged"
        table.add_row(entry.folder.name[:12], _text(entry.size), day, content)
    console = make_console()
    console.print(table)
    freed = f"; {_text(sum(entry.size for entry in set(gone)))} freed" if names else ""
    console.print(f"{_text(sum(entry.size for entry in left))} in {len(left)} entries{freed}")


def _chosen(name: str, found: Sequence[Entry]) -> list[Entry]:
    if name == ALL:
        return list(found)
    if name == UNREADABLE:
        return [entry for entry in found if not entry.content]
    matches = [entry for entry in found if name and entry.folder.name.startswith(name)]
    if len(matches) != 1:
        raise UserError(
            f"--remove {name} is {'no entry' if not matches else f'{len(matches)} entries'} of {cache_root()}; give a "
            f"name that `fipo cache` lists, {UNREADABLE} or {ALL}"
        )
    return matches


def _remove(folder: Path) -> None:
    """Take the manifest first: what is left of an interrupted removal is no store any more."""
    with locked(lock_of(folder)):
        remove(folder / MANIFEST)
        remove(folder)
    if folder.exists():
        raise UserError(f"{folder} cannot be removed; check who owns it")


def _content(folder: Path) -> str:
    try:
        manifest = checked_manifest(folder)
    except UserError:
        return ""
    key: dict[str, Any] = manifest["key"]
    layers = ", ".join(map(str, key.get("layers", ())))
    return (
        f"{manifest['tokens']:,} tokens of {HOLDS.get(key.get('rows'), 'text')}; layers {layers}, context "
        f"{key.get('context')}, {str(key.get('dtype')).removeprefix('torch.')}, model {str(key.get('model'))[:8]}"
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _used(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0


def _text(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
