"""Norms of gradients and the step of Adam on a GPU, every tensor read and written once (`fipo.update`).

Shapes: D model width, F latents.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def squares(unit_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norm, 0-d, of the gradient of unit rows without its part along each, and the length of that part, [F]."""
    count, width = unit_FD.shape
    squares_F, along_F = torch.empty(2, count, device=unit_FD.device)
    _squares[(count,)](unit_FD.grad.contiguous(), unit_FD, squares_F, along_F, width, **_whole_rows(width))
    return squares_F.sum(), along_F


@triton.jit
def _squares(grads, rows, squares, along, width, BLOCK: tl.constexpr):
    columns, start = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64) * width
    inside = columns < width
    grad = tl.load(grads + start + columns, mask=inside, other=0.0)
    row = tl.load(rows + start + columns, mask=inside, other=0.0)
    part = tl.sum(grad * row)
    left = grad - part * row
    tl.store(squares + tl.program_id(0), tl.sum(left * left))
    tl.store(along + tl.program_id(0), part)


def adam(
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    numbers_4: Tensor,
    betas: tuple[float, float],
    epsilon: float,
    along_F: Tensor | None,
) -> None:
    """One step of Adam (Kingma & Ba 2015) on `parameter`, in place, with `numbers_4` = (rate over the first moment's
    correction, root of the second's, what gradients are divided by, 0 if nothing may change). With `along_F`, the
    parameter's rows are of unit norm: their gradient loses its part along them, and they are brought to unit norm."""
    width = parameter.shape[1] if along_F is not None else parameter.numel()
    block = _whole_rows(width) if along_F is not None else {"BLOCK": 2048, "num_warps": 4}
    given = parameter, parameter.grad.contiguous(), mean, square, numbers_4, numbers_4 if along_F is None else along_F
    grid = (triton.cdiv(parameter.numel(), width if along_F is not None else 2048),)
    size = parameter.numel()
    _adam[grid](*given, size, width, 1 - betas[0], 1 - betas[1], epsilon, UNIT=along_F is not None, **block)


@triton.jit
def _adam(
    values, grads, means, squares, numbers, along, size, width, part, part_square, epsilon,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rate, root, divisor, fine = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    program, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place = program * (width if UNIT else BLOCK) + columns
    inside = columns < tl.where(fine > 0, width, 0) if UNIT else place < tl.where(fine > 0, size, 0)
    value = tl.load(values + place, mask=inside, other=0.0)
    grad = tl.load(grads + place, mask=inside, other=0.0)
    if UNIT:
        grad -= tl.load(along + program) * value
    grad /= divisor
    mean, square = tl.load(means + place, mask=inside, other=0.0), tl.load(squares + place, mask=inside, other=0.0)
    mean += part * (grad - mean)
    square += part_square * (grad * grad - square)
    value -= rate * mean / (tl.sqrt(square) / root + epsilon)
    if UNIT:
        value /= tl.maximum(tl.sqrt(tl.sum(value * value)), 1e-12)
    tl.store(values + place, value, mask=inside)
    tl.store(means + place, mean, mask=inside)
    tl.store(squares + place, square, mask=inside)


def _whole_rows(width: int) -> dict[str, int]:
    """How a program holds a row of this width."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}
