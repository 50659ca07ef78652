"""Codes as pairs (token, latent): a training step whose cost beyond the encoder's product grows with L0, not with F.

    a_n      = (x encᵀ + enc_bias)[token_n, latent_n]          the N pairs that an activation chose
    part_m   = Σ_{n: level m} a_n dec[latent_n]                a token's parts, level by level
    ∂a_n     = ⟨∂part[token_n, level_n], dec[latent_n]⟩
    ∂dec_f   = Σ_{n: latent_n = f} a_n ∂part[token_n, level_n]
    ∂enc_f   = Σ_{n: latent_n = f} ∂a_n x[token_n]             and ∂enc_bias_f = Σ_{n: latent_n = f} ∂a_n

The sums over the pairs of a latent are sums over segments once the pairs are sorted by latent: `Codes` sorts them once,
for the statistics and both weights. `embedding_bag` is the weighted sum of rows over segments. Every segment is summed
in a fixed order, without atomics, so a step is bitwise repeatable, and [N, D] is never built. Under autocast the rows
are in its type, as those of a matrix product would be, and are added up in float32. After Gao et al. 2024, appendix D,
whose sums are atomic. The dense path is the oracle (tests/test_sparse.py).

Shapes: B tokens, D model width, F latents, N pairs, M levels, R rows, S = F + 1 ends of segments.
"""

import functools
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

_ROWS = 128
"""Rows of a weight that stay in the cache of a core."""


class Codes(NamedTuple):
    """Non-negative codes [B, F] as pairs, ordered by token; a value may be 0. Made by `pairs`."""

    values_N: Tensor
    """Codes, in float32 or wider."""
    token_N: Tensor
    """Their tokens, rising; on a GPU not where the value is 0."""
    latent_N: Tensor
    """Their latents."""
    order_N: Tensor
    """The pairs sorted by latent."""
    ends_S: Tensor
    """Where in `order_N` the pairs of every latent start, and N: [F + 1]."""
    starts_S: Tensor
    """Where the pairs of every token start, and where the last of them end: [B + 1]. Behind that, on a GPU, stand
    zeros."""
    batch: int
    """B."""

    def dense(self) -> Tensor:
        """[B, F]."""
        codes_BF = self.values_N.new_zeros(self.batch, self.ends_S.shape[0] - 1)
        return codes_BF.index_put((self.token_N, self.latent_N), self.values_N, accumulate=True)

    def detach(self) -> "Codes":
        """The same without a gradient."""
        return self._replace(values_N=self.values_N.detach())

    def reduce(self, values_N: Tensor, how: str) -> Tensor:
        """`sum` or `max` (at least 0) of a number a pair over the pairs of every latent, [F]."""
        return reduce_segments(values_N.index_select(0, self.order_N), self.ends_S, how)


def pairs(
    values_N: Tensor, token_N: Tensor, latent_N: Tensor, batch: int, latents: int, found: Tensor | None = None
) -> Codes:
    """Codes from their pairs, ordered by token; those behind the first `found`, where it is given, are zeros."""
    order_N, ends_S = grouped(latent_N, latents)
    values_N = values_N.to(torch.promote_types(values_N.dtype, torch.float32))
    rising_N = token_N
    if found is not None:
        rising_N = torch.where(torch.arange(len(token_N), device=found.device) < found, token_N, batch)
    starts_S = torch.searchsorted(rising_N, torch.arange(batch + 1, device=token_N.device))
    return Codes(values_N, token_N, latent_N, order_N, ends_S, starts_S, batch)


def grouped(group_N: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The pairs sorted by their group, in their order inside each, and where in it every group starts, and N.

    Few bytes a number are sorted faster: 131,072 of 3,072 groups in .8 ms of two bytes, in 4 ms of eight.
    """
    narrow = torch.int16 if groups < 2**15 else torch.int32
    sorted_N, order_N = group_N.to(narrow).sort(stable=True)
    return order_N, torch.searchsorted(sorted_N, torch.arange(groups + 1, dtype=narrow, device=group_N.device))


def pairs_of(codes_BF: Tensor) -> Codes:
    """The codes of a matrix that are not 0; the others are constants."""
    token_N, latent_N = codes_BF.detach().nonzero(as_tuple=True)
    return pairs(codes_BF[token_N, latent_N], token_N, latent_N, *codes_BF.shape)


def flat(codes: Codes | Tensor) -> Tensor:
    """The values of a matrix or of pairs, one after another."""
    return codes.values_N if isinstance(codes, Codes) else codes.flatten()


def positive(codes: Codes | Tensor) -> Tensor:
    """All codes above 0, flat."""
    values = flat(codes)
    return values[values > 0]


def attach(codes: Codes, x_BD: Tensor, enc_FD: Tensor, enc_bias_F: Tensor) -> Codes:
    """The same codes as a function of the encoder, for the backward pass; `x_BD` is data, as the encoder's product took
    it, and gets no gradient."""
    places = codes.token_N, codes.order_N, codes.ends_S
    return codes._replace(values_N=_Encode.apply(enc_FD, enc_bias_F, x_BD, codes.values_N, *places))


def decode_pairs(codes: Codes, dec_FD: Tensor, level_F: Tensor | None, levels: int) -> Tensor:
    """The parts of M levels, [B, M, D]."""
    bag_N = codes.token_N if level_F is None else codes.token_N * levels + level_F[codes.latent_N]
    places = bag_N, codes.latent_N, codes.order_N, codes.ends_S, codes.batch * levels
    return _Decode.apply(codes.values_N, dec_FD, *places).unflatten(0, (codes.batch, levels))


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """`fipo.kernels` for a tensor on a GPU, where Triton is installed; else, and for float64, None: torch does it."""
    return _kernels() if tensor.is_cuda and tensor.dtype != torch.float64 else None


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from fipo import kernels

    return kernels


def native_for(tensor: Tensor, dtype: torch.dtype) -> ModuleType | None:
    """`fipo.native` for a tensor of that type on a processor, where Numba is installed; else None: torch does it."""
    return _native() if tensor.dtype == dtype and tensor.device.type == "cpu" else None


@functools.cache
def _native() -> ModuleType | None:
    if importlib.util.find_spec("numba") is None:
        return None
    from fipo import native

    return native


def sum_rows(
    rows_RD: Tensor, row_N: Tensor, weight_N: Tensor, ends_S: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Σ_n weight_n rows[row_n] over every segment of pairs, summed in float32 or wider, in the type of the rows; or in
    `dtype`, where that costs nothing."""
    if kernels := kernels_for(rows_RD):
        return kernels.sum_rows(rows_RD, row_N, weight_N, ends_S, dtype or rows_RD.dtype)
    weight_N = weight_N.to(rows_RD.dtype)
    return embedding_bag(row_N, rows_RD, ends_S, mode="sum", per_sample_weights=weight_N, include_last_offset=True)


def reduce_segments(values_N: Tensor, ends_S: Tensor, how: str) -> Tensor:
    """`sum` or `max` (at least 0) of the numbers of every segment."""
    if kernels := kernels_for(values_N):
        return kernels.reduce_segments(values_N, ends_S, how)
    return torch.segment_reduce(values_N, how, offsets=ends_S, initial=0)


def row_products(left_RD: Tensor, left_N: Tensor, right_RD: Tensor, right_N: Tensor) -> Tensor:
    """⟨left[left_n], right[right_n]⟩ of every pair, without the [N, D] of both sides."""
    if kernels := kernels_for(left_RD):
        return kernels.row_products(left_RD, left_N, right_RD, right_N)
    if left_N.numel() == 0:
        return left_RD.new_zeros(0)
    if left_RD.is_cuda and left_RD.dtype == torch.bfloat16:  # for which torch has it on a CPU alone
        left_RD, right_RD = left_RD.float(), right_RD.float()
    dot = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return dot(left_RD.contiguous(), right_RD.contiguous(), right_N, left_N[:1], left_N, 0)


def working(rows: Tensor) -> Tensor:
    """In the type that matrix products have here: under autocast the lower one."""
    kind = rows.device.type
    return rows.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else rows


def cached(rows_FD: Tensor) -> tuple[Tensor, ...]:
    """The rows in parts that stay in a core's cache through several operations; a GPU gets them in one."""
    return rows_FD.split(_ROWS if rows_FD.device.type == "cpu" else rows_FD.shape[0])


def working_times(rows_FD: Tensor, factor_F: Tensor) -> Tensor:
    """Rows times factors, rounded once to the type that matrix products have here."""
    dtype = working(rows_FD[:0]).dtype
    if kernels := kernels_for(rows_FD):
        return kernels.scaled_rows(rows_FD, factor_F, dtype)
    scaled_FD = torch.empty_like(rows_FD, dtype=dtype)
    for scaled_ND, rows_ND, factor_N in zip(*map(cached, (scaled_FD, rows_FD, factor_F)), strict=True):
        scaled_ND.copy_(rows_ND * factor_N[:, None])
    return scaled_FD


def affine(x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
    """x weightᵀ + bias in the type that matrix products have here. In bfloat16 on a processor oneDNN adds the bias as
    it writes; torch's `addmm` first fills [B, F] with it, a tenth of a step."""
    x_BD, weight_FD, bias_F = map(working, (x_BD, weight_FD, bias_F))
    if x_BD.dtype == torch.bfloat16 and x_BD.device.type == "cpu" and _one_dnn():
        return torch.ops.mkldnn._linear_pointwise(x_BD, weight_FD, bias_F, "none", [], "")
    return torch.addmm(bias_F, x_BD, weight_FD.T)


@functools.cache
def _one_dnn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _Encode(torch.autograd.Function):
    """Values that were found without a graph, with the gradient of x encᵀ + enc_bias at the positive ones."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        enc_FD, _enc_bias_F, x_BD, values_N, *places = given
        ctx.dtype = enc_FD.dtype
        ctx.save_for_backward(x_BD, values_N, *places)
        return values_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, values_N, token_N, order_N, ends_S = ctx.saved_tensors
        grad_N = torch.where(values_N > 0, grad_N, 0).index_select(0, order_N)
        token_N = token_N.index_select(0, order_N)
        grad_FD = sum_rows(x_BD, token_N, grad_N, ends_S, ctx.dtype)
        return grad_FD, reduce_segments(grad_N, ends_S, "sum"), *[None] * 5


class _Decode(torch.autograd.Function):
    """Σ values · dec[latent] over the pairs of every bag."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, dec_FD: Tensor, *places: Any) -> Tensor:
        bag_N, latent_N, order_N, ends_S, bags = places
        ctx.dtype = dec_FD.dtype
        dec_FD = working(dec_FD)
        ctx.save_for_backward(values_N, dec_FD, bag_N, latent_N, order_N, ends_S)
        by_bag_N, ends_R = grouped(bag_N, bags)
        return sum_rows(dec_FD, latent_N.index_select(0, by_bag_N), values_N.index_select(0, by_bag_N), ends_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        values_N, dec_FD, bag_N, latent_N, order_N, ends_S = ctx.saved_tensors
        grad_RD, grad_N, grad_FD = grad_RD.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_N = row_products(grad_RD, bag_N, dec_FD, latent_N)
        if ctx.needs_input_grad[1]:
            bag_N, values_N = bag_N.index_select(0, order_N), values_N.index_select(0, order_N)
            grad_FD = sum_rows(grad_RD, bag_N, values_N, ends_S, ctx.dtype)
        return grad_N, grad_FD, *[None] * 5
