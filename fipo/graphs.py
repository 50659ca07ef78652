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
    None, in its turn. What it reads has to be held until `join`, what it makes for the rest until the next `fork`."""

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
        self.device, self.beside = device, Beside(device)
        self._met: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._tensors: list[Tensor] = []
        self._numbers: list[Tensor] = []
        self.padded: tuple[Tensor, Tensor] | None = None
        """Candidate pairs, and those filled up (`fipo.train.padded`)."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> "StepGraphs":
        """None of them: they work on the tensors of this state."""
        return StepGraphs(self.device)

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
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        pool = next(iter(self._recorded.values()))[0].pool() if self._recorded else None
        # The memory in which cuBLAS works is one for all that is recorded on a stream, and in the pool of the first of
        # them: the recordings of several states would share it, and lose it with one of them (pytorch issue 193402).
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(graph, pool=pool):
            try:
                result = step(*self._tensors, *self._numbers)
            except BaseException:
                self.beside.join()  # else the end of the recording fails too, and that is what is told
                raise
        torch._C._cuda_clearCublasWorkspaces()
        self._recorded[plan] = graph, result
