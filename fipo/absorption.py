"""Feature absorption on a model's own activations: a parent's latent is silent because a child's stands in for it.

After Chanin et al. 2024 (arXiv 2409.14507), by SAEBench's rules (its `absorption`, 0.6.0), whose numbers these equal. A
linear probe on the activations gives the direction of a concept, and the latents that detect it are its main ones. On
a token where the probe finds the concept, it is absorbed *in full* when no main latent is active and the active latent
with the largest part along the probe carries a good share of what the activation has there. The absorbed *fraction* is
the part of the concept, as the SAE tells it, that up to three other latents carry. Where the truth is planted,
`fipo.recovery` says the same without a probe. Shapes: N tokens, D model width, F latents, M main latents.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

SILENT = 1e-8
"""A code up to which a latent counts as not active."""
IN_FULL, IN_PART = 0.025, 0.1
"""Cosine with the probe that an absorbing latent has at least: the one that absorbs in full, and those that do so in
part."""
SHARE = 0.4
"""Of an activation's part along the probe, what absorbing latents carry at least."""
ABSORBERS = 3
"""Latents at most that absorb in part."""
GAIN = 0.03
"""Gain of a detector's F1 by one more latent beyond which the concept is split, and that latent a main one too."""


class Absorbed(NamedTuple):
    """What is absorbed, token by token."""

    full_N: Tensor
    """Is it, in full?"""
    fraction_N: Tensor
    """Which part, from 0 to 1."""
    silent_N: Tensor
    """Is no main latent active?"""


def main_latents(f1: Sequence[float]) -> int:
    """How many latents stand for a concept, of those that detect it best: `f1` is that of the detector on the first 1,
    2, ... of them, and each adds more than `GAIN` to the one before."""
    count = 1
    while count < len(f1) and f1[count] > f1[count - 1] + GAIN:
        count += 1
    return count


@torch.no_grad()
def absorbed(acts_ND: Tensor, codes_NF: Tensor, dec_FD: Tensor, probe_D: Tensor, main_M: Tensor) -> Absorbed:
    """On tokens where the probe finds the concept. `codes_NF`: in the units of the activations, for rows of unit norm;
    `probe_D`: the probe's weights, of any norm; `main_M`: numbers of the main latents."""
    unit_D = normalize(probe_D, dim=0)
    cos_F = cosine_similarity(dec_FD, unit_D[None], dim=1)
    total_N, along_NF = acts_ND @ unit_D, codes_NF * cos_F
    main_N = along_NF[:, main_M].sum(1)
    largest_N, latent_N = along_NF.max(1)
    silent_N = (codes_NF[:, main_M] < SILENT).all(1)
    full_N = silent_N & (cos_F[latent_N] >= IN_FULL) & (total_N >= 0) & (largest_N / total_N >= SHARE)
    others_F = cos_F >= IN_PART
    others_F[main_M] = False
    others_NA = along_NF[:, others_F].clamp_min(0)
    carried_N = others_NA.topk(min(ABSORBERS, others_NA.shape[1])).values.sum(1)
    part_N = torch.minimum(carried_N, total_N - main_N)
    fraction_N = torch.where(main_N > 0, part_N / (part_N + main_N), 1.0).clamp(0, 1)
    none_N = (main_N >= total_N) | ~(carried_N / total_N >= SHARE)
    return Absorbed(full_N, fraction_N.masked_fill(none_N, 0.0), silent_N)
