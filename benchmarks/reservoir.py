"""The plan's second claim: reservoirs and queues by `torch.topk` are ten times faster than by `heapq`.

    python -m benchmarks.reservoir [--json OUT]

Both keep the same items, by the same keys (checked before anything is timed). The stream is steady: weights of all
batches are alike, and the reservoir is full before the clock starts, which favours heapq, whose pushes then are rare.
heapq is given keys as a list made of a tensor, or draws them in Python; the faster of the two is the rival.
"""

import heapq
import math
import random
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import arguments, command, interleaved, publish
from fipo.reservoir import BucketQueues, PriorityReservoir


class HeapReservoir:
    """A-Res as usually written: a heap of (key, number) and a list of items."""

    def __init__(self, slots: int) -> None:
        self.slots, self.heap, self.items = slots, [], {}

    def merge(self, keys: list[float], items: Tensor, first: int) -> None:
        """Offer one batch; `first`: number of its first item."""
        for place, key in enumerate(keys):
            if len(self.heap) < self.slots:
                heapq.heappush(self.heap, (key, first + place))
            elif key > self.heap[0][0]:
                _, gone = heapq.heappushpop(self.heap, (key, first + place))
                del self.items[gone]
            else:
                continue
            self.items[first + place] = items[place].clone()


def heap_queues(queue: list[int], keys: list[float], queues: int, capacity: int) -> list[list[tuple[float, int]]]:
    """Every queue's items of largest key, by one heap a queue."""
    heaps: list[list[tuple[float, int]]] = [[] for _ in range(queues)]
    for item, (number, key) in enumerate(zip(queue, keys, strict=True)):
        heap = heaps[number]
        if len(heap) < capacity:
            heapq.heappush(heap, (key, item))
        elif key > heap[0][0]:
            heapq.heapreplace(heap, (key, item))
    return heaps


def reservoir_row(slots: int, batch: int, width: int, held_share: float) -> dict[str, object]:
    """One steady reservoir; `held_share`: how much of the stream so far it holds."""
    generator = torch.Generator().manual_seed(0)
    seen = int(slots / held_share)
    items_BD = torch.randn(batch, width, generator=generator)
    ours, theirs, plain = PriorityReservoir(slots, (width,)), HeapReservoir(slots), HeapReservoir(slots)
    for start in range(0, seen, batch):
        keys_B = ours.draw_keys(torch.ones(batch), generator)
        ours.merge(keys_B, items_BD)
        theirs.merge(keys_B.tolist(), items_BD, start)
        plain.merge(keys_B.tolist(), items_BD, start)
    assert sorted(ours.keys_R.tolist()) == sorted(key for key, _ in theirs.heap)
    counter, counter_plain, chance = [seen], [seen], random.Random(0)

    def heap_offer() -> None:
        keys_B = ours.draw_keys(torch.ones(batch), generator)
        theirs.merge(keys_B.tolist(), items_BD, counter[0])
        counter[0] += batch

    def plain_offer() -> None:
        plain.merge([math.log(chance.random()) for _ in range(batch)], items_BD, counter_plain[0])
        counter_plain[0] += batch

    def offer() -> None:
        ours.offer(items_BD, torch.ones(batch), generator)

    seconds = interleaved({"heapq": heap_offer, "heapq, keys drawn in Python": plain_offer, "topk": offer}, 30)
    what = f"reservoir R={slots:,} B={batch:,} D={width}, stream {1 / held_share:.0f} R long"
    return _row(what, batch, seconds)


def queues_row(queues: int, capacity: int, batch: int) -> dict[str, object]:
    """All buckets of one LSH table."""
    generator = torch.Generator().manual_seed(0)
    queue_B = torch.randint(queues, (batch,), generator=generator)
    keys_B, items_B = torch.rand(batch, generator=generator), torch.arange(batch)

    def topk() -> BucketQueues:
        table = BucketQueues(queues, capacity)
        table.offer(queue_B, keys_B, items_B)
        return table

    def heap() -> list[list[tuple[float, int]]]:
        return heap_queues(queue_B.tolist(), keys_B.tolist(), queues, capacity)

    held = [sorted(item for item in row if item >= 0) for row in topk().items_QC.tolist()]
    assert held == [sorted(item for _, item in one) for one in heap()]
    what = f"queues Q={queues:,} C={capacity} B={batch:,}"
    return _row(what, batch, interleaved({"heapq": heap, "topk": topk}, 30))


def _row(what: str, items: int, seconds: dict[str, float]) -> dict[str, object]:
    return {
        "what": what,
        **{f"{name} items/s": items / value for name, value in seconds.items()},
        "times faster": min(value for name, value in seconds.items() if name != "topk") / seconds["topk"],
    }


def main() -> None:
    """Measure and publish."""
    given = arguments(__doc__, slots=4096, batch=4096, width=384)
    cases: list[tuple[str, Callable[[], dict[str, object]]]] = [
        ("reservoir_filling", lambda: reservoir_row(given.slots, given.batch, given.width, 0.5)),
        ("reservoir_steady", lambda: reservoir_row(given.slots, given.batch, given.width, 0.02)),
        ("reservoir_keys_only", lambda: reservoir_row(given.slots, given.batch, 1, 0.02)),
        ("queues", lambda: queues_row(32, 128, 3072)),
        ("queues_16k", lambda: queues_row(64, 128, 16_384)),
    ]
    rows = {name: case() for name, case in cases}
    ratios = {f"{name}_vs_heapq": float(row["times faster"]) for name, row in rows.items()}  # type: ignore[arg-type]
    publish("reservoir", list(rows.values()), ratios, given.json)


if __name__ == "__main__":
    sys.exit(command(main))
