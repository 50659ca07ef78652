"""Which latents may be too similar: sign random projections, buckets, queues, candidate pairs.

    bit = sign(⟨plane, d⟩)          P(one bit of d_i and d_j agrees) = 1 - θ_ij/π         (Charikar 2002)

T tables of S bits; the planes are redrawn from a generator at every refresh. Two latents meet when all S bits of a
table agree, which some table does with probability p(cos) = 1 - (1 - (1-θ/π)^S)^T. In a bucket the C latents of
highest priority queue (fipo.reservoir), and all pairs of a queue are compared by one batched matrix product. Cost
O(F·T·(S·D + C·D)), never O(F²·D).

Shapes: F latents, D model width, T tables, S bits, Q = 2^S buckets, C capacity, P pairs. Knows directions and
priorities, not SAEs.
"""

import math

import torch
from torch import Tensor

from fipo.priority import by_priority, precedence
from fipo.reservoir import BucketQueues
from fipo.search import ordered, true_places
from fipo.sparse import row_products


def bucket_numbers(rows_FD: Tensor, planes_DTS: Tensor, autocast: bool) -> Tensor:
    """Bucket of every row in every table, [F, T] int64 in 0 .. 2^S - 1."""
    projected_FTS = project(rows_FD, planes_DTS, autocast)
    numbers_FT = torch.zeros(projected_FTS.shape[:2], dtype=torch.int64, device=rows_FD.device)
    for bit in range(projected_FTS.shape[2]):  # at once they would take several times the memory of the projection
        numbers_FT += (projected_FTS[..., bit] > 0) * 2**bit
    return numbers_FT


def project(rows_FD: Tensor, planes_DTS: Tensor, autocast: bool) -> Tensor:
    """Components of every row along every plane, [F, T, S]: the one costly part.

    Under `torch.autocast` in bfloat16 when asked, since only signs are used; then a few rows at a time, because the
    bfloat16 copy of all rows would take more memory than the result saves.
    """
    planes_DK = planes_DTS.flatten(1)
    if not autocast:
        return (rows_FD @ planes_DK).unflatten(1, planes_DTS.shape[1:])
    projected_FK = torch.empty(rows_FD.shape[0], planes_DK.shape[1], dtype=torch.bfloat16, device=rows_FD.device)
    parts = 64 if rows_FD.device.type == "cpu" else 1
    planes_DK, size = planes_DK.bfloat16(), max(32, rows_FD.shape[0] // parts)
    with torch.autocast(rows_FD.device.type, dtype=torch.bfloat16):
        for part_ND, result_NK in zip(rows_FD.split(size), projected_FK.split(size), strict=True):
            result_NK.copy_(part_ND @ planes_DK)
    return projected_FK.unflatten(1, planes_DTS.shape[1:])


def collision_probability(cos: Tensor, tables: int, bits: int) -> Tensor:
    """p(cos) = 1 - (1 - (1-θ/π)^S)^T, the chance that two rows share a bucket in some table; exact where small."""
    agree = 1 - cos.clamp(-1, 1).acos() / math.pi
    return -torch.expm1(tables * torch.log1p(-agree.pow(bits)))


def tables_at_once(device: torch.device, numbers: int) -> int:
    """Tables, of so many numbers in queued rows, that are served together: on a GPU 1 GB of them, by few calls."""
    return 1 if device.type == "cpu" else max(1, 2**29 // numbers)


@torch.no_grad()
def candidate_pairs(
    unit_FD: Tensor,
    priority_F: Tensor,
    *,
    tables: int,
    bits: int,
    capacity: int,
    min_cosine: float,
    generator: torch.Generator,
    partners: int | None = None,
    autocast: bool = True,
    held_P2: Tensor | None = None,
) -> Tensor:
    """Pairs [P, 2] of unit rows with cosine >= `min_cosine` that met in a bucket of one of the tables.

    Under `autocast` the rows of a queue are compared in bfloat16 and what is near `min_cosine` once more in float32.
    Sorted, i < j, none twice. Where a bucket has no room for all its rows, `collision_probability` overstates.

    `held_P2`: pairs found earlier, which compete with the new ones; a pair that one draw of planes misses is then
    missing only until a later draw finds it.

    `partners`: keep, of every row's pairs with rows of higher priority, only so many of the dearest, those of largest
    ω cos² with ω = `precedence` (what Ω makes the row pay); None keeps all.
    """
    latents, width = unit_FD.shape
    planes_DTS = torch.randn(width, tables, bits, generator=generator, device=generator.device).to(unit_FD.device)
    buckets_FT = bucket_numbers(unit_FD, planes_DTS, autocast)
    numbers_F = priority_F.argsort(descending=True, stable=True)  # so that no table has to sort them
    buckets_FT, sorted_F = buckets_FT[numbers_F], priority_F[numbers_F]
    compared_FD = unit_FD.bfloat16() if autocast else unit_FD
    rows_RD = torch.cat([compared_FD, compared_FD.new_zeros(1, width)])
    least = min_cosine - 2**-7 if autocast else min_cosine
    least_key = ordered(torch.tensor(least, dtype=rows_RD.dtype, device=unit_FD.device))
    found = []
    if held_P2 is not None:
        found.append(held_P2[:, 0] * latents + held_P2[:, 1])
    for buckets_FN in buckets_FT.split(tables_at_once(unit_FD.device, 2**bits * capacity * width), dim=1):
        tables_N = torch.arange(buckets_FN.shape[1], device=unit_FD.device)
        queues = BucketQueues(len(tables_N) * 2**bits, capacity, device=unit_FD.device)
        queue_FN = buckets_FN + tables_N * 2**bits
        queues.offer(
            *(of_FN.expand_as(queue_FN).flatten() for of_FN in (queue_FN, sorted_F[:, None], numbers_F[:, None])),
            ordered=True,
        )
        held_QC = queues.items_QC
        row_N = held_QC.flatten() % (latents + 1)  # an empty place is -1: the last row, all zeros
        rows_QCD = rows_RD.index_select(0, row_N).unflatten(0, held_QC.shape)
        cos_QCC = torch.bmm(rows_QCD, rows_QCD.mT)
        close_QCC = ordered(cos_QCC) >= least_key if least > 0 else cos_QCC >= least
        place_N = true_places(close_QCC.triu_(1))
        first_N = held_QC.flatten()[place_N // capacity]
        second_N = held_QC.flatten()[place_N // capacity**2 * capacity + place_N % capacity]
        smaller_N = torch.minimum(first_N, second_N)
        found.append((smaller_N * latents + torch.maximum(first_N, second_N))[smaller_N >= 0])
    codes_P = torch.cat(found).unique()
    pairs_P2 = torch.stack([codes_P // latents, codes_P % latents], dim=1)
    first_P, second_P = pairs_P2.T.contiguous()
    cos_P = row_products(unit_FD, first_P, unit_FD, second_P)
    close_P = cos_P >= min_cosine
    pairs_P2, cos_P = pairs_P2[close_P], cos_P[close_P]
    return pairs_P2 if partners is None else pairs_P2[_dearest(cos_P, priority_F, pairs_P2, partners)]


def _dearest(cos_P: Tensor, priority_F: Tensor, pairs_P2: Tensor, partners: int) -> Tensor:
    """Numbers, rising, of the pairs that are among the `partners` dearest of their row of lower priority."""
    upper_P, lower_P = by_priority(priority_F, pairs_P2)
    cost_P = precedence(priority_F[upper_P], priority_F[lower_P]) * cos_P.relu().square()
    queues = BucketQueues(priority_F.shape[0], partners, device=cos_P.device)
    queues.offer(lower_P, cost_P, torch.arange(pairs_P2.shape[0], device=cos_P.device))
    return queues.items_QC[queues.items_QC >= 0].sort().values
