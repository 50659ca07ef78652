"""What becomes of standard output that cannot be written."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from fipo.errors import UserError


@contextlib.contextmanager
def standard_output() -> Iterator[None]:
    """Write out what was printed. Where nobody reads any more that is a `BrokenPipeError`, on a full disk a
    `UserError`; what could not be written is let go of, so that nothing fails on it once more at exit."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go()
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:  # a file's, which has words of its own
            raise
        _let_go()
        raise UserError(f"the standard output cannot be written: {error.strerror}; free space there") from error


def _let_go() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
