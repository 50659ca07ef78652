"""How much of a known truth an SAE has recovered. Pure: nothing is changed by measuring.

    MCC          mean |cos| over the one-to-one matching of latents and features that makes it largest
    F1           of each latent as a detector (fires or not) of the feature it is closest to, mean over all latents
    uniqueness   share of the latents whose closest feature no other latent has (counted as distinct features / F)

as in `sae_lens.synthetic.eval_sae_on_synthetic_data` (6.54), whose numbers these equal; a latent that never fires
counts 0 in precision, recall and F1. Random directions score .88 in uniqueness: it is no measure to win by. Three more:

    absorption   of the (token, feature) pairs where a feature that has a latent fires together with a child of its own,
                 the share on which that latent is silent (Chanin et al. 2024, where the truth is known)
    orphaned     of all such pairs, the share whose feature has no latent: a parent that all its children have absorbed
    composition  share of the latents whose direction needs a second feature: after the best one has been fitted,
                 another explains at least `SECOND` of its squared norm (two steps of orthogonal matching pursuit)

A feature's latent is the closest of those whose closest feature it is. Shapes: B tokens, F latents, G true features,
D width, N matched pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fipo.metrics import max_cosines, quality
from fipo.sae import SAE
from fipo.synthetic import Sample

SECOND = 0.1
"""Share of a latent's squared norm that its second feature must explain to make it a composition; for a random
direction the best of 1,024 features explains .05 in 256 dimensions."""


class Recovery(NamedTuple):
    """What the truth says about an SAE."""

    mcc: float
    """Mean |cos| of matched latents and features."""
    f1: float
    """Mean F1 of the latents as detectors."""
    precision: float
    """Mean precision."""
    recall: float
    """Mean recall."""
    explained_variance: float
    """1 - FVU."""
    absorption: float
    """Share of co-firings with a child on which the parent's latent is silent; NaN where no such parent has one."""
    orphaned: float
    """Share of all co-firings with a child whose parent has no latent; NaN where there is none."""
    composition: float
    """Share of the latents that mix two or more features."""
    uniqueness: float
    """Distinct closest features a latent."""
    mean_max_cosine: float
    """Mean over latents of the largest cosine with another one."""
    dead_share: float
    """Share of the latents that never fired."""
    l0: float
    """Active latents a token."""


@torch.no_grad()
def recovery(sae: SAE, samples: Sequence[Sample], features_GD: Tensor, parent_G: Tensor) -> Recovery:
    """All measures on samples of the truth, in evaluation mode and float32."""
    mode = sae.training
    sae.eval()
    found = quality(sae, (sample.acts_BD for sample in samples))
    cos_FG = absolute_cosines(sae.dec_FD, features_GD)
    closest_F = cos_FG.argmax(1)
    counts_3F = torch.zeros(3, sae.latents, dtype=torch.int64, device=cos_FG.device)
    absorbed_3 = torch.zeros(3, dtype=torch.int64, device=cos_FG.device)
    latent_G = latent_of_feature(cos_FG)
    for sample in samples:
        fires_BF, truth_BG = sae.encode(sample.acts_BD) > 0, sample.values_BG > 0
        counts_3F += detections(fires_BF, truth_BG[:, closest_F])
        absorbed_3 += absorbed(fires_BF, truth_BG, latent_G, parent_G)
    sae.train(mode)
    together, silent, orphans = absorbed_3.tolist()
    precision, recall, f1 = (score_F.mean().item() for score_F in scores(counts_3F))
    return Recovery(
        mcc=mean_matched_cosine(cos_FG),
        f1=f1,
        precision=precision,
        recall=recall,
        explained_variance=1 - found.fvu,
        absorption=silent / together if together else float("nan"),
        orphaned=orphans / (orphans + together) if orphans + together else float("nan"),
        composition=composite(sae.dec_FD, features_GD).float().mean().item(),
        uniqueness=len(closest_F.unique()) / sae.latents,
        mean_max_cosine=max_cosines(sae.dec_FD).mean().item(),
        dead_share=found.dead_share,
        l0=found.l0,
    )


def absolute_cosines(dec_FD: Tensor, features_GD: Tensor) -> Tensor:
    """|cos| of every latent with every feature, [F, G]."""
    return (normalize(dec_FD, dim=1) @ normalize(features_GD, dim=1).T).abs()


def mean_matched_cosine(cos_FG: Tensor) -> float:
    """MCC: mean over the best one-to-one matching (Hungarian), of min(F, G) pairs; dead latents are matched too."""
    from scipy.optimize import linear_sum_assignment  # not of the core: comes with scikit-learn

    latent_N, feature_N = linear_sum_assignment(cos_FG.cpu().numpy(), maximize=True)
    return cos_FG.cpu()[torch.as_tensor(latent_N), torch.as_tensor(feature_N)].mean().item()


def latent_of_feature(cos_FG: Tensor) -> Tensor:
    """The latent of every feature, [G]: the closest of those whose closest feature it is; -1 where there is none."""
    best_F, closest_F = cos_FG.max(1)
    claims_FG = torch.zeros_like(cos_FG).scatter(1, closest_F[:, None], best_F[:, None])
    best_G, latent_G = claims_FG.max(0)
    return latent_G.masked_fill(best_G == 0, -1)


def detections(fires_BF: Tensor, truth_BF: Tensor) -> Tensor:
    """True positives, false positives and false negatives of every latent, [3, F]."""
    return torch.stack([(fires_BF & truth_BF).sum(0), (fires_BF & ~truth_BF).sum(0), (~fires_BF & truth_BF).sum(0)])


def scores(counts_3F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1 of every latent, 0 where undefined."""
    true_F, false_F, missed_F = counts_3F.double()
    precision_F = true_F / (true_F + false_F).clamp_min(1)
    recall_F = true_F / (true_F + missed_F).clamp_min(1)
    return precision_F, recall_F, 2 * true_F / (2 * true_F + false_F + missed_F).clamp_min(1)


def absorbed(fires_BF: Tensor, truth_BG: Tensor, latent_G: Tensor, parent_G: Tensor) -> Tensor:
    """Number [3] of (token, parent) pairs at which a parent that has a latent fires with a child, of those at which its
    latent is silent, and of those whose parent has no latent."""
    child_N = (parent_G >= 0).nonzero().squeeze(1)
    with_child_BG = torch.zeros_like(truth_BG, dtype=torch.int8)
    with_child_BG.index_add_(1, parent_G[child_N], truth_BG[:, child_N].to(torch.int8))
    together_BG = (with_child_BG > 0) & truth_BG
    known_N = (latent_G >= 0).nonzero().squeeze(1)
    together_BN = together_BG[:, known_N]
    silent_BN = together_BN & ~fires_BF[:, latent_G[known_N]]
    return torch.stack([together_BN.sum(), silent_BN.sum(), together_BG.sum() - together_BN.sum()])


def composite(dec_FD: Tensor, features_GD: Tensor) -> Tensor:
    """Does the direction of a latent mix two or more features? [F]."""
    unit_FD, unit_GD = normalize(dec_FD, dim=1), normalize(features_GD, dim=1)
    cos_FG = unit_FD @ unit_GD.T
    first_F = cos_FG.abs().argmax(1)
    first_FD = unit_GD[first_F]
    rest_FD = unit_FD - (unit_FD * first_FD).sum(1, keepdim=True) * first_FD
    between_FG = first_FD @ unit_GD.T
    # What g explains beyond the first: ⟨rest, g⟩² / ‖g minus its part along the first‖².
    beyond_FG = (1 - between_FG.pow(2)).clamp_min(1e-6)
    gain_FG = (rest_FD @ unit_GD.T).pow(2) / beyond_FG
    gain_FG.scatter_(1, first_F[:, None], 0.0)
    return gain_FG.amax(1) >= SECOND
