"""Running out of memory, on the processor or on the GPU, told as what it is: a circumstance, and what to lower."""

import contextlib
from collections.abc import Iterator

import torch

from fipo.errors import UserError


@contextlib.contextmanager
def enough_memory(phase: str, to_lower: str) -> Iterator[None]:
    """Turn "out of memory" in this phase into a `UserError` that names the settings to lower."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        # On the processor torch has no exception of its own for this.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        said = str(error).partition("If reserved")[0] or "no memory is left"
        raise UserError(f"out of memory in {phase}: {said.strip()}; lower {to_lower}") from error
