"""Compiled loops of the training step for a processor; imported where Numba is installed (`fipo.sparse.native_for`).

What torch does in a dozen passes over [B, M, D] is done here token by token, while all of a token is in the cache of a
core. Rows are bfloat16, as autocast has them, and are added up in float32. Every sum has a fixed order, whatever the
number of threads. The torch code beside each caller is the oracle (tests/test_native.py).

Shapes: B tokens, D model width, F latents, M levels, N pairs, S = B + 1 ends of tokens, C parts of the tokens.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from torch import Tensor

from fipo.threads import in_threads

_TOKENS = 128
"""Tokens of a part."""
_ROWS = 128
"""Rows of a parameter in a part."""
_LINE = 32
"""bfloat16 numbers of 64 bytes, which a cache fetches at a time."""
_AHEAD = 8
"""Pairs whose rows are on their way from memory."""

_index = numba.njit(lambda n: np.uint64(n), inline="always")  # of which the compiler knows that it is not negative


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sums may be taken in any order that the compiler fixes, but infinities and NaN are kept."""
    options = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # there is no place to keep it for the next process
        return numba.njit(function, **options)


@intrinsic
def _wide(_context, _number):
    """The float32 of a bfloat16's bits."""

    def generate(_context, builder, _signature, arguments):
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _narrow(_context, _number):
    """The bits of the bfloat16 that is nearest to a finite float32, of two the even one."""

    def generate(_context, builder, _signature, arguments):
        whole = ir.IntType(32)
        bits = builder.bitcast(arguments[0], whole)
        odd = builder.and_(builder.lshr(bits, ir.Constant(whole, 16)), ir.Constant(whole, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(whole, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(whole, 16)), ir.IntType(16))

    return types.int16(types.float32), generate


@intrinsic
def _fetch(_context, rows, _row, _column):
    """Ask for a place of a matrix, without waiting for it."""

    def generate(context, builder, signature, arguments):
        array = make_array(signature.args[0])(context, builder, arguments[0])
        sizes = (cgutils.unpack_tuple(builder, part) for part in (array.shape, array.strides))
        place = cgutils.get_item_pointer2(
            context, builder, array.data, *sizes, signature.args[0].layout, list(arguments[1:])
        )
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [builder.bitcast(place, byte), *(ir.Constant(number, n) for n in (0, 3, 1))])
        return context.get_dummy_value()

    return types.none(rows, types.intp, types.intp), generate


@_compiled
def _nested_error(
    first, last, values_N, latent_N, starts_S, level_F, dec_FD, bias_D, x_BD, passed, own, whole,
    grad_BMD, x_hat_BD, grad_N, squares_M,
):  # fmt: skip
    levels, width, count = grad_BMD.shape[1], x_BD.shape[1], len(latent_N)
    residual_MD = np.empty((levels, width), np.float32)
    for token in range(first, last):
        start, end = starts_S[token], starts_S[token + 1]
        for level in range(levels):
            for d in range(width):
                residual_MD[level, d] = 0
        for n in range(start, end):
            if n + _AHEAD < count:
                for d in range(0, width, _LINE):
                    _fetch(dec_FD, latent_N[n + _AHEAD], d)
            value, latent = values_N[n], _index(latent_N[n])
            level = _index(level_F[latent])
            for d in range(width):
                residual_MD[level, d] += value * _wide(dec_FD[latent, d])
        for d in range(width):
            residual_MD[0, d] += bias_D[d] - x_BD[token, d]
        for level in range(levels):
            square = np.float32(0)
            if level:
                for d in range(width):
                    residual_MD[level, d] += residual_MD[level - 1, d]
            for d in range(width):
                square += residual_MD[level, d] * residual_MD[level, d]
            squares_M[level] += square
        for d in range(width):
            x_hat_BD[token, d] = x_BD[token, d] + residual_MD[levels - 1, d]
            grad_BMD[token, levels - 1, d] = _narrow((own + whole) * residual_MD[levels - 1, d])
        for level in range(levels - 2, -1, -1):
            for d in range(width):
                residual_MD[level, d] += passed * residual_MD[level + 1, d]
                grad_BMD[token, level, d] = _narrow(
                    own * residual_MD[level, d] + whole * (x_hat_BD[token, d] - x_BD[token, d])
                )
        for n in range(start, end):
            product, latent = np.float32(0), _index(latent_N[n])
            level = _index(level_F[latent])
            for d in range(width):
                product += _wide(grad_BMD[token, level, d]) * _wide(dec_FD[latent, d])
            grad_N[n] = product


def nested_error(
    values_N: Tensor,
    latent_N: Tensor,
    starts_S: Tensor,
    level_F: Tensor,
    dec_FD: Tensor,
    bias_D: Tensor,
    x_BD: Tensor,
    *,
    levels: int,
    stop_gradient: float,
    plain: float,
) -> tuple[Tensor, ...]:
    """Gradient of every part, [B, M, D], in bfloat16, and of every code, [N]; x̂_M, [B, D]; and every level's squared
    error, [M], summed over B and D (`fipo.objective`). Pairs are ordered by token, and begin where `starts_S` says."""
    batch, width = x_BD.shape
    grad_BMD = torch.empty(batch, levels, width, dtype=torch.bfloat16)
    x_hat_BD, grad_N = torch.empty(batch, width), torch.empty(len(values_N))
    parts = range(0, batch, _TOKENS)
    squares_CM = torch.zeros(len(parts), levels)
    scale = 2 / grad_BMD.numel()
    numbers = (np.float32(n) for n in (1 - stop_gradient, scale * (1 - plain), scale * plain * levels))
    given = *map(_numpy, (values_N, latent_N, starts_S, level_F, dec_FD, bias_D, x_BD)), *numbers
    out = tuple(map(_numpy, (grad_BMD, x_hat_BD, grad_N)))
    squares = _numpy(squares_CM)

    def of_part(c: int) -> None:
        _nested_error(parts[c], min(parts[c] + _TOKENS, batch), *given, *out, squares[c])

    in_threads(of_part, range(len(parts)))
    return grad_BMD, grad_N, x_hat_BD, squares_CM.sum(0)


@_compiled
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
    given = tuple(map(_numpy, (unit_FD.grad, unit_FD, along_F)))
    parts = in_threads(lambda row: _squares(row, min(row + _ROWS, rows), *given), range(0, rows, _ROWS))
    return torch.tensor(parts).sum(), along_F


@_compiled
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
    """One step of Adam (Kingma & Ba 2015) on `parameter`, in place, with `numbers_4` = (rate over the first moment's
    correction, root of the second's, what gradients are divided by, 1). With `along_F`, the parameter's rows are of
    unit norm: their gradient loses its part along them, and they are brought to unit norm."""
    assert parameter.is_contiguous() and mean.is_contiguous() and square.is_contiguous()
    matrices = (torch.atleast_2d(tensor) for tensor in (parameter, parameter.grad, mean, square))
    tensors = *matrices, torch.zeros(1) if along_F is None else along_F
    numbers = *numbers_4[:3].tolist(), 1 - betas[0], 1 - betas[1], epsilon
    given = *map(_numpy, tensors), *map(np.float32, numbers), along_F is not None
    rows = len(given[0])
    in_threads(lambda row: _adam(row, min(row + _ROWS, rows), *given), range(0, rows, _ROWS))


def _numpy(tensor: Tensor) -> np.ndarray:
    """The same memory; bfloat16 as its bits."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
