"""From rows of token ids to activations of content tokens.

Rows are gathered in windows, sorted by length so that little is padded, and run through the language model in batches
whose order mixes the lengths again. Special tokens (begin, end, class, separator, padding) take part in the forward
pass and are left out of the result: their enormous norms would become features. Shapes: N tokens, L layers, D model
width, B rows, S positions.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fipo.data.lm import LanguageModel
from fipo.errors import UserError

BATCH_TOKENS, BATCH_TOKENS_GPU = 2048, 16_384
"""Tokens of a forward pass: few, which stay in a processor's cache, or enough for a GPU to work longer at than a pass
takes to start."""
WINDOW = 1024
"""Rows that are sorted by length together."""


class Chunk(NamedTuple):
    """Activations of one batch of rows."""

    acts_NLD: Tensor
    """In the model's dtype, on the model's device."""
    text_N: Tensor
    """Number of the row each token comes from, int64. Tokens of a row stand together, in their order."""
    token_N: Tensor
    """Token ids, int64."""


def order_of(lm: LanguageModel) -> str:
    """Names what the order of a harvest's tokens depends on, beside the rows."""
    return f"{_batch_tokens(lm)}x{WINDOW}"


def harvest(
    lm: LanguageModel,
    rows: Iterable[list[int]],
    *,
    batch_tokens: int | None = None,
    window: int = WINDOW,
    skip: int = 0,
) -> Iterator[Chunk]:
    """Activations of the content tokens of all rows, window by window. `skip`: content tokens left out at the start
    (whole batches before it never reach the model): the place from which a resumed stream goes on. `batch_tokens`: of
    one forward pass, by default what suits the device."""
    batch_tokens = batch_tokens or _batch_tokens(lm)
    special = torch.tensor(lm.special_ids)
    for numbers, window_rows in _windows(rows, window):
        by_length = sorted(range(len(window_rows)), key=lambda index: (len(window_rows[index]), index))
        for batch in _spread(list(_batches(by_length, window_rows, batch_tokens))):
            ids_BS, mask_BS = _pad([window_rows[index] for index in batch], lm.pad_id)
            content_BS = mask_BS & ~torch.isin(ids_BS, special)
            count = int(content_BS.sum())
            if skip >= count:
                skip -= count
                continue
            acts_LBSD = lm.activations(ids_BS, mask_BS)
            text_B = torch.tensor([numbers + index for index in batch])
            text_N = text_B[:, None].expand_as(content_BS)[content_BS]
            acts_NLD = acts_LBSD[:, content_BS.to(acts_LBSD.device)].transpose(0, 1)
            _check_finite(acts_NLD, lm)
            yield Chunk(acts_NLD[skip:], text_N[skip:], ids_BS[content_BS][skip:])
            skip = 0


def first_rows(rows: Iterator[list[int]], lm: LanguageModel, tokens: int) -> Iterator[list[int]]:
    """Rows until they hold so many content tokens together; `rows` then goes on behind them."""
    special, count = set(lm.special_ids), 0
    while count < tokens and (row := next(rows, None)) is not None:
        count += sum(token not in special for token in row)
        yield row


def _batch_tokens(lm: LanguageModel) -> int:
    return BATCH_TOKENS if lm.device == "cpu" else BATCH_TOKENS_GPU


def _windows(rows: Iterable[list[int]], size: int) -> Iterator[tuple[int, list[list[int]]]]:
    """Up to `size` rows at a time with the number of the first."""
    first, held = 0, []
    for row in rows:
        held.append(row)
        if len(held) == size:
            yield first, held
            first, held = first + size, []
    if held:
        yield first, held


def _batches(order: list[int], rows: list[list[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Runs of `order` whose padded size stays within `batch_tokens` (a longer single row goes alone)."""
    batch: list[int] = []
    for index in order:
        if batch and len(rows[index]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _spread(batches: list[list[int]]) -> list[list[int]]:
    """The batches by the bits of their places read backwards (van der Corput), so that any few that follow one another
    are of all lengths: a buffer holds no more than a part of a window, and must not hold the shortest rows alone."""
    bits = len(batches).bit_length()
    return [batches[place] for place in sorted(range(len(batches)), key=lambda place: f"{place:0{bits}b}"[::-1])]


def _pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, S] and the mask of real positions."""
    longest = max(map(len, rows))
    ids_BS = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], dtype=torch.int64)
    lengths_B = torch.tensor([len(row) for row in rows])
    return ids_BS, torch.arange(longest)[None, :] < lengths_B[:, None]


def _check_finite(acts_NLD: Tensor, lm: LanguageModel) -> None:
    if all(extreme.isfinite() for extreme in acts_NLD.aminmax()):  # both are NaN where there is one
        return
    broken = [layer for place, layer in enumerate(lm.layers) if not acts_NLD[:, place].isfinite().all()]
    raise UserError(
        f"the activations of {lm.name} hold NaN or infinity in layer {', '.join(map(str, broken))} "
        f"(model dtype {lm.dtype}); use workload.dtype float32 or bfloat16, or check the weights"
    )
