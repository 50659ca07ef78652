"""The largest numbers of a row or of a batch on a GPU, as `fipo.search` finds them elsewhere. Numbers are int16:
the bits of bfloat16, ordered as these are where they are positive.

Shapes: B tokens, F latents, K of them a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 4096
"""Numbers of a row that `largest` can hold."""
_CHUNK = 2048
"""Numbers of a program of `largest_of_batch`."""
_NUMBERS = 32_768
"""Numbers that are not negative."""
_TINY = 128
"""Bits of the smallest normal bfloat16."""
_TALLIES = 16
"""Tallies that are kept at a time."""


def largest(keys_BF: Tensor, k: int) -> Tensor:
    """Places [B, K], rising, of each row's K largest int16 numbers; of equal ones the first. F at most `LONGEST`."""
    rows, columns = keys_BF.shape
    block = triton.next_power_of_2(columns)
    out_BK = torch.empty(rows, k, dtype=torch.int64, device=keys_BF.device)
    if rows:
        _largest[(rows,)](
            keys_BF.contiguous(), out_BK, columns, k, BLOCK=block, num_warps=max(1, min(16, block // 512))
        )
    return out_BK


@triton.jit
def _largest(keys, out, columns, k, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < columns
    key = tl.load(keys + row * columns + column, mask=inside, other=-32768).to(tl.int32)
    least, beyond = -32768, 32768  # at least k numbers reach `least`, fewer than k reach `beyond`
    for _ in range(16):
        middle = (least + beyond) >> 1
        enough = tl.sum((key >= middle).to(tl.int32)) >= k
        least, beyond = tl.where(enough, middle, least), tl.where(enough, beyond, middle)
    surely, perhaps = (key > least).to(tl.int32), ((key == least) & inside).to(tl.int32)
    room = k - tl.sum(surely)
    both = tl.cumsum(surely + perhaps * 65536, 0)  # two running counts in one
    sure_so_far, equal_so_far = both & 65535, both >> 16
    kept = (surely > 0) | ((perhaps > 0) & (equal_so_far <= room))
    tl.store(out + row * k + sure_so_far + tl.minimum(equal_so_far, room) - 1, column, mask=kept)


def largest_of_batch(keys_BF: Tensor, count: int, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the flat matrix, rising, of the `count` largest int16 numbers that are the bits of a positive normal
    bfloat16, and of all that equal the least of them; and how many they are, 0-d. There are always an eighth more
    places than `count`: those left over are spread over the matrix, and of more equal ones than that the last are
    missing. `floor`, a number 0-d, has no influence on the result; the search is quick where it is little below it.
    """
    keys_BF, numbers, device = keys_BF.contiguous(), keys_BF.numel(), keys_BF.device
    programs = (triton.cdiv(numbers, _CHUNK),)
    tally, again = torch.zeros(_TALLIES + 1, _NUMBERS, dtype=torch.int32, device=device).split([_TALLIES, 1])
    floor_2 = torch.stack([floor.clamp(_TINY, _NUMBERS - 1).int(), floor.new_full((), _TINY).int()])
    least = torch.full((), _TINY - 1, dtype=torch.int32, device=device)  # too little: so the first search is done
    for start, tallies in zip(floor_2, (tally, again), strict=True):
        _tally[programs](keys_BF, start, least, tallies, numbers, len(tallies), NUMBERS=_NUMBERS, CHUNK=_CHUNK)
        _pick[(1,)](tallies.sum(0, dtype=torch.int32), start, least, count, NUMBERS=_NUMBERS, num_warps=16)
    least = least.clamp_min(_TINY)
    found = torch.empty(programs, dtype=torch.int32, device=device)
    _count[programs](keys_BF, least, found, numbers, CHUNK=_CHUNK)
    ends, room = found.cumsum(0), count + count // 8
    places = torch.arange(room, device=device) * (numbers // room)
    _collect[programs](keys_BF, least, ends, places, numbers, room, CHUNK=_CHUNK)
    return places, ends[-1]


@triton.jit
def _tally(keys, floor, least, tallies, numbers, copies, NUMBERS: tl.constexpr, CHUNK: tl.constexpr):
    """How often every number comes that reaches `floor`, unless the least one sought is known: in several tallies,
    since many are alike. (Sums of whole numbers are the same in any order.)"""
    lowest = tl.load(floor)
    if tl.load(least) < lowest:
        place = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
        key = tl.load(keys + place, mask=place < numbers, other=-1).to(tl.int32)
        tally = tallies + (tl.program_id(0) % copies) * NUMBERS
        tl.atomic_add(tally + key, 1, mask=key >= lowest)


@triton.jit
def _pick(tally, floor, least, count, NUMBERS: tl.constexpr):
    """The `count`-th largest number, where so many reach `floor`; nothing where it is known."""
    lowest = tl.load(floor)
    if tl.load(least) < lowest:
        from_above = tl.cumsum(tl.load(tally + (NUMBERS - 1) - tl.arange(0, NUMBERS)), 0)
        found = NUMBERS - 1 - tl.sum((from_above < count).to(tl.int32))
        if found >= lowest:
            tl.store(least, found)


@triton.jit
def _count(keys, least, found, numbers, CHUNK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    key = tl.load(keys + place, mask=place < numbers, other=-1).to(tl.int32)
    tl.store(found + tl.program_id(0), tl.sum((key >= tl.load(least)).to(tl.int32)))


@triton.jit
def _collect(keys, least, ends, places, numbers, room, CHUNK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    kept = (tl.load(keys + place, mask=place < numbers, other=-1).to(tl.int32) >= tl.load(least)).to(tl.int32)
    position = tl.load(ends + tl.program_id(0)) - tl.sum(kept) + tl.cumsum(kept, 0) - 1
    tl.store(places + position, place, mask=(kept > 0) & (position < room))
