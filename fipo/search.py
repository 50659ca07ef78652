"""The largest numbers of a row or of a batch: which pre-activations become codes.

On a processor NumPy finds them, whose partition and search have vector code where torch's have none, under as many
threads as torch has; for rows compiled loops help it (fipo.native); on a GPU kernels do it all (fipo.kernels).
bfloat16 is searched by its bits, int16: they are ordered as the positive numbers are, and below them for the others.
Shapes: B tokens, F latents, K of them a token, N places, T tiles of G latents.
"""

import numpy as np
import torch
from torch import Tensor

from fipo.sparse import kernels_for, native_for
from fipo.threads import in_threads

TILE = 8
"""G. The maxima cost one fast pass and leave an eighth to search."""
_CHUNK = 2**18
"""Numbers that stay in the cache of a core."""


def ordered(values: Tensor) -> Tensor:
    """Numbers that are ordered as the positive `values` are, and below them where these are not."""
    return values.view(torch.int16) if values.dtype == torch.bfloat16 else values


def largest_of_rows(pre_BF: Tensor, k: int) -> Tensor:
    """Latents [B, K] of each token's K largest values. Among the negative, which give no code, bfloat16 may choose
    otherwise.

    Latents f, f + F/G, f + 2F/G, .. are one tile; the K tiles of largest maximum hold what is sought."""
    keys_BF = ordered(pre_BF)
    kernels = (kernels_for(keys_BF) or native_for(keys_BF, torch.int16)) if keys_BF.dtype == torch.int16 else None
    if kernels and keys_BF.shape[1] <= kernels.LONGEST:
        return kernels.largest(keys_BF, k)
    tiles = tiles_of_rows(keys_BF.shape[1], k)
    if not tiles:
        return _partitioned(keys_BF, k)
    keys_BGT = keys_BF.unflatten(1, (-1, tiles))
    tiles_BK = largest_of_rows(keys_BGT.amax(1), k)
    members_BGK = keys_BGT.gather(2, tiles_BK[:, None, :].expand(-1, TILE, -1))
    places_BK = largest_of_rows(members_BGK.flatten(1), k)
    return tiles_BK.gather(1, places_BK % k) + places_BK.div(k, rounding_mode="floor").mul_(tiles)


def largest_of_batch(pre_BF: Tensor, count: int, floor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Values, tokens and latents of the `count` largest values of a batch, as far as they are positive, and of all that
    equal the least of them, ordered by token; on a GPU with zeros after them, and how many they are, 0-d.

    `floor`, 0-d, has no influence on the result: the search begins above it, and is done again without it where too
    few numbers are there.
    """
    kernels, keys_BF, found = kernels_for(pre_BF), ordered(pre_BF), None
    floor = ordered(floor.to(pre_BF.dtype))
    if kernels and keys_BF.dtype == torch.int16:
        places_N, found = kernels.largest_of_batch(keys_BF, count, floor)
        there_N = torch.arange(len(places_N), device=found.device) < found
        values_N = torch.where(there_N, pre_BF.flatten()[places_N], 0)
    else:
        tiny = ordered(torch.tensor(torch.finfo(pre_BF.dtype).tiny, dtype=pre_BF.dtype)).item()
        places_N = _at_least(keys_BF, max(floor.item(), tiny))
        if len(places_N) < count:
            maxima_BT = keys_BF.unflatten(1, (-1, _tiles(keys_BF.shape[1]))).amax(1)
            few = count <= maxima_BT.numel()  # below their `count`-th largest none can be among those sought
            places_N = _at_least(keys_BF, max(_kth_largest(maxima_BT.flatten(), count), tiny) if few else tiny)
        if len(places_N) > count:
            keys_N = keys_BF.flatten()[places_N]
            places_N = places_N[_at_least(keys_N, _kth_largest(keys_N, count))]
        values_N = pre_BF.flatten()[places_N]
    token_N = places_N // pre_BF.shape[1]
    return values_N, token_N, places_N - token_N * pre_BF.shape[1], found


def _tiles(latents: int) -> int:
    """T; tiles of one latent each where F is no multiple of G."""
    return latents // TILE if latents % TILE == 0 else latents


def tiles_of_rows(latents: int, k: int) -> int:
    """T; 0 where the K largest of a row had better be sought without tiles."""
    tiles = _tiles(latents)
    return tiles if 2 * k <= tiles < latents else 0


def _partitioned(keys_BF: Tensor, k: int) -> Tensor:
    """Places [B, K] of each row's K largest numbers; of equal int16 ones the first. A partition gives no places: they
    are the lower half of what is partitioned."""
    columns = keys_BF.shape[1]
    if keys_BF.device.type != "cpu" or keys_BF.dtype != torch.int16 or columns > 65_536 or k == columns:
        return keys_BF.topk(k, dim=-1, sorted=False).indices
    places_F = torch.arange(65_535, 65_535 - columns, -1, dtype=torch.int32)
    packed_BF = keys_BF.int().mul_(65_536).add_(places_F)
    in_threads(lambda part_NF: part_NF.numpy().partition(columns - k, axis=1), packed_BF.chunk(torch.get_num_threads()))
    return 65_535 - (packed_BF[:, columns - k :] & 65_535).long()


def _at_least(keys: Tensor, least: float) -> Tensor:
    """Places, rising, in all the numbers one after another, of those that are not less."""
    flat = keys.flatten()
    if flat.device.type != "cpu":
        return true_places(flat >= least)
    starts = range(0, len(flat), _CHUNK)
    numbers = flat.numpy()
    found = in_threads(lambda start: start + np.flatnonzero(numbers[start : start + _CHUNK] >= least), starts)
    return torch.from_numpy(np.concatenate(found)) if found else torch.zeros(0, dtype=torch.int64)


def true_places(truths: Tensor) -> Tensor:
    """Places, rising, in all the truth values one after another, of those that are true."""
    flat = truths.flatten()
    return torch.from_numpy(np.flatnonzero(flat.numpy())) if flat.device.type == "cpu" else flat.nonzero().squeeze(1)


def _kth_largest(keys_N: Tensor, k: int) -> float:
    """The k-th largest number."""
    if keys_N.device.type != "cpu":
        return keys_N.topk(k, sorted=False).values.min().item()
    return np.partition(keys_N.numpy(), len(keys_N) - k)[len(keys_N) - k].item()
