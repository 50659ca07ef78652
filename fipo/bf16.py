"""Codes and pooled means in the model's own number format, rounded where SAEBench rounds them.

SAEBench casts the SAE to the format of the language model (bfloat16 for Gemma) and stays in it: weights, codes, sums
and means. A position counts as content where its activations do not sum to exactly 0, which in bfloat16 befalls a few
real tokens: those add to the sum of the model's activations but not to the count, and not at all to that of the codes.
Shapes: N texts, B tokens or texts of a batch, L positions, D model width, F latents.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fipo.activations import BatchTopK, JumpReLU
from fipo.sae import SAE


@torch.no_grad()
def encode_in(sae: SAE, acts_BD: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [B, F] of model activations, all arithmetic in `dtype`; for an SAE in raw units, as saved ones are."""
    x_BD = acts_BD.to(dtype) - sae.mean_D.to(dtype)
    pre_BF = x_BD @ sae.enc_DF.to(dtype) + sae.enc_bias_F.to(dtype)
    match sae.activation:
        case JumpReLU(threshold_F=threshold_F):
            return torch.where(pre_BF > threshold_F.to(dtype), pre_BF, 0)
        case BatchTopK(threshold=threshold):
            return torch.where(pre_BF > threshold.to(dtype), pre_BF, 0)
    return sae.activation(pre_BF)


@torch.no_grad()
def pool_in(
    acts_ND: Tensor, text_N: Tensor, texts: int, encode: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Means of activations [texts, D] and of codes [texts, width] over each text's content tokens, in `dtype`.

    `encode` takes activations and gives codes in `dtype` (`encode_in`). Tokens of a text are in their order.
    """
    llm_ND = torch.full((texts, acts_ND.shape[1]), torch.nan, dtype=dtype)
    sae_NF = torch.full((texts, width), torch.nan, dtype=dtype)
    for text_B, acts_BLD in _blocks(acts_ND.to(dtype), text_N):
        content_BL1 = (acts_BLD.sum(-1, keepdim=True) != 0).to(dtype)
        count_B1 = content_BL1.sum(1)
        codes_BLF = encode(acts_BLD.flatten(0, 1)).unflatten(0, acts_BLD.shape[:2])
        llm_ND[text_B] = acts_BLD.sum(1) / count_B1
        sae_NF[text_B] = (codes_BLF * content_BL1).sum(1) / count_B1
    return llm_ND, sae_NF


def _blocks(acts_ND: Tensor, text_N: Tensor, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Texts [B] and their activations [B, L, D], zero behind a text's end."""
    order_N = text_N.argsort(stable=True)
    owners_B, counts_B = text_N[order_N].unique_consecutive(return_counts=True)
    rows = order_N.split(counts_B.tolist())
    for start in range(0, len(owners_B), size):
        parts = [acts_ND[part] for part in rows[start : start + size]]
        yield owners_B[start : start + size], torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
