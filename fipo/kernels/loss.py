"""The nested reconstruction error and its gradient on a GPU, in one pass (`fipo.reconstruction`).

Shapes: B tokens, D model width, M levels, T slices of D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fipo.kernels.pairs import WIDTH


def nested_error(
    parts_BMD: Tensor, bias_D: Tensor, x_BD: Tensor, hold: float | Tensor, plain: float
) -> tuple[Tensor, ...]:
    """Gradient of every part, [B, M, D], x - x̂_M, [B, D], and every level's squared error, [M], summed over B and D; s
    is `hold` (`fipo.reconstruction`)."""
    batch, levels, width = parts_BMD.shape
    grad_BMD, left_BD = torch.empty_like(parts_BMD), torch.empty_like(x_BD)
    slices = triton.cdiv(width, WIDTH)
    squares_BTM = torch.empty(batch, slices, levels, device=x_BD.device)
    if isinstance(hold, Tensor):
        hold = hold.to(x_BD.device, torch.float32)
    else:  # filled there: a copy from the processor's memory cannot be recorded (fipo.graphs)
        hold = torch.full((), hold, dtype=torch.float32, device=x_BD.device)
    given = parts_BMD.contiguous(), bias_D, x_BD.contiguous(), hold, grad_BMD, left_BD, squares_BTM
    numbers = width, 2 / parts_BMD.numel(), float(plain)
    _nested_error[(batch, slices)](*given, *numbers, LEVELS=levels, WIDTH=WIDTH, num_warps=2)
    return grad_BMD, left_BD, squares_BTM.sum((0, 1))


@triton.jit
def _nested_error(
    parts, bias, x, hold, grad, left, squares, width, scale, plain, LEVELS: tl.constexpr, WIDTH: tl.constexpr
):
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    target = tl.load(x + token * width + columns, mask=inside, other=0.0)
    residual = tl.load(bias + columns, mask=inside, other=0.0) - target
    first = parts + token * LEVELS * width + columns
    tally = squares + (token * tl.num_programs(1) + tl.program_id(1)) * LEVELS
    for level in tl.static_range(LEVELS):
        residual += tl.load(first + level * width, mask=inside, other=0.0).to(tl.float32)
        tl.store(tally + level, tl.sum(residual * residual))
    tl.store(left + token * width + columns, -residual, mask=inside)
    whole, passed, share = plain * LEVELS * residual, 1 - tl.load(hold), 1 - plain
    pull = residual
    grads = grad + token * LEVELS * width + columns
    tl.store(grads + (LEVELS - 1) * width, scale * (share * pull + whole), mask=inside)
    for back in tl.static_range(1, LEVELS):  # from the last level but one to the first
        residual -= tl.load(first + (LEVELS - back) * width, mask=inside, other=0.0).to(tl.float32)
        pull = residual + passed * pull
        tl.store(grads + (LEVELS - 1 - back) * width, scale * (share * pull + whole), mask=inside)


def scale(rows: Tensor, factor: Tensor) -> None:
    """Multiply by a number, in place, where it is not 1."""
    count = rows.numel()
    _scale[(triton.cdiv(count, 4096),)](rows, factor, count, BLOCK=4096)


@triton.jit
def _scale(values, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        tl.store(values + place, by * tl.load(values + place, mask=inside, other=0.0).to(tl.float32), mask=inside)
