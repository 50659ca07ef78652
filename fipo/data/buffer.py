"""The shuffle buffer: a preallocated pool from which batches are drawn without replacement.

After each batch the holes are closed and as many rows are read in, so every row of the source is served exactly once
an epoch, and a batch mixes rows from the whole pool. Nothing grows, nothing is lost; the state is the pool (as stream
positions where the source can read them again), the position in the source and the generator. Shapes: R rows of the
pool, B batch, L layers, D model width.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from fipo.checkpoint import check_tensors
from fipo.data.harvest import Chunk
from fipo.data.store import ActivationStore
from fipo.errors import UserError


class ActivationSource(Protocol):
    """An endless stream of activations [N, L, D]."""

    key: str
    """Names the stream: what a checkpoint's position refers to."""
    position: int
    """Token of the stream that comes next; a stream that begins again may count on or from 0."""

    def take(self, count: int) -> Tensor:
        """The next activations, at least one and at most `count`."""
        ...

    def seek(self, position: int) -> None:
        """Go on from token `position` of the stream."""
        ...

    def recall(self, places_N: Tensor) -> Tensor | None:
        """The activations at these positions of the stream again; None where the source cannot."""
        ...


class StoredSource:
    """A store, read over and over."""

    def __init__(self, store: ActivationStore) -> None:
        self.store, self.key = store, ", ".join(filter(None, (store.folder.name, store.order)))
        self.position = 0

    def take(self, count: int) -> Tensor:
        """The next activations; a call ends at the end of an epoch."""
        start = self.position % self.store.tokens
        acts_NLD = self.store.read(start, min(count, self.store.tokens - start))
        self.position += acts_NLD.shape[0]
        return acts_NLD

    def seek(self, position: int) -> None:
        """Go on from token `position`, counted over epochs."""
        self.position = position

    def recall(self, places_N: Tensor) -> Tensor:
        """The activations at these positions, [N, L, D]."""
        return self.store.gather(places_N % self.store.tokens)


class LiveSource:
    """The language model itself; nothing is kept on disk. When the text ends it begins again."""

    def __init__(self, produce: Callable[[int], Iterator[Chunk]], key: str = "") -> None:
        """`produce(skip)` harvests the text from content token `skip` on."""
        self._produce, self.key = produce, key
        self.seek(0)

    def take(self, count: int) -> Tensor:
        """The next activations."""
        while self._rest_NLD is None or self._rest_NLD.shape[0] == 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._chunks, self.position = self._produce(0), 0
                chunk = next(self._chunks, None)
            if chunk is None:
                raise UserError("no content token is left to train on; give more text, or hold less of it out")
            self._rest_NLD = chunk.acts_NLD
        acts_NLD, self._rest_NLD = self._rest_NLD[:count], self._rest_NLD[count:]
        self.position += acts_NLD.shape[0]
        return acts_NLD

    def seek(self, position: int) -> None:
        """Go on from token `position`; the text before it is tokenised but not run."""
        self.position = position
        self._chunks = self._produce(position)
        self._rest_NLD: Tensor | None = None

    def recall(self, places_N: Tensor) -> None:
        """Not possible without running the model again."""


class ShuffleBuffer:
    """Seeded batches from a pool of `capacity` rows."""

    def __init__(
        self, source: ActivationSource, capacity: int, batch: int, generator: torch.Generator, device: str = "cpu"
    ) -> None:
        self.source, self.batch, self.generator, self.device = source, batch, generator, device
        self.filled = 0
        self.places_R = torch.zeros(capacity, dtype=torch.int64)
        self.pool_RLD: Tensor | None = None

    def fill(self) -> Tensor:
        """Read rows in until the pool is full; returns the pool."""
        capacity = self.places_R.shape[0]
        while self.filled < capacity:
            place = self.source.position
            acts_NLD = self.source.take(capacity - self.filled)
            self._append(acts_NLD, torch.arange(place, place + acts_NLD.shape[0]))
        assert self.pool_RLD is not None
        return self.pool_RLD

    def _append(self, acts_NLD: Tensor, places_N: Tensor) -> None:
        if self.pool_RLD is None:
            shape = (self.places_R.shape[0], *acts_NLD.shape[1:])
            self.pool_RLD = torch.empty(shape, dtype=acts_NLD.dtype, device=self.device)
        end = self.filled + acts_NLD.shape[0]
        self.pool_RLD[self.filled : end] = acts_NLD
        self.places_R[self.filled : end] = places_N
        self.filled = end

    def next_batch(self) -> Tensor:
        """B rows [B, L, D], drawn without replacement."""
        pool_RLD = self.fill()
        chosen_B = torch.randperm(self.filled, generator=self.generator)[: self.batch]
        batch_BLD = pool_RLD[chosen_B.to(self.device)]
        rest = self.filled - self.batch
        stays_B = torch.ones(self.batch, dtype=torch.bool)
        stays_B[chosen_B[chosen_B >= rest] - rest] = False
        holes, movers = chosen_B[chosen_B < rest], rest + stays_B.nonzero().squeeze(1)
        pool_RLD[holes.to(self.device)] = pool_RLD[movers.to(self.device)]
        self.places_R[holes] = self.places_R[movers]
        self.filled = rest
        return batch_BLD

    def state_dict(self) -> dict[str, Tensor]:
        """Pool, position and generator, as of between two batches."""
        places_N = self.places_R[: self.filled].clone()
        state = {
            "places_N": places_N,
            "position": torch.tensor(self.source.position),
            "generator": self.generator.get_state(),
        }
        if self.pool_RLD is not None and self.source.recall(places_N[:1]) is None:
            state["pool_NLD"] = self.pool_RLD[: self.filled]
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; anything else is refused."""
        places_N = state.get("places_N", torch.zeros(0))
        rows = min(len(places_N), self.places_R.shape[0]) if places_N.dim() else 0
        expected = self.state_dict() | {"places_N": torch.zeros(rows, dtype=torch.int64)}
        pool_NLD = state.get("pool_NLD")
        if pool_NLD is not None:
            expected["pool_NLD"] = pool_NLD.new_empty(rows, *pool_NLD.shape[1:])
        check_tensors(state, expected, "checkpoint, buffer")
        acts_NLD = state["pool_NLD"] if "pool_NLD" in state else self.source.recall(places_N)
        assert acts_NLD is not None
        self.filled = 0
        self._append(acts_NLD, places_N)
        self.source.seek(int(state["position"]))
        self.generator.set_state(state["generator"].cpu())
