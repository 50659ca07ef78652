"""The norm of gradients and Adam, with unit rows, in one pass each (`fipo.update`).

Shapes: D model width, F latents.
"""

import numpy as np
import torch
from torch import Tensor

from fipo.native.compiler import as_numpy, compiled
from fipo.threads import in_threads

_ROWS = 128
"""Rows of a parameter in a part."""


@compiled
def _squares(first, last, grad_FD, unit_FD, along_F):
    total = np.float32(0)
    for row in range(first, last):
        part, square = np.float32(0), np.float32(0)
        for d in range(unit_FD.shape[1]):
            part += grad_FD[row, d] * unit_FD[row, d]
        for d in range(unit_FD.shape[1]):
            left = grad_FD[row, d] - part * unit_FD[row, d]
            square += left * left
        along_F[row] = part
        total += square
    return total


def squares(unit_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norm, 0-d, of the gradient of unit rows without its part along each, and the length of that part, [F]."""
    rows, along_F = len(unit_FD), torch.empty(len(unit_FD))
    given = tuple(map(as_numpy, (unit_FD.grad, unit_FD, along_F)))
    parts = in_threads(lambda row: _squares(row, min(row + _ROWS, rows), *given), range(0, rows, _ROWS))
    return torch.tensor(parts).sum(), along_F


@compiled
def _adam(
    first, last, value_FD, grad_FD, mean_FD, square_FD, along_F,
    rate, root, divisor, part, part_square, epsilon, unit,
):  # fmt: skip
    for row in range(first, last):
        along = along_F[row] if unit else np.float32(0)
        norm = np.float32(0)
        for d in range(value_FD.shape[1]):
            value = value_FD[row, d]
            grad = (grad_FD[row, d] - along * value) / divisor
            mean_FD[row, d] += part * (grad - mean_FD[row, d])
            square_FD[row, d] += part_square * (grad * grad - square_FD[row, d])
            value -= rate * mean_FD[row, d] / (np.sqrt(square_FD[row, d]) / root + epsilon)
            value_FD[row, d] = value
            norm += value * value
        if unit:
            norm = max(np.sqrt(norm), np.float32(1e-12))
            for d in range(value_FD.shape[1]):
                value_FD[row, d] /= norm


def adam(
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    numbers_4: Tensor,
    betas: tuple[float, float],
    epsilon: float,
    along_F: Tensor | None,
) -> None:
    """The same as `fipo.kernels.adam.adam`, on a processor, where a step that may change nothing is not begun: the last
    of `numbers_4` is 1."""
    matrices = (torch.atleast_2d(tensor) for tensor in (parameter, parameter.grad, mean, square))
    tensors = *matrices, torch.zeros(1) if along_F is None else along_F
    numbers = *numbers_4[:3].tolist(), 1 - betas[0], 1 - betas[1], epsilon
    given = *map(as_numpy, tensors), *map(np.float32, numbers), along_F is not None
    rows = len(given[0])
    in_threads(lambda row: _adam(row, min(row + _ROWS, rows), *given), range(0, rows, _ROWS))
