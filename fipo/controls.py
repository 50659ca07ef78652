"""What an SAE must beat: controls that have learned nothing of the concepts they are probed for.

    channels   the residual stream's own coordinates
    PCA        its principal components on the training texts
    random     an SAE at its initialisation, of the same size and (within a tenth) L0

On sparse probing a trained SAE is often only a little better than a random one (arXiv 2602.14111: 0.72 against 0.69),
so the margin over `random` is the number that matters. Shapes: N texts, B tokens, D model width, F latents.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fipo.activations import JumpReLU
from fipo.sae import SAE


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
    pre_BF = control.pre_codes(control.standardise(sample_BD))
    threshold = pre_BF.flatten().topk(min(wanted + 1, pre_BF.numel()), sorted=False).values.min().clamp_min(1e-12)
    control.activation.log_threshold_F.fill_(threshold.log().item())
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
def code_scale(sae: SAE, sample_BD: Tensor) -> float:
    """Median over tokens of ‖codes‖ / ‖x - b‖: about 1 where the decoder rows have unit norm and codes are in units of
    the activations; a thousand times less where input scale or decoder norms were not folded into the weights."""
    size_B = sae.standardise(sample_BD).norm(dim=1).clamp_min(1e-12)
    return (sae.encode(sample_BD).norm(dim=1) / size_B).median().item()
