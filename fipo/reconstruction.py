"""L_rec: the levels of the nested reconstruction, their errors and the gradient of these (METHOD 4b).

One pass forward and one backward over the levels, with the same result in plain torch, in compiled loops
(`fipo.native`, token by token) and in Triton kernels (`fipo.kernels`). Shapes: B tokens, D model width, F latents, M
levels, N active codes, S ends of segments.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fipo.decoding import decode, decode_levels
from fipo.sparse import Codes, kernels_for, native_for, sum_rows, working

_TOKENS = 256
"""Tokens whose residuals of all levels stay in the cache of a core."""
_LEAST_ERROR = 0.02
"""Added to every token's error (mean squared, standardised): those far below it count alike."""


def reconstruction_error(
    codes: Codes | Tensor,
    dec_FD: Tensor,
    bias_D: Tensor,
    x_BD: Tensor,
    level_F: Tensor | None = None,
    levels: int = 1,
    stop_gradient: float | Tensor = 0.0,
    plain: float = 0.0,
    robust: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`nested_error` of the parts that codes make; without `level_F` all are one."""
    ours = kernels_for(x_BD) or native_for(working(dec_FD[:0]), torch.bfloat16)
    if ours and isinstance(codes, Codes):
        order = level_F, levels, stop_gradient, plain, robust
        return _PairsError.apply(codes.values_N, dec_FD, bias_D, x_BD, codes, *order, ours)
    parts_BMD = decode(codes, dec_FD)[:, None] if level_F is None else decode_levels(codes, dec_FD, level_F, levels)
    return nested_error(parts_BMD, bias_D, x_BD, stop_gradient, plain, robust)


def token_weights(residual_BD: Tensor, robust: float) -> Tensor:
    """How much each token counts in the gradient of L_rec, [B], of mean 1: what the last level leaves of it, to the
    power -robust / 2. With 1 tokens pull about equally hard, whatever their error, as by its norm in place of its
    square; with 2 the harder the better they are explained, as by its logarithm."""
    weight_B = (residual_BD.pow(2).mean(1) + _LEAST_ERROR).pow(-robust / 2)
    return weight_B / weight_B.mean()


class _PairsError(torch.autograd.Function):
    """Both at once (fipo.native, fipo.kernels); of the parts no more than their gradients is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        values_N: Tensor,
        dec_FD: Tensor,
        bias_D: Tensor,
        x_BD: Tensor,
        codes: Codes,
        level_F: Tensor | None,
        levels: int,
        stop_gradient: float | Tensor,
        plain: float,
        robust: float,
        ours: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        level_F = torch.zeros(len(dec_FD), dtype=torch.int64, device=x_BD.device) if level_F is None else level_F
        grad_BMD, grad_N, grad_D, residual_BD, squares_M, divisor = ours.nested_error(
            values_N, codes.latent_N, codes.starts_S, level_F, working(dec_FD), bias_D, x_BD,
            levels=levels, stop_gradient=stop_gradient, plain=plain, power=-robust / 2, least=_LEAST_ERROR,
        )  # fmt: skip
        row_N = torch.add(level_F.index_select(0, codes.latent_N), codes.token_N, alpha=levels)
        row_N, values_N = (sorted_by.index_select(0, codes.order_N) for sorted_by in (row_N, values_N / divisor))
        ctx.save_for_backward(grad_BMD, grad_N, grad_D, row_N, values_N, codes.ends_S)
        ctx.dtype = dec_FD.dtype
        ctx.mark_non_differentiable(residual_BD)
        ctx.set_materialize_grads(False)
        errors_M = squares_M / x_BD.numel()
        return torch.lerp(errors_M.mean(), errors_M[-1], plain), residual_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        grad_BMD, grad_N, grad_D, row_N, weight_N, ends_S = ctx.saved_tensors
        grad_FD = sum_rows(grad_BMD.flatten(0, 1), row_N, weight_N * grad, ends_S, ctx.dtype).to(ctx.dtype)
        return grad_N * grad, grad_FD, (grad_D * grad).to(ctx.dtype), *[None] * 8


def nested_error(
    parts_BMD: Tensor,
    bias_D: Tensor,
    x_BD: Tensor,
    stop_gradient: float | Tensor = 0.0,
    plain: float = 0.0,
    robust: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """L_rec, the mean over the levels of their squared errors, and what the last one leaves, x - x̂_M [B, D], without a
    gradient (METHOD 4b).

        x̂_m = s·sg(x̂_{m-1}) + (1-s)·x̂_{m-1} + part_m

    The values do not depend on s; the gradient does: with s = 0 later levels pull at earlier latents (Matryoshka,
    Bussmann et al. 2025), with s = 1 each level learns only what the more important ones left. The bias belongs to the
    first level. Of weight `plain` is the squared error of x̂_M without any stop-gradient, beside that mean. In the
    gradient tokens count by their `token_weights`, held constant, where `robust` is above 0.
    """
    return _NestedError.apply(parts_BMD, bias_D, x_BD, stop_gradient, plain, robust)


class _NestedError(torch.autograd.Function):
    """With r_m = x̂_m - x, the gradient of part m is 2 / (M B D) times a sum over the later levels, taken backwards:

        g_m = (1 - plain)·h_m + plain·M·r_M,      h_M = r_M,      h_m = r_m + (1-s)·h_{m+1}

    Both passes over the levels are done on few tokens at a time, which stay in the cache. The residuals are kept in
    units in which they are the gradient: c r with c = 2 / (M B D).
    """

    @staticmethod
    def forward(
        ctx: Any,
        parts_BMD: Tensor,
        bias_D: Tensor,
        x_BD: Tensor,
        stop_gradient: float | Tensor,
        plain: float,
        robust: float,
    ) -> tuple[Tensor, Tensor]:
        grad_BMD, residual_BD, squares_M = _NestedError.passes(parts_BMD, bias_D, x_BD, stop_gradient, plain)
        if robust:
            grad_BMD.mul_(token_weights(residual_BD, robust).to(grad_BMD.dtype)[:, None, None])
        ctx.save_for_backward(grad_BMD)
        ctx.mark_non_differentiable(residual_BD)
        ctx.set_materialize_grads(False)
        errors_M = squares_M / x_BD.numel()
        return torch.lerp(errors_M.mean(), errors_M[-1], plain), residual_BD

    @staticmethod
    def passes(
        parts_BMD: Tensor, bias_D: Tensor, x_BD: Tensor, stop_gradient: float | Tensor, plain: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """g, x - x̂_M and every level's squared error, summed over B and D, [M]."""
        levels, on_gpu = range(parts_BMD.shape[1]), x_BD.is_cuda
        passed = 1 - (stop_gradient if on_gpu else float(stop_gradient))  # to ask a GPU is to wait for it
        grad_BMD, left_BD = torch.empty_like(parts_BMD), torch.empty_like(x_BD)
        squares_M, c = x_BD.new_zeros(len(levels)), 2 / parts_BMD.numel()
        whole = (parts_BMD, x_BD, grad_BMD, left_BD)
        tokens = max(1, len(x_BD)) if on_gpu else _TOKENS
        for part_NMD, x_ND, grad_NMD, left_ND in zip(*(rows.split(tokens) for rows in whole), strict=True):
            residual_MND = x_BD.new_empty(len(levels), *x_ND.shape)
            last_ND = torch.sub(c * bias_D, x_ND, alpha=c)
            for level in levels:
                last_ND = torch.add(last_ND, part_NMD[:, level], alpha=c, out=residual_MND[level])
            torch.mul(last_ND, -1 / c, out=left_ND)
            squares_M += torch.linalg.vector_norm(residual_MND, dim=(1, 2)).pow(2)
            plain_ND = len(levels) * plain * last_ND if plain else None
            for level in levels[-2::-1]:
                if on_gpu:
                    residual_MND[level] += passed * residual_MND[level + 1]
                else:
                    residual_MND[level].add_(residual_MND[level + 1], alpha=passed)
            if plain_ND is not None:
                residual_MND.mul_(1 - plain).add_(plain_ND)
            grad_NMD.copy_(residual_MND.transpose(0, 1))
        return grad_BMD, left_BD, squares_M / c**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        (grad_BMD,) = ctx.saved_tensors
        if grad.is_cuda or grad != 1:  # a step's L_rec has weight 1; to ask a GPU is to wait for it
            grad_BMD = grad_BMD * grad
        return grad_BMD, grad_BMD[:, 0].sum(0, dtype=grad.dtype), None, None, None, None
