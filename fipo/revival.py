"""Revival of dead latents from the activation reservoir (METHOD section 2).

The reservoir holds tokens that were reconstructed badly. A latent that has been silent too long becomes the detector
of one of them: decoder and encoder row take its direction, the encoder scaled to the live latents, and the
Adam moments of both are cleared, since they belong to the old direction. After Bricken et al. 2023 ("neuron
resampling"), with the reservoir in place of one batch. Shapes: B tokens, D model width, F latents, R slots.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fipo.adam import Adam
from fipo.sae import SAE


@torch.no_grad()
def revive(sae: SAE, optimizer: Adam, dead_F: Tensor, candidates_RD: Tensor, encoder_scale: float) -> Tensor:
    """Point dead latents at the first of `candidates_RD` (standardised inputs) that have a direction, one each; returns
    those latents."""
    candidates_RD = candidates_RD[candidates_RD.any(dim=1)]
    latents = dead_F.nonzero().squeeze(1)[: candidates_RD.shape[0]]
    if latents.numel() == 0:
        return latents
    inputs_ND = candidates_RD[: latents.shape[0]]
    unit_ND = normalize(inputs_ND, dim=1)
    live_F = ~dead_F
    norm = sae.enc_FD[live_F].norm(dim=1).mean() if live_F.any() else sae.enc_FD.norm(dim=1).mean()
    sae.dec_FD[latents] = unit_ND
    sae.enc_FD[latents] = encoder_scale * norm * unit_ND
    sae.enc_bias_F[latents] = 0.0
    for parameter in (sae.dec_FD, sae.enc_FD, sae.enc_bias_F):
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[parameter]:
                optimizer.state[parameter][moment][latents] = 0.0
    return latents
