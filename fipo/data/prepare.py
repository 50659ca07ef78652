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
from fipo.data.harvest import Chunk, harvest
from fipo.data.labelled import LabelledText
from fipo.data.lm import LanguageModel
from fipo.data.store import ActivationStore, open_or_harvest
from fipo.data.text import open_text
from fipo.errors import UserError
from fipo.progress import progress


def training_activations(text: Text, lm: LanguageModel) -> tuple[ActivationStore, ActivationSource]:
    """Held-out activations and the stream to train on: the first tokens of the text are held out, the next trained."""
    source = open_text(text)
    key = _key(lm, source.fingerprint, text.packed)
    held, tokens = text.held_out_tokens, text.tokens

    def produce(skip: int) -> Iterator[Chunk]:
        rows = (lm.packed_rows if text.packed else lm.token_rows)(source.texts())
        return harvest(lm, rows, skip=skip)

    def shown(title: str, skip: int, total: int) -> Iterator[Chunk]:
        return _with_progress(title, produce(skip), total)

    store = open_or_harvest({**key, "from": 0, "tokens": held}, lambda: shown("held-out", 0, held), held)
    if not text.cached:
        return store, LiveSource(lambda skip: produce(held + skip), store.folder.name)
    trained = open_or_harvest({**key, "from": held, "tokens": tokens}, lambda: shown("harvest", held, tokens), tokens)
    return store, StoredSource(trained)


def probe_key(data: LabelledText, lm: LanguageModel) -> dict[str, Any]:
    """Names all that the activations of a labelled dataset depend on."""
    return _key(lm, data.fingerprint, packed=False)


def probe_store(data: LabelledText, lm: LanguageModel) -> ActivationStore:
    """Activations of every content token of a labelled dataset on disk, texts numbered as in `data.texts`."""
    return open_or_harvest(probe_key(data, lm), lambda: probe_chunks(data.texts, lm), tokens=None)


def probe_chunks(texts: list[str], lm: LanguageModel) -> Iterator[Chunk]:
    """The same, straight from the model."""
    return harvest(lm, lm.token_rows(texts))


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
    variance_L = square_L / acts_NLD.shape[0] - mean_LD.pow(2).sum(1)
    if not (variance_L > 0).all():
        raise UserError("the activations of a layer do not vary: every token has the same; check model and text")
    return mean_LD.float(), (width / variance_L).sqrt().float()


def _key(lm: LanguageModel, text: str, packed: bool) -> dict[str, Any]:
    return {
        "model": lm.weights_hash,
        "layers": list(lm.layers),
        "tokenizer": lm.tokenizer_hash,
        "text": text,
        "context": lm.context,
        "packed": packed,
        "dtype": str(lm.dtype),
    }


def _with_progress(title: str, chunks: Iterable[Chunk], total: int) -> Iterator[Chunk]:
    with progress(title, total, "tokens") as advance:
        for chunk in chunks:
            advance(len(chunk.text_N), "")
            yield chunk
