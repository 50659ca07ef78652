"""One process at a time: a lock file held by the kernel, which lets go of it when the process ends, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fipo.errors import UserError
from fipo.progress import say


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which is gone afterwards. While another process holds it: wait, or a `UserError`."""
    opened = _acquire(path, wait)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: who waits for this file then sees that it is no longer the one
        os.close(opened)


def _acquire(path: Path, wait: bool) -> int:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from error
        try:
            _lock(opened, path, wait)
            if _is_still(path, opened):
                return opened
        except BlockingIOError as error:
            os.close(opened)
            raise UserError(
                f"another process is working in {path.parent}; wait until it ends, or choose another folder"
            ) from error
        except OSError as error:
            os.close(opened)
            raise UserError(
                f"cannot lock {path}: {error.strerror}; choose a folder on a disk with file locks"
            ) from error
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)


def _lock(opened: int, path: Path, wait: bool) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        say(f"waiting for another process that holds {path}")
        fcntl.flock(opened, fcntl.LOCK_EX)


def _is_still(path: Path, opened: int) -> bool:
    """Does the name still mean the file that was opened? The holder before us removed his."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(opened))
    except FileNotFoundError:
        return False
