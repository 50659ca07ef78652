"""A trial of a language model: is what its hooks read the residual stream, whatever else is in the batch?

Of an unknown architecture the list of blocks could be another list, a block could give another shape, and padding could
be seen by the tokens beside it. Each would be wrong numbers and no error. Shapes: B = 2 rows, S positions, L layers, D
model width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fipo.errors import UserError

if TYPE_CHECKING:
    from fipo.data.lm import LanguageModel

MOST_CHANGE = 0.1
"""Share of its norm by which a token may change with the padding beside it: rounding in bfloat16 makes up .02."""


def check_reading(lm: "LanguageModel") -> None:
    """Run two short rows, the second nearly all padding; `UserError` where the hooks cannot be relied on."""
    special = set(lm.special_ids)
    words = [token for token in range(len(lm.tokenizer)) if token not in special][:4]
    ids_BS = torch.tensor([words, words[:1] + [lm.pad_id] * (len(words) - 1)])
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    mask_BS[1, 1:] = False
    try:
        acts_LBSD = lm.activations(ids_BS, mask_BS)
        alone_LBSD = lm.activations(ids_BS[1:, :1], mask_BS[1:, :1])
        with torch.inference_mode():
            own = lm.forward(ids_BS, mask_BS, output_hidden_states=True).hidden_states or ()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever an architecture of another kind raises
        raise UserError(
            f"{_named(lm)} does not run on rows of token ids, so that it cannot be read: {error}"
        ) from error
    shape = (len(lm.layers), *ids_BS.shape, lm.width)
    if acts_LBSD.shape != shape:
        raise UserError(
            f"{_named(lm)} gives tensors of shape {tuple(acts_LBSD.shape)} behind its blocks; expected {shape}, one "
            "vector a token and layer: it cannot be read"
        )
    for layer, acts_BSD in zip(lm.layers, acts_LBSD, strict=True):
        # Behind the last block a model gives it normed only.
        if layer + 1 < len(lm.blocks) and not any(_apart(acts_BSD, told_BSD) < MOST_CHANGE for told_BSD in own):
            raise UserError(
                f"{_named(lm)}: what its {type(lm.blocks[layer]).__name__} {layer} gives is not the residual stream as "
                "the model itself gives it: it cannot be read"
            )
    if _apart(acts_LBSD[:, 1:, :1], alone_LBSD) > MOST_CHANGE:
        raise UserError(
            f"{_named(lm)} does not keep padding from the tokens beside it, so that activations would depend on what "
            "else is in the batch: it cannot be read"
        )


def _apart(acts: Tensor, others: Tensor) -> float:
    """Distance as a share of the norm; infinite where shapes differ, 0 where there is no number at all."""
    if acts.shape != others.shape:
        return float("inf")
    acts, others = acts.float(), others.float()
    return ((acts - others).norm() / others.norm()).nan_to_num(0.0).item()


def _named(lm: "LanguageModel") -> str:
    return f"model {lm.name} ({type(lm.model).__name__})"
