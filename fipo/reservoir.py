"""Priority reservoirs and queues as tensors: `torch.topk` in place of `heapq`.

Weighted sampling without replacement from a stream (Efraimidis & Spirakis 2006, A-Res): every item draws one key
log(u)/w, u uniform on (0, 1), and the R largest keys are kept. We store the order-equivalent

    key = log w + λ t - log E,      E = -log u  (exponential),

in float64: it cannot overflow, and forward decay (Cormode et al. 2009), which multiplies the weight of step t by
exp(λ t), is an addition. The key is drawn once, at arrival. One `topk` over [held, new] merges a batch, so the order
of offers does not matter and two reservoirs merge into the one over their union.

Shapes: B items offered, R reservoir slots, Q queues, C capacity of one queue. An empty slot has the key -inf.
"""

import math

import torch
from torch import Tensor

from fipo.sparse import grouped

EMPTY = -math.inf


class PriorityReservoir:
    """R items of a stream, drawn without replacement: one after another, each with a probability in proportion to its
    weight among those left (A-Res).

    Used for the activation reservoir: tokens weighted by reconstruction error, from which dead latents are revived.
    """

    def __init__(
        self,
        slots: int,
        item_shape: tuple[int, ...],
        *,
        half_life: float = math.inf,
        device: torch.device | str = "cpu",
    ) -> None:
        """`half_life`: offers (steps) after which an item's weight counts half against a new one's."""
        self.rate = math.log(2) / half_life
        self.offers = torch.zeros((), dtype=torch.int64, device=device)
        self.keys_R = torch.full((slots,), EMPTY, dtype=torch.float64, device=device)
        self.items_R = torch.zeros(slots, *item_shape, device=device)

    def draw_keys(self, weights_B: Tensor, generator: torch.Generator) -> Tensor:
        """One key an item; weight 0 never enters."""
        exponential_B = torch.empty_like(weights_B, dtype=torch.float64).exponential_(generator=generator)
        return weights_B.double().log() + self.rate * self.offers - exponential_B.log()

    def offer(self, items_B: Tensor, weights_B: Tensor, generator: torch.Generator) -> None:
        """Merge a batch: items [B, ...] with weights [B] >= 0."""
        self.merge(self.draw_keys(weights_B, generator), items_B)
        self.offers += 1

    def merge(self, keys_N: Tensor, items_N: Tensor) -> None:
        """Keep the R largest keys of [held, new]; also merges another reservoir's `keys_R` and `items_R`.

        Only what enters is copied, into the slots of what leaves.
        """
        slots = self.keys_R.shape[0]
        kept_R = torch.cat([self.keys_R, keys_N]).topk(slots, sorted=False).indices
        stays_R, enters_N = (
            torch.zeros(slots + keys_N.shape[0], dtype=torch.bool, device=kept_R.device)
            .index_fill(0, kept_R, True)
            .split([slots, keys_N.shape[0]])
        )
        new_N = _true_places(enters_N, slots)
        free_N = _true_places(~stays_R, new_N.shape[0])
        enters_N = enters_N[new_N]
        self.keys_R[free_N] = torch.where(enters_N, keys_N[new_N], self.keys_R[free_N])
        enters_N = enters_N.unflatten(0, (-1, *[1] * (items_N.dim() - 1)))
        self.items_R[free_N] = torch.where(enters_N, items_N[new_N].to(self.items_R.dtype), self.items_R[free_N])

    def contents(self) -> Tensor:
        """The items held, highest key first; fewer than R while the stream is short."""
        order_R = self.keys_R.argsort(descending=True, stable=True)
        return self.items_R[order_R[self.keys_R[order_R] > EMPTY]]

    def state_dict(self) -> dict[str, Tensor]:
        """Keys, items and the clock."""
        return {"keys_R": self.keys_R, "items_R": self.items_R, "offers": self.offers}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.keys_R.copy_(state["keys_R"])
        self.items_R.copy_(state["items_R"])
        self.offers.copy_(state["offers"])


def _true_places(mask_N: Tensor, most: int) -> Tensor:
    """Where the mask is true, first to last; on a GPU, where counting would wait for the device, `_padded_places`."""
    if mask_N.device.type == "cpu":
        return mask_N.nonzero().squeeze(1)
    return _padded_places(mask_N, most)


def _padded_places(mask_N: Tensor, most: int) -> Tensor:
    """Always `most` places (or all): first where the mask is true, then where it is false."""
    return mask_N.to(torch.uint8).argsort(descending=True, stable=True)[:most]


class BucketQueues:
    """Q priority queues of capacity C, all served at once: each keeps the items of largest key offered to it."""

    def __init__(self, queues: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.keys_QC = torch.full((queues, capacity), EMPTY, device=device)
        self.items_QC = torch.full((queues, capacity), -1, dtype=torch.int64, device=device)

    def offer(self, queue_B: Tensor, keys_B: Tensor, items_B: Tensor, *, ordered: bool = False) -> None:
        """Offer item b with key b to queue `queue_B[b]`; items are numbers >= 0. `ordered`: keys fall from b to b.

        The batch is sorted by queue and key and laid out as one row a queue, cut to C; one `topk` over
        [held, new] then serves all queues. No loop over queues or items.
        """
        queues, capacity = self.keys_QC.shape
        if ordered:
            order_B, starts_S = grouped(queue_B, queues)
        else:
            by_key_B = keys_B.argsort(descending=True, stable=True)
            sorted_B, starts_S = grouped(queue_B[by_key_B], queues)
            order_B = by_key_B[sorted_B]
        row_B = queue_B[order_B]
        column_B = torch.arange(row_B.shape[0], device=row_B.device) - starts_S[row_B]
        fits_B = column_B < capacity
        place = (row_B[fits_B], column_B[fits_B])
        new_keys_QC = torch.full_like(self.keys_QC, EMPTY).index_put(place, keys_B[order_B[fits_B]].to(self.keys_QC))
        new_items_QC = torch.full_like(self.items_QC, -1).index_put(place, items_B[order_B[fits_B]])
        self.keys_QC, kept_QC = torch.cat([self.keys_QC, new_keys_QC], dim=1).topk(capacity, dim=1)
        self.items_QC = torch.cat([self.items_QC, new_items_QC], dim=1).gather(1, kept_QC)
