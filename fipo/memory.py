"""The memory of the process: running out of it told as what it is, a circumstance, and what malloc does with it."""

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from fipo.errors import UserError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""


@contextlib.contextmanager
def enough_memory(phase: str, to_lower: str) -> Iterator[None]:
    """Turn "out of memory" in this phase into a `UserError` that names the settings to lower."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        # On the processor torch has no exception of its own for this.
        told = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not told and not any(words in str(error) for words in ("can't allocate memory", "calculation overflowed")):
            raise
        said = str(error).partition("If reserved")[0] or "no memory is left"
        raise UserError(f"out of memory in {phase}: {said.strip()}; lower {to_lower}") from error


def keep_freed() -> None:
    """Let malloc keep freed memory for the next tensors, of any size. GNU's gives those above 32 MB back at once, and a
    step at F = 16,384 then spends a tenth of its time on getting them anew, page by page."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another system's malloc has no such settings
        set_option = ctypes.CDLL(None).mallopt
        set_option(_MMAP_THRESHOLD, 2**30)
        set_option(_TRIM_THRESHOLD, 2**31 - 1)
