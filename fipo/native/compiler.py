"""What the compiled loops have in common: how they are compiled, and what of a tensor they see."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

index = numba.njit(lambda n: np.uint64(n), inline="always")  # of which the compiler knows that it is not negative


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sums may be taken in any order that the compiler fixes, but infinities and NaN are kept."""
    options = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # there is no place to keep it for the next process
        return numba.njit(function, **options)


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The same memory; bfloat16 as its bits."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
