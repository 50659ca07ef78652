"""The objective, one pure function a term, added in one place:

    L = L_rec(levels by σ_F) + λ_s · L_sparsity + α · L_aux + λ_o · Ω(dec_FD; σ_F)

Shapes: B tokens, D model width, F latents, N dead ones, P candidate pairs. Inputs are standardised (mean squared norm
D) and squared errors are averaged over D, so L_rec is about the share of variance left and the weights mean the same at
any D. Each `Terms` field is already weighted: the logged terms sum to the optimised loss, but that robust levels weigh
tokens in the gradient of L_rec alone (fipo.reconstruction).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from fipo.priority import by_priority, precedence
from fipo.sparse import grouped, row_products, sum_rows


class Terms(NamedTuple):
    """The weighted terms of the loss, scalars."""

    reconstruction: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    orthogonality: Tensor

    @property
    def total(self) -> Tensor:
        """L."""
        return self.reconstruction + self.sparsity + self.auxiliary + self.orthogonality


def squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    """mean_B ‖x - x̂‖² / D."""
    return (x_BD - x_hat_BD).pow(2).mean()


def auxiliary(residual_BD: Tensor, pre_BN: Tensor, dec_ND: Tensor, k: int) -> Tensor:
    """Share of the residual that the N dead latents, of whom alone pre-activations and rows are given, fail to explain
    with their k largest (AuxK, Gao et al. 2024, section A.2; codes are rectified here). 0 when no latent is dead."""
    if pre_BN.shape[1] == 0:
        return torch.zeros((), device=pre_BN.device)
    values_BK, chosen_BK = pre_BN.topk(min(k, pre_BN.shape[1]), dim=-1, sorted=False)
    codes_BN = torch.zeros_like(pre_BN).scatter(-1, chosen_BK, values_BK.relu())
    target_BD = residual_BD.detach()
    error = squared_error(target_BD, codes_BN @ dec_ND)
    return error / target_BD.pow(2).mean().clamp_min(1e-12)


def orthogonality(
    dec_FD: Tensor,
    sigma_F: Tensor,
    pairs_P2: Tensor,
    *,
    estimator: str = "max",
    yields: str = "less_important",
    margin: float = 0.0,
    probability: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Ω: what the latents share with more important ones, per latent (METHOD section 4).

    For a pair (i, j) the latent j pays  ω_ij · max(cos(d_j, sg d_i) - margin, 0)²  with ω_ij = σ_i / (σ_i + σ_j): the
    more important i is, the more firmly it holds its direction and j yields. ω is free of units and of F. With
    `less_important` only the less important of a pair pays, as in Gram-Schmidt by importance; with `both` each pays its
    own share. A latent's payments are reduced by `max` or `sum`, or by `unbiased`: the sum with every pair weighted by
    1 / `probability`(cos), its chance of being a candidate, which estimates the sum over all pairs. Ω is the mean over
    the F latents. Anti-parallel rows do not compete for the same tokens and pay nothing; nor does a latent
    that is paired with itself, by which pairs can be filled up to a number.

    `dec_FD` has any row norms. No pair: exactly 0.
    """
    upper_P, lower_P = by_priority(sigma_F, pairs_P2)
    share_P = precedence(sigma_F[upper_P], sigma_F[lower_P])

    def payments(payer_P: Tensor, holder_P: Tensor, share_P: Tensor) -> Tensor:
        cos_P = _Cosines.apply(dec_FD, dec_FD.detach(), payer_P, holder_P)
        cost_P = share_P * (payer_P != holder_P) * (cos_P - margin).relu().pow(2)
        if estimator != "unbiased" or probability is None:
            return cost_P
        # Pairs have moved since they were found: of opposite ones, which pay nothing, the chance is 0.
        return cost_P / probability(cos_P.detach()).clamp_min(torch.finfo(cost_P.dtype).tiny)

    payer_P, cost_P = lower_P, payments(lower_P, upper_P, share_P)
    if yields == "both":
        payer_P = torch.cat([payer_P, upper_P])
        cost_P = torch.cat([cost_P, payments(upper_P, lower_P, 1 - share_P)])
    paid_F = torch.zeros(dec_FD.shape[0], dtype=cost_P.dtype, device=cost_P.device)
    if estimator == "max":
        return paid_F.scatter_reduce(0, payer_P, cost_P, "amax").mean()
    return paid_F.index_add(0, payer_P, cost_P).mean()


class _Cosines(torch.autograd.Function):
    """cos(dec[payer], rows[holder]) of every pair; the first F rows are those of `dec`, the rows are constants.

    The gradient to a payer's row is Σ g (unit_holder - cos unit_payer) / ‖dec_payer‖: a weighted sum of rows, and only
    of pairs with a gradient. No row of others is touched.
    """

    @staticmethod
    def forward(ctx: Any, dec_FD: Tensor, rows_RD: Tensor, payer_P: Tensor, holder_P: Tensor) -> Tensor:
        norm_R = rows_RD.norm(dim=1).clamp_min(1e-12)
        cos_P = row_products(rows_RD, payer_P, rows_RD, holder_P) / (norm_R[payer_P] * norm_R[holder_P])
        ctx.latents = dec_FD.shape[0]
        ctx.save_for_backward(rows_RD, norm_R, payer_P, holder_P, cos_P)
        return cos_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, norm_R, *places = ctx.saved_tensors
        paying_N = (
            grad_P.nonzero().squeeze(1) if grad_P.device.type == "cpu" else slice(None)
        )  # a GPU would be waited for
        grad_N, payer_N, holder_N, cos_N = (part[paying_N] for part in (grad_P, *places))
        weight_N = grad_N / norm_R[payer_N]
        weights = torch.cat([weight_N / norm_R[holder_N], -weight_N * cos_N / norm_R[payer_N]])
        order, ends_S = grouped(torch.cat([payer_N, payer_N]), ctx.latents)
        return sum_rows(rows_RD, torch.cat([holder_N, payer_N])[order], weights[order], ends_S), None, None, None


def chunked_orthogonality(dec_FD: Tensor, order_F: Tensor, chunk: int) -> Tensor:
    """The penalty of OrtSAE (Korznikov et al. 2025, arXiv 2509.22033): mean over the rows of the squared largest cosine
    with another row of the same chunk; both rows of a pair move. `order_F`, a random permutation, is cut into chunks
    of about equal size, at most `chunk` rows.
    """
    unit_FD = normalize(dec_FD, dim=1)
    count = math.ceil(len(order_F) / chunk)
    largest = []
    for members_N in order_F.tensor_split(count):
        rows_ND = unit_FD[members_N]
        with torch.autocast(rows_ND.device.type, enabled=False):
            cos_NN = rows_ND @ rows_ND.T
        itself_NN = torch.eye(len(members_N), dtype=torch.bool, device=cos_NN.device)
        largest.append(cos_NN.masked_fill(itself_NN, 0.0).amax(1))
    return torch.cat(largest).pow(2).mean()
