"""The nested reconstruction error and its gradient on a GPU, from pairs, without the parts (`fipo.reconstruction`).

Shapes: B tokens, D model width, F latents, M levels, N pairs, S = B + 1 starts of tokens, R = B M + 1 of their levels,
C of parts of the batch, T slices of D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fipo.kernels.pairs import WIDTH, sum_rows
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
    """As `fipo.native.nested_error`, but that tokens do not weigh in the gradient of a part: the last that is returned,
    what it is to be divided by, is one number a pair. Pairs behind the last start belong to no token."""
    (batch, width), count = x_BD.shape, len(values_N)
    token_N = torch.searchsorted(starts_S, torch.arange(count, device=x_BD.device), right=True) - 1
    place_N, starts_R = grouped(token_N * levels + level_F[latent_N], batch * levels)
    slices = triton.cdiv(width, WIDTH)
    grad_BMD = torch.empty(batch, levels, width, dtype=dec_FD.dtype, device=x_BD.device)
    left_BD, grad_TN = torch.empty_like(x_BD), torch.zeros(slices, count, device=x_BD.device)
    squares_MBT = torch.empty(levels, batch, slices, device=x_BD.device)
    if isinstance(stop_gradient, Tensor):
        hold = stop_gradient.to(x_BD.device, torch.float32)
    else:  # filled there: a copy from the processor's memory cannot be recorded (fipo.graphs)
        hold = torch.full((), stop_gradient, dtype=torch.float32, device=x_BD.device)
    pairs = values_N[place_N], latent_N[place_N], place_N, starts_R
    given = *pairs, dec_FD.contiguous(), bias_D, x_BD.contiguous(), hold, grad_BMD, left_BD, squares_MBT, grad_TN
    numbers = count, width, 2 / grad_BMD.numel(), float(plain)
    _nested_error[(batch, slices)](*given, *numbers, LEVELS=levels, WIDTH=WIDTH, num_warps=1)
    weight_B = (squares_MBT[-1].sum(1) / width + least).pow(power)
    weight_B = weight_B / weight_B.mean()
    first_B, starts_C = (torch.arange(0, batch + step - 1, step, device=x_BD.device) for step in (1, _TOKENS))
    of_tokens = grad_BMD.flatten(0, 1), first_B * levels, weight_B, starts_C.clamp_max(batch)
    grad_D = sum_rows(*of_tokens, torch.float32).sum(0)
    divisor_N = 1 / torch.cat([weight_B, weight_B.new_ones(1)])[token_N]
    return grad_BMD, grad_TN.sum(0) / divisor_N, grad_D, left_BD, squares_MBT.sum((1, 2)), divisor_N


@triton.jit
def _nested_error(
    values, latents, places, starts, rows, bias, x, hold, grad, left, squares, products,
    count, width, scale, plain, LEVELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A slice of a token: its levels forwards, for what each leaves, then backwards, for the gradients."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    target = tl.load(x + token * width + columns, mask=inside, other=0.0)
    residual = tl.load(bias + columns, mask=inside, other=0.0) - target
    for level in tl.static_range(LEVELS):
        n, end = tl.load(starts + token * LEVELS + level), tl.load(starts + token * LEVELS + level + 1)
        while n < end:
            for ahead in tl.static_range(8):  # eight loads are under way at a time
                there = n + ahead < end
                row = tl.load(latents + n + ahead, mask=there, other=0).to(tl.int64)
                value = tl.load(values + n + ahead, mask=there, other=0.0)
                residual += value * tl.load(rows + row * width + columns, mask=inside & there, other=0.0).to(tl.float32)
            n += 8
        tl.store(
            squares + (level * tl.num_programs(0) + token) * tl.num_programs(1) + part, tl.sum(residual * residual)
        )
    tl.store(left + token * width + columns, -residual, mask=inside)
    whole, passed, share = plain * LEVELS * residual, 1 - tl.load(hold), 1 - plain
    pull = tl.zeros([WIDTH], dtype=tl.float32)
    for back in tl.static_range(1, LEVELS + 1):
        pull = residual + passed * pull
        pulled = scale * (share * pull + whole)
        tl.store(grad + (token * LEVELS + LEVELS - back) * width + columns, pulled, mask=inside)
        n, end = tl.load(starts + (token + 1) * LEVELS - back), tl.load(starts + (token + 1) * LEVELS - back + 1)
        while n < end:
            for ahead in tl.static_range(8):
                there = n + ahead < end
                row = tl.load(latents + n + ahead, mask=there, other=0).to(tl.int64)
                value = tl.load(values + n + ahead, mask=there, other=0.0)
                place = tl.load(places + n + ahead, mask=there, other=0)
                numbers = tl.load(rows + row * width + columns, mask=inside & there, other=0.0).to(tl.float32)
                tl.store(products + part.to(tl.int64) * count + place, tl.sum(pulled * numbers), mask=there)
                residual -= value * numbers
            n += 8
