"""What a run asks of the data: held-out and training activations, and those of labelled texts.

Both are cached under a key that names all they depend on: weights, layers, tokeniser, text, context, packing, dtype.
Shapes: N tokens, L layers, D model width.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fipo.config import Text
from fipo.data.buffer import ActivationSource, LiveSource, StoredSource
from fipo.data.harvest import Chunk, first_rows, harvest, order_of
from fipo.data.labelled import LabelledText
from fipo.data.lm import LanguageModel
from fipo.data.store import ActivationStore, open_or_harvest, too_short
from fipo.data.text import open_text
from fipo.errors import UserError
from fipo.metrics import LEAST_VARIANCE
from fipo.progress import progress


def training_activations(text: Text, lm: LanguageModel) -> tuple[ActivationStore, ActivationSource]:
    """Held-out activations and the stream to train on: the first rows of the text are held out, as many as hold the
    tokens asked for, and the next trained. A row is never in both, and rows are taken before any is sorted by length:
    held-out text is as long as the text trained on."""
    source = open_text(text)
    if text.packed and lm.begin_id is None:
        raise UserError(
            f"text.packed is true, and {lm.name} is an encoder, whose rows are whole texts; set it to false"
        )
    key = _key(lm, source.fingerprint, text.packed)
    held, tokens = text.held_out_tokens, text.tokens

    def rows() -> Iterator[list[int]]:
        return (lm.packed_rows if text.packed else lm.token_rows)(source.texts())

    def held_out(skip: int) -> Iterator[Chunk]:
        return _with_progress("held-out", harvest(lm, first_rows(rows(), lm, held), skip=skip), held - skip)

    def trained(skip: int) -> Iterator[Chunk]:
        after = rows()
        for _ in first_rows(after, lm, held):
            pass
        return harvest(lm, first_rows(after, lm, tokens), skip=skip)

    order = order_of(lm)
    size = len(lm.layers) * lm.width * lm.dtype.itemsize
    both = held + tokens * text.cached
    store = open_or_harvest({**key, "rows": "first", "tokens": held}, held_out, held, both * size, order)
    if not text.cached:
        return store, LiveSource(lambda skip: _cut(trained(skip), skip, tokens), f"{store.folder.name}, {order}")
    key |= {"rows": "next", "held_out": held, "tokens": tokens}

    def shown(skip: int) -> Iterator[Chunk]:
        return _with_progress("harvest", trained(skip), tokens - skip)

    return store, StoredSource(open_or_harvest(key, shown, tokens, tokens * size, order))


def probe_key(data: LabelledText, lm: LanguageModel) -> dict[str, Any]:
    """Names all that the activations of a labelled dataset depend on."""
    return _key(lm, data.fingerprint, packed=False)


def probe_store(data: LabelledText, lm: LanguageModel) -> ActivationStore:
    """Activations of every content token of a labelled dataset on disk, texts numbered as in `data.texts`."""
    return open_or_harvest(
        probe_key(data, lm), lambda skip: probe_chunks(data.texts, lm, skip), None, order=order_of(lm)
    )


def probe_chunks(texts: list[str], lm: LanguageModel, skip: int = 0) -> Iterator[Chunk]:
    """The same, straight from the model, from token `skip` on."""
    return harvest(lm, lm.token_rows(texts), skip=skip)


def statistics(acts_NLD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [L, D], and the scale [L] that brings the mean squared norm of the centred rows to D; from float64 sums."""
    width = acts_NLD.shape[2]
    sum_LD = torch.zeros(acts_NLD.shape[1:], dtype=torch.float64)
    square_L = torch.zeros(acts_NLD.shape[1], dtype=torch.float64)
    for part_NLD in acts_NLD.split(8192):
        part_NLD = part_NLD.cpu().double()
        sum_LD += part_NLD.sum(0)
        square_L += part_NLD.pow(2).sum((0, 2))
    mean_LD = sum_LD / acts_NLD.shape[0]
    square_L /= acts_NLD.shape[0]
    variance_L = square_L - mean_LD.pow(2).sum(1)
    if not (variance_L > LEAST_VARIANCE * square_L).all():
        raise UserError("the activations of a layer do not vary: every token has the same; check model and text")
    return mean_LD.float(), (width / variance_L).sqrt().float()


def _key(lm: LanguageModel, text: str, packed: bool) -> dict[str, Any]:
    return {
        "model": lm.model_hash,
        "layers": list(lm.layers),
        "tokenizer": lm.tokenizer_hash,
        "text": text,
        "context": lm.context,
        "packed": packed and [lm.tokenizer.eos_token_id],  # which stands between texts
        "dtype": str(lm.dtype),
    }


def _cut(chunks: Iterable[Chunk], start: int, tokens: int) -> Iterator[Chunk]:
    """The chunks of a text from token `start` on, up to so many tokens of it; `UserError` where it has fewer."""
    for chunk in chunks:
        if start >= tokens:
            return
        yield Chunk(*(part_N[: tokens - start] for part_N in chunk))
        start += len(chunk.text_N)
    if start < tokens:
        raise too_short(start, tokens)


def _with_progress(title: str, chunks: Iterable[Chunk], total: int) -> Iterator[Chunk]:
    with progress(title, total, "tokens") as advance:
        for chunk in chunks:
            advance(len(chunk.text_N), "")
            yield chunk
