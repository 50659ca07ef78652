"""Decoding, levels and the gradients of codes, token by token (`fipo.reconstruction`).

Rows are bfloat16, as autocast has them, and are added up in float32. Shapes: B tokens, D model width, F latents, M
levels, N pairs, S = B + 1 starts of tokens, C parts of the tokens.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from torch import Tensor

from fipo.native.compiler import as_numpy, compiled, index
from fipo.threads import in_threads

_TOKENS = 128
"""Tokens of a part."""
_LINE = 32
"""bfloat16 numbers of 64 bytes, which a cache fetches at a time."""
_AHEAD = 8
"""Pairs whose rows are on their way from memory."""


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


@intrinsic
def _wide_vectors(_context):
    """In the function that calls it the compiler may use vectors of 512 bits, where the processor has them."""

    def generate(context, builder, _signature, _arguments):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite knows no attribute with a value
        return context.get_dummy_value()

    return types.none(), generate


@compiled
def _nested_error(
    first, last, values_N, latent_N, starts_S, level_F, dec_FD, bias_D, x_BD, passed, own, whole, power, least,
    grad_BMD, left_BD, grad_N, grad_D, squares_M, weight_1,
):  # fmt: skip
    _wide_vectors()
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
            value, latent = values_N[n], index(latent_N[n])
            level = index(level_F[latent])
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
        weight = (square / np.float32(width) + least) ** power if power else np.float32(1)
        weight_1[0] += weight
        levelled, unlevelled = weight * own, weight * whole
        for d in range(width):
            left_BD[token, d] = -residual_MD[levels - 1, d]
            grad_BMD[token, levels - 1, d] = _narrow((levelled + unlevelled) * residual_MD[levels - 1, d])
        for level in range(levels - 2, -1, -1):
            for d in range(width):
                residual_MD[level, d] += passed * residual_MD[level + 1, d]
                grad_BMD[token, level, d] = _narrow(levelled * residual_MD[level, d] - unlevelled * left_BD[token, d])
        for d in range(width):
            grad_D[d] += _wide(grad_BMD[token, 0, d])
        for n in range(start, end):
            product, latent = np.float32(0), index(latent_N[n])
            level = index(level_F[latent])
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
    stop_gradient: float | Tensor,
    plain: float,
    power: float = 0.0,
    least: float = 0.0,
) -> tuple[Tensor, ...]:
    """Gradient of every part, [B, M, D], in bfloat16, of every code, [N], and of the bias, [D]; x - x̂_M, [B, D]; every
    level's squared error, [M], summed over B and D; and a divisor, 0-d: a code over it is what its pair weighs where
    the first of these are summed to the gradient of a decoder row. Tokens weigh (error + least)^power in the gradients,
    over the mean of that, where `error` is what the last level leaves, averaged over D (`fipo.reconstruction`). Pairs
    are ordered by token, and begin where `starts_S` says."""
    batch, width = x_BD.shape
    grad_BMD = torch.empty(batch, levels, width, dtype=torch.bfloat16)
    left_BD, grad_N = torch.empty(batch, width), torch.empty(len(values_N))
    parts = range(0, batch, _TOKENS)
    grad_CD, squares_CM = torch.zeros(len(parts), width), torch.zeros(len(parts), levels)
    weight_C1 = torch.zeros(len(parts), 1)
    scale = 2 / grad_BMD.numel()
    numbers = (1 - float(stop_gradient), scale * (1 - plain), scale * plain * levels, power, least)
    numbers = (np.float32(n) for n in numbers)
    given = *map(as_numpy, (values_N, latent_N, starts_S, level_F, dec_FD, bias_D, x_BD)), *numbers
    out = tuple(map(as_numpy, (grad_BMD, left_BD, grad_N)))
    sums = tuple(map(as_numpy, (grad_CD, squares_CM, weight_C1)))

    def of_part(c: int) -> None:
        _nested_error(parts[c], min(parts[c] + _TOKENS, batch), *given, *out, *(of_parts[c] for of_parts in sums))

    in_threads(of_part, range(len(parts)))
    weight = weight_C1.sum() / batch
    return grad_BMD, grad_N / weight, grad_CD.sum(0) / weight, left_BD, squares_CM.sum(0), weight
