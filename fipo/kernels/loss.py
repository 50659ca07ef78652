"""The nested reconstruction error and its gradient on a GPU (`fipo.reconstruction`).

Shapes: B tokens, D model width, F latents, M levels, N pairs, S = B + 1 starts of tokens, R = B M + 1 of their levels,
C of parts of the batch, T slices of D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fipo.kernels.pairs import WIDTH, row_products, sum_rows
from fipo.sparse import grouped

_TOKENS = 32
"""Tokens whose gradients of the bias are added up by one program."""


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
    """As `fipo.native.nested_error`, but that tokens do not weigh in the gradient of a part: the divisor, one number a
    pair, has their weights in it. Pairs behind the last start belong to no token."""
    x_BD, (batch, width), device = x_BD.contiguous(), x_BD.shape, x_BD.device
    token_N = torch.searchsorted(starts_S, torch.arange(len(values_N), device=device), right=True) - 1
    bag_N = (token_N * levels + level_F[latent_N]).clamp_max(batch * levels)  # one for all that belong to no token
    order_N, starts_R = grouped(bag_N, batch * levels)
    parts_RD = sum_rows(dec_FD, latent_N[order_N], values_N[order_N], starts_R, dec_FD.dtype)
    slices = triton.cdiv(width, WIDTH)
    grad_RD, left_BD = torch.empty_like(parts_RD), torch.empty_like(x_BD)
    squares_MBT = torch.empty(levels, batch, slices, device=device)
    if isinstance(stop_gradient, Tensor):
        hold = stop_gradient.to(device, torch.float32)
    else:  # filled there: a copy from the processor's memory cannot be recorded (fipo.graphs)
        hold = torch.full((), stop_gradient, dtype=torch.float32, device=device)
    given = parts_RD, bias_D, x_BD, hold, grad_RD, left_BD, squares_MBT
    numbers = width, 2 / grad_RD.numel(), float(plain)
    _nested_error[(batch, slices)](*given, *numbers, LEVELS=levels, WIDTH=WIDTH, num_warps=2)
    weight_B = (squares_MBT[-1].sum(1) / width + least).pow(power)
    weight_B = weight_B / weight_B.mean()
    divisor_N = 1 / torch.cat([weight_B, weight_B.new_ones(1)])[token_N]
    grad_N = row_products(grad_RD, bag_N.clamp_max(batch * levels - 1), dec_FD, latent_N) / divisor_N
    first_B, starts_C = torch.arange(batch, device=device), torch.arange(0, batch + _TOKENS, _TOKENS, device=device)
    grad_D = sum_rows(grad_RD, first_B * levels, weight_B, starts_C.clamp_max(batch), torch.float32).sum(0)
    return grad_RD.unflatten(0, (batch, levels)), grad_N, grad_D, left_BD, squares_MBT.sum((1, 2)), divisor_N


@triton.jit
def _nested_error(
    parts, bias, x, hold, grad, left, squares, width, scale, plain, LEVELS: tl.constexpr, WIDTH: tl.constexpr
):
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    target = tl.load(x + token * width + columns, mask=inside, other=0.0)
    residual = tl.load(bias + columns, mask=inside, other=0.0) - target
    first = parts + token * LEVELS * width + columns
    for level in tl.static_range(LEVELS):
        residual += tl.load(first + level * width, mask=inside, other=0.0).to(tl.float32)
        place = (level * tl.num_programs(0) + token) * tl.num_programs(1) + tl.program_id(1)
        tl.store(squares + place, tl.sum(residual * residual))
    tl.store(left + token * width + columns, -residual, mask=inside)
    whole, passed, share = plain * LEVELS * residual, 1 - tl.load(hold), 1 - plain
    pull = residual
    grads = grad + token * LEVELS * width + columns
    tl.store(grads + (LEVELS - 1) * width, scale * (share * pull + whole), mask=inside)
    for back in tl.static_range(1, LEVELS):  # from the last level but one to the first
        residual -= tl.load(first + (LEVELS - back) * width, mask=inside, other=0.0).to(tl.float32)
        pull = residual + passed * pull
        tl.store(grads + (LEVELS - 1 - back) * width, scale * (share * pull + whole), mask=inside)
