"""Sums over pairs (token, latent) on a GPU: what `fipo.sparse` does with torch elsewhere.

Shapes: D model width, N pairs, R rows, S segments + 1, T slices of D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 256
"""Columns of a program. Columns are the slow axis of a grid: the rows that all programs of a time gather, a slice of a
dictionary, then stay in the GPU's cache."""
_PAIRS = 16
"""Pairs of a program of `row_products`."""


def sum_rows(rows_RD: Tensor, row_N: Tensor, weight_N: Tensor, ends_S: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_n weight_n rows[row_n] over every segment of pairs, summed in float32, [S - 1, D] of type `dtype`."""
    rows_RD, segments, width = rows_RD.contiguous(), len(ends_S) - 1, rows_RD.shape[1]
    out = torch.empty(segments, width, dtype=dtype, device=rows_RD.device)
    grid = (segments, triton.cdiv(width, WIDTH))
    if segments:
        _sum_rows[grid](rows_RD, row_N, weight_N, ends_S, out, width, WIDTH=WIDTH, num_warps=1)
    return out


@triton.jit
def _sum_rows(rows, row_n, weight_n, ends, out, width, WIDTH: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    first, end = tl.load(ends + segment), tl.load(ends + segment + 1)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    n = first
    while n < end:
        for ahead in tl.static_range(8):  # eight loads are under way at a time
            there = n + ahead < end
            row = tl.load(row_n + n + ahead, mask=there, other=0).to(tl.int64)
            weight = tl.load(weight_n + n + ahead, mask=there, other=0.0).to(tl.float32)
            total += weight * tl.load(rows + row * width + columns, mask=inside & there, other=0.0).to(tl.float32)
        n += 8
    tl.store(out + segment * width + columns, total, mask=inside)


def row_products(left_RD: Tensor, left_N: Tensor, right_RD: Tensor, right_N: Tensor) -> Tensor:
    """⟨left[left_n], right[right_n]⟩ of every pair, in float32."""
    count, width = len(left_N), left_RD.shape[1]
    slices = triton.cdiv(width, WIDTH)
    parts_TN = torch.empty(slices, count, device=left_RD.device)
    given = left_RD.contiguous(), left_N, right_RD.contiguous(), right_N, parts_TN
    if count:
        grid = (triton.cdiv(count, _PAIRS), slices)
        _row_products[grid](*given, count, width, WIDTH=WIDTH, PAIRS=_PAIRS)
    return parts_TN.sum(0)


@triton.jit
def _row_products(left, left_n, right, right_n, parts, count, width, WIDTH: tl.constexpr, PAIRS: tl.constexpr):
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = pairs < count
    inside = there[:, None] & (columns < width)[None, :]
    left_rows = tl.load(left_n + pairs, mask=there, other=0).to(tl.int64)
    right_rows = tl.load(right_n + pairs, mask=there, other=0).to(tl.int64)
    own = tl.load(left + left_rows[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(right + right_rows[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(parts + tl.program_id(1).to(tl.int64) * count + pairs, tl.sum(own * other, 1), mask=there)


def reduce_segments(values_N: Tensor, ends_S: Tensor, how: str) -> Tensor:
    """`sum` or `max` (at least 0) of the numbers of every segment, [S - 1]."""
    out = torch.empty(len(ends_S) - 1, device=values_N.device)
    if len(out):
        _reduce_segments[(len(out),)](values_N, ends_S, out, SUM=how == "sum", num_warps=1)
    return out


@triton.jit
def _reduce_segments(values, ends, out, SUM: tl.constexpr):
    segment = tl.program_id(0)
    n, end = tl.load(ends + segment), tl.load(ends + segment + 1)
    result = tl.zeros([32], dtype=tl.float32)
    while n < end:
        places = n + tl.arange(0, 32)
        value = tl.load(values + places, mask=places < end, other=0.0).to(tl.float32)
        result = result + value if SUM else tl.maximum(result, value)
        n += 32
    tl.store(out + segment, tl.sum(result, 0) if SUM else tl.max(result, 0))


def scaled_rows(rows_FD: Tensor, factor_F: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows times factors, rounded once to `dtype`."""
    (count, width), scaled_FD = rows_FD.shape, torch.empty(rows_FD.shape, dtype=dtype, device=rows_FD.device)
    block = triton.next_power_of_2(width)
    _scaled_rows[(count,)](rows_FD.contiguous(), factor_F, scaled_FD, width, BLOCK=block, num_warps=4)
    return scaled_FD


@triton.jit
def _scaled_rows(rows, factors, scaled, width, BLOCK: tl.constexpr):
    columns, start = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64) * width
    row = tl.load(rows + start + columns, mask=columns < width, other=0.0)
    tl.store(scaled + start + columns, row * tl.load(factors + tl.program_id(0)), mask=columns < width)
