"""The training step on a GPU as a recording (CUDA graph): its two hundred kernels are started by one call.

Started from Python one by one they take longer to start than to run. A step is recorded once for every plan, that is
for all of it that decides which kernels run on what shapes; what else changes from step to step, the schedules' numbers
among it, is read from the device's memory. A recording holds nothing of its own: it works on the tensors of the state,
and a step by it is the step without it, bit for bit. Shapes: B tokens, D model width, P candidate pairs.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

KEPT = 4
"""Recordings that are kept: most plans do not come again once they have passed."""


class Beside:
    """Work that the rest of a step need not wait for: on a GPU on a stream of its own; elsewhere, and where `device` is
    None, in its turn. Tensors that it reads have to be held until `join`."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    def fork(self) -> None:
        """Let the work that follows wait for all that was started so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    @contextmanager
    def work(self) -> Iterator[None]:
        """What is started in here goes beside the rest."""
        with torch.cuda.stream(self._stream):  # of None: nothing
            yield

    def join(self) -> None:
        """Let the rest wait for the work."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class StepGraphs:
    """The recordings of one state's steps. A plan's first step on these shapes is none: kernels are compiled in it."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.beside = Beside(device)
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._met: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._tensors: list[Tensor] = []
        self._numbers: list[Tensor] = []
        self.padded: tuple[Tensor, Tensor] | None = None
        """Candidate pairs, and those filled up (`fipo.train.padded`)."""

    def run(
        self,
        step: Callable[..., Any],
        plan: Hashable,
        tensors: Sequence[Tensor],
        numbers: Sequence[float],
        generator: torch.Generator,
    ) -> Any:
        """What `step(*tensors, *numbers)` gives, the numbers being 0-d tensors; the next run writes over it."""
        if [(new.shape, new.dtype) for new in tensors] != [(held.shape, held.dtype) for held in self._tensors]:
            self._recorded.clear()
            self._met.clear()
            self._tensors = [torch.empty_like(new) for new in tensors]
            self._numbers = [torch.empty((), device=tensors[0].device) for _ in numbers]
        if plan not in self._met:
            self._met.add(plan)
            return step(*tensors, *(torch.full((), number, device=tensors[0].device) for number in numbers))
        for held, new in zip(self._tensors, tensors, strict=True):
            held.copy_(new)
        for held, number in zip(self._numbers, numbers, strict=True):
            held.fill_(number)
        if plan not in self._recorded:
            self._record(step, plan, generator)
        graph, result = self._recorded[plan]
        graph.replay()
        return result

    def _record(self, step: Callable[..., Any], plan: Hashable, generator: torch.Generator) -> None:
        if len(self._recorded) == KEPT:
            self._recorded.clear()
        # On a stream of its own: what is recorded on one shares the memory in which cuBLAS works, and the recordings of
        # several states may run beside one another.
        self._stream = self._stream or torch.cuda.Stream(self._device)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        pool = next(iter(self._recorded.values()))[0].pool() if self._recorded else None
        with torch.cuda.graph(graph, pool=pool, stream=self._stream):
            result = step(*self._tensors, *self._numbers)
        self._recorded[plan] = graph, result
