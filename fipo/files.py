"""Files that are either whole or absent.

A writer fills a temporary file beside the target, flushes it to the disk and renames it: a reader, or a run killed
half-way, sees the old file or the new one and nothing between. What a killed writer leaves is a temporary file, whose
name tells.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fipo.errors import UserError

TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
"""Names of temporary files: `.NAME.PROCESS.tmp`."""
SAFETENSORS_TEMPORARY = re.compile(r"\.tmp[0-9A-Za-z]{6}")
"""Names of those that safetensors writes, before it gives a file of ours its temporary name."""
LARGEST_JSON = 64 * 2**20
"""Bytes; a larger JSON file is none of ours."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success it becomes `path`, on failure it is removed and `path` is untouched."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: it appears under its name only once it is complete."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            flush(file)
        put_in_place(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(folder: Path, path: Path) -> None:
    """Have a folder, whose files are on the disk, there under this name, in the place of what was there."""
    flush(folder)
    remove(path)
    os.replace(folder, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Have the system put a file's content, or a folder's list of names, on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_temporaries(folder: Path, *, of_the_dead: bool = False) -> None:
    """Remove what killed writers left in a folder and those below it. Where others may be writing as well
    (`of_the_dead`): only what belongs to a process that is no more here, and that none has touched for an hour, since
    on another machine or in another container its number may be that of a writer."""
    for path in sorted(folder.rglob(".*")):
        ours = TEMPORARY.fullmatch(path.name)
        theirs = SAFETENSORS_TEMPORARY.fullmatch(path.name) and path.is_file()
        alive = of_the_dead and ((ours and _lives(int(ours[1]))) or _is_recent(path))
        if (ours or theirs) and not alive:
            remove(path)


def _is_recent(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime < 3600
    return False


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def touch(path: Path) -> None:
    """Say that a file of the cache was used now; nobody minds where that cannot be said."""
    with contextlib.suppress(OSError):
        os.utime(path)


def cannot_write(path: Path, error: OSError) -> UserError:
    """What is said of a disk that is full, or a folder of somebody else's."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}; free space or choose another folder, "
        "then give the same command again"
    )


@contextlib.contextmanager
def writable(folder: Path | None, option: str) -> Iterator[None]:
    """Make the folder and see that it can be written; when the work fails before it wrote anything, take it away.
    `option` is where the user named it; None: nothing is to be written."""
    if folder is None:
        yield
        return
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another {option}") from error
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused, since JSON has no word for them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is a `UserError` that names it. NaN, infinity, a key given twice and more
    than `LARGEST_JSON` bytes are damage."""
    try:
        if Path(path).stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} is larger than {LARGEST_JSON >> 20} MB: no file of ours")
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check its name") from error
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not readable JSON: {error}; restore it, or leave it out") from error


def parse_json(text: str) -> Any:
    """JSON as the standard has it; whatever it does not allow, and half a character, is a `ValueError`."""
    value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_twins)
    if "\\u" in text:
        check_characters(value)
    return value


def check_characters(value: Any) -> None:
    """`ValueError` where plain values hold half a character ("\\ud800"), of which no file can be made."""
    json.dumps(value, ensure_ascii=False, default=str).encode()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is too large")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form: the name under which things are cached."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
