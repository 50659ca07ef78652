"""From the tokens of a text to one row: the mean over its content tokens of any map of the activations.

All maps of all layers are pooled in one pass over the tokens, which are never kept: a chunk is encoded, summed text by
text and dropped. What was pooled can be kept in a cache under a key that names all it depends on.

In bfloat16, as SAEBench pools for models that run in it, everything is rounded where SAEBench rounds it: weights,
codes, sums and means. There a token counts where its activations do not sum to exactly 0, which befalls a few real
tokens: those add to the sum of the channels but not to the count, and not at all to that of the codes.

Shapes: N texts, B tokens of a chunk, L layers, D model width, F features.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fipo.activations import threshold_of
from fipo.checkpoint import load_tensors, save_tensors
from fipo.data.harvest import Chunk
from fipo.data.store import cache_root
from fipo.errors import UserError
from fipo.files import read_json, sha256_json, touch, write_json
from fipo.sae import SAE
from fipo.screen import Pairs

Precision = Literal["float32", "bfloat16"]
POOLED = "pooled"
"""The folder of what is pooled, in the cache."""
CODES_IN_CACHE = 2**22
"""Codes made at a time on a CPU: 16 MB, which stay in its cache and need no fresh memory (a quarter less time)."""


class FeatureMap(NamedTuple):
    """Activations of one layer [B, D] -> features [B, F], or those that are not 0."""

    layer: int
    width: int
    encode: Callable[[Tensor], Tensor | Pairs]
    key: tuple[Any, ...]
    """Names all that the map depends on, as plain values."""
    channels: bool = False
    """Are the features the activations themselves?"""
    keep: bool = True
    """Keep what is pooled for the next time?"""


@torch.no_grad()
def pool(
    chunks: Iterable[Chunk],
    texts: int,
    maps: Sequence[FeatureMap],
    layers: Sequence[int],
    *,
    device: str = "cpu",
    precision: Precision = "float32",
    widest: int | None = None,
) -> list[Tensor]:
    """Means over each text's content tokens, [N, F] a map, in `precision`.

    `layers` names the second axis of the chunks. With `bfloat16` the maps are expected to round their own arithmetic.
    `widest`: width that sets how many tokens are encoded at a time, where it is not that of these maps.
    """
    widest = widest or max(one.width for one in maps)
    low = precision == "bfloat16"
    sums = [torch.zeros(texts, one.width, device=device) for one in maps]
    counts = [torch.zeros(texts, device=device) for _ in layers]
    tokens_N = torch.zeros(texts, dtype=torch.int64)
    for acts_BLD, text_B, _ in pieces(chunks, widest, device):
        owners, sizes = text_B.unique_consecutive(return_counts=True)
        starts, rows_B = (sizes.cumsum(0) - sizes).to(device), torch.arange(len(text_B), device=device)
        tokens_N.index_add_(0, owners, sizes)
        owners, owner_B = owners.to(device), text_B.to(device)
        for place, layer in enumerate(layers):
            acts_BD = acts_BLD[:, place].to(device)
            acts_BD = acts_BD.bfloat16() if low else acts_BD.float()
            counted_B = (acts_BD.sum(-1) != 0).float() if low else torch.ones(len(rows_B), device=device)
            counts[place].index_add_(0, owner_B, counted_B)
            for one, sum_NF in zip(maps, sums, strict=True):
                if one.layer == layer:
                    codes = one.encode(acts_BD)
                    if isinstance(codes, Pairs):
                        cell_N = owner_B[codes.token_N] * one.width + codes.latent_N
                        sum_NF.view(-1).scatter_add_(0, cell_N, codes.values_N)
                        continue
                    codes_BF = codes.float()
                    codes_BF = codes_BF * counted_B[:, None] if low and not one.channels else codes_BF
                    sum_NF.index_add_(0, owners, embedding_bag(rows_B, codes_BF, starts, mode="sum"))
    if not tokens_N.all():
        raise UserError(f"probing text {int((tokens_N == 0).nonzero()[0])} has no content token; remove it")
    means = []
    for one, sum_NF in zip(maps, sums, strict=True):
        count_N1 = counts[layers.index(one.layer)][:, None]
        means.append(sum_NF.bfloat16() / count_N1.bfloat16() if low else sum_NF.div_(count_N1))
    return [mean_NF.cpu() for mean_NF in means]


def pieces(chunks: Iterable[Chunk], widest: int, device: str) -> Iterator[Chunk]:
    """On a CPU the chunks in pieces whose codes, of `widest` features, stay in its cache; elsewhere whole. A text may
    end up in two of them."""
    most = max(64, CODES_IN_CACHE // widest)
    for chunk in chunks:
        size = most if device == "cpu" else max(1, len(chunk.text_N))
        yield from map(Chunk, *(part.split(size) for part in chunk))


@torch.no_grad()
def encode_in(sae: SAE, acts_BD: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [B, F] of model activations, all arithmetic in `dtype`; for an SAE in raw units, as saved ones are."""
    x_BD = acts_BD.to(dtype) - sae.mean_D.to(dtype)
    pre_BF = x_BD @ sae.enc_FD.to(dtype).T + sae.enc_bias_F.to(dtype)
    threshold = threshold_of(sae.activation)
    return sae.activation(pre_BF) if threshold is None else torch.where(pre_BF > threshold.to(pre_BF), pre_BF, 0)


def pool_or_read(
    key: dict[str, Any],
    chunks: Callable[[], Iterable[Chunk]],
    texts: int,
    maps: Sequence[FeatureMap],
    layers: Sequence[int],
    *,
    device: str = "cpu",
    precision: Precision = "float32",
) -> list[Tensor]:
    """`pool`, where the cache does not hold it yet; `key` names the tokens. What is damaged is pooled again."""
    keys = [[key, one.layer, *one.key, precision] for one in maps]
    found: list[Tensor | None] = []
    for one, name in zip(maps, keys, strict=True):
        pooled_NF = read_kept(name) if one.keep else None
        shape, dtype = (texts, one.width), getattr(torch, precision)
        fits = pooled_NF is not None and pooled_NF.shape == shape and pooled_NF.dtype == dtype
        found.append(pooled_NF if fits else None)
    missing = [number for number, pooled_NF in enumerate(found) if pooled_NF is None]
    if missing:
        widest = max(one.width for one in maps)  # of all, so that what is missing is made as in a first run, bit by bit
        wanted = [maps[n] for n in missing]
        made = pool(chunks(), texts, wanted, layers, device=device, precision=precision, widest=widest)
        for number, pooled_NF in zip(missing, made, strict=True):
            found[number] = pooled_NF
            if maps[number].keep:
                keep(keys[number], pooled_NF)
    return [pooled_NF for pooled_NF in found if pooled_NF is not None]


def read_kept(key: Any) -> Tensor | None:
    """What `keep` wrote under this key; None where there is nothing, or not what was written."""
    place = _place(key, "safetensors")
    try:
        tensors = load_tensors(place) if place.is_file() else {}
    except UserError:
        return None
    kept = tensors.get("kept")
    if kept is None or "sha256" not in tensors or not tensors["sha256"].equal(_digest(kept)):
        return None
    touch(place)
    return kept


def keep(key: Any, tensor: Tensor) -> None:
    """Keep a tensor in the cache under a key of plain values that names all it depends on."""
    save_tensors(_place(key, "safetensors"), {"kept": tensor, "sha256": _digest(tensor)})


def _digest(tensor: Tensor) -> Tensor:
    content = tensor.contiguous().view(torch.uint8).numpy()
    return torch.tensor(list(hashlib.sha256(content).digest()), dtype=torch.uint8)


def _place(key: Any, ending: str) -> Path:
    return cache_root() / POOLED / f"{sha256_json(key)[:32]}.{ending}"


def numbers_or_read(key: Any, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """A few numbers that take the model to find, kept beside the pooled texts under their key."""
    place = _place(key, "json")
    try:
        numbers = {name: float(value) for name, value in read_json(place).items()}
        touch(place)
        return numbers
    except (UserError, AttributeError, TypeError, ValueError, OverflowError):
        numbers = measure()
        write_json(place, numbers)
        return numbers
