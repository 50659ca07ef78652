"""The largest numbers of every row (`fipo.search`).

NumPy's partition, which has vector code, finds them; compiled loops prepare what it gets and read what it leaves. A
number that is partitioned has its key above and 65,535 - its place below. Shapes: N rows, F latents, K of them a row, T
tiles, M places of their members.
"""

import numpy as np
import torch
from torch import Tensor

from fipo.native.compiler import as_numpy, compiled, index
from fipo.search import TILE, tiles_of_rows
from fipo.threads import in_threads

LONGEST = 2**16
"""Numbers of a row, as many as have a place of their own."""
_LOW = LONGEST - 1
_CHUNK = 2**19
"""Keys that stay in the cache of a core."""


@compiled
def _maxima(keys_NF, maxima_NT):
    tiles = index(maxima_NT.shape[1])
    for row in range(len(keys_NF)):
        for tile in range(tiles):
            maxima_NT[row, tile] = keys_NF[row, tile]
        for start in range(tiles, keys_NF.shape[1], tiles):
            for tile in range(tiles):
                maxima_NT[row, tile] = max(maxima_NT[row, tile], keys_NF[row, index(start) + tile])


@compiled
def _packed(keys_NF, packed_NF):
    for row in range(len(keys_NF)):
        for place in range(keys_NF.shape[1]):
            packed_NF[row, place] = (np.int32(keys_NF[row, place]) << 16) | (_LOW - np.int32(place))


@compiled
def _members(keys_NF, tiles_NK, tiles, packed_NM):
    chosen = tiles_NK.shape[1]
    for row in range(len(keys_NF)):
        place = 0
        for start in range(0, keys_NF.shape[1], tiles):
            for n in range(chosen):
                key = np.int32(keys_NF[row, index(start + tiles_NK[row, n])])
                packed_NM[row, place] = (key << 16) | (_LOW - place)
                place += 1


@compiled
def _unpacked(packed_NF, tiles_NK, tiles, latents_NK):
    chosen, first = latents_NK.shape[1], packed_NF.shape[1] - latents_NK.shape[1]
    for row in range(len(packed_NF)):
        for n in range(chosen):
            place = _LOW - (packed_NF[row, first + n] & _LOW)
            latents_NK[row, n] = tiles_NK[row, place % chosen] + place // chosen * tiles if tiles else place


def largest(keys_BF: Tensor, k: int) -> Tensor:
    """Latents [B, K] of each row's K largest int16 numbers, as `fipo.search.largest_of_rows` finds them."""
    latents_BK = torch.empty(len(keys_BF), k, dtype=torch.int64)
    keys, latents = as_numpy(keys_BF), as_numpy(latents_BK)
    rows = max(1, _CHUNK // keys.shape[1])
    parts = range(0, len(keys), rows)
    in_threads(lambda row: _largest(keys[row : row + rows], latents[row : row + rows]), parts)
    return latents_BK


def _largest(keys_NF: np.ndarray, latents_NK: np.ndarray) -> None:
    (rows, columns), k = keys_NF.shape, latents_NK.shape[1]
    tiles = tiles_of_rows(columns, k)
    packed_NM, tiles_NK = np.empty((rows, TILE * k if tiles else columns), np.int32), np.empty_like(latents_NK)
    if tiles:
        maxima_NT = np.empty((rows, tiles), np.int16)
        _maxima(keys_NF, maxima_NT)
        _largest(maxima_NT, tiles_NK)
        _members(keys_NF, tiles_NK, tiles, packed_NM)
    else:
        _packed(keys_NF, packed_NM)
    if k < packed_NM.shape[1]:
        packed_NM.partition(packed_NM.shape[1] - k, axis=1)
    _unpacked(packed_NM, tiles_NK, tiles, latents_NK)
