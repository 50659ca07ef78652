"""What an SAE must beat: controls that have learned nothing of the concepts they are probed for.

    channels   the residual stream's own coordinates
    PCA        its principal components on the training texts
    random     an SAE at its initialisation, of the same size and (within a tenth, and at least 1) L0

On sparse probing a trained SAE is often only a little better than a random one (arXiv 2602.14111: 0.72 against 0.69),
so the margin over `random` is the number that matters. Shapes: N texts, B tokens, D model width, F latents.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from fipo.activations import JumpReLU
from fipo.sae import SAE

CODES_AT_ONCE = 2**24
"""Codes of the sample that are held at a time, 64 MB: of a sample of 16,256 tokens there are 4 GB at F = 65,536."""


def principal_components(train_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and orthonormal directions [D, min(N, D)] of largest variance, first the largest."""
    mean_D = train_ND.double().mean(0)
    _, _, directions_CD = torch.linalg.svd(train_ND.double() - mean_D, full_matrices=False)
    return mean_D.float(), directions_CD.T.float().contiguous()


@torch.no_grad()
def random_sae(latents: int, l0: float, sample_BD: Tensor, generator: torch.Generator) -> SAE:
    """An SAE as at the start of training: random unit decoder rows, their transpose as encoder, for centred input.

    One threshold on all pre-activations gives it the L0 asked for on the sample.
    """
    control = SAE(sample_BD.shape[1], latents, JumpReLU(latents), generator=generator).to(sample_BD.device)
    control.mean_D.copy_(sample_BD.mean(0))
    wanted = max(1, round(l0 * sample_BD.shape[0]))
    largest_N = sample_BD.new_empty(0)
    for part_BD in _pieces(sample_BD, latents):
        largest_N = torch.cat([largest_N, control.pre_codes(control.standardise(part_BD)).flatten()])
        largest_N = largest_N.topk(min(wanted + 1, len(largest_N)), sorted=False).values
    control.activation.log_threshold_F.fill_(largest_N.min().clamp_min(1e-12).log().item())
    return control.eval()


@torch.no_grad()
def random_codes(control: SAE) -> Callable[[Tensor], Tensor]:
    """Model activations [B, D] -> codes [B, F] of a `random_sae`, its products in bfloat16: directions drawn at random
    need no exact arithmetic, and one threshold for all takes one pass over the codes."""
    threshold = control.activation.threshold_F.max().item()

    def codes(acts_BD: Tensor) -> Tensor:
        with torch.autocast(acts_BD.device.type, dtype=torch.bfloat16):
            return functional.threshold(control.pre_codes(control.standardise(acts_BD)), threshold, 0.0)

    return codes


def nearby_l0(l0: float) -> float:
    """The nearest of 1, 2^¼, 2^½ ...: within 9 %, so that SAEs of about the same L0 share one random control."""
    return 2 ** (round(4 * math.log2(max(1.0, l0))) / 4)


@torch.no_grad()
def code_l0(sae: SAE, sample_BD: Tensor) -> float:
    """Codes that are on, a token."""
    on = sum((sae.encode(part_BD) > 0).sum().item() for part_BD in _pieces(sample_BD, sae.latents))
    return on / len(sample_BD)


@torch.no_grad()
def code_scale(sae: SAE, sample_BD: Tensor) -> float:
    """Median of ‖codes‖ / ‖x - b‖ over the tokens that have a code, 0 where none has: about 1 where the decoder rows
    have unit norm and codes are in units of the activations; a thousand times less where input scale or decoder norms
    were not folded into the weights."""
    codes_B = torch.cat([sae.encode(part_BD).norm(dim=1) for part_BD in _pieces(sample_BD, sae.latents)])
    scale_N = (codes_B / sae.standardise(sample_BD).norm(dim=1).clamp_min(1e-12))[codes_B != 0]
    return scale_N.median().item() if len(scale_N) else 0.0


def _pieces(sample_BD: Tensor, latents: int) -> Iterator[Tensor]:
    """The sample, as many tokens at a time as have CODES_AT_ONCE codes."""
    return iter(sample_BD.split(max(64, CODES_AT_ONCE // latents)))
