"""What a computation must do, counted while it runs on a CPU: operations, bytes, kernels; and how long that takes.

Matrix products count by their FLOP (their operands are read once, which is less); every other operation by the bytes of
the tensors that it reads and writes, gathers by the rows that they touch. Views cost nothing. The roofline of a
computation is the sum over its operations of the limit that binds each, on one of the cards named below.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Card(NamedTuple):
    """A card by its data sheet."""

    name: str
    flops: float = 989e12
    """Dense bfloat16 FLOP/s."""
    flops_32: float = 67e12
    """The same in float32, which PyTorch keeps to unless told otherwise."""
    bytes: float = 3.35e12
    """Bytes/s of its memory."""


H100, H200 = Card("H100 SXM"), Card("H200 SXM", bytes=4.8e12)
HOST_FLOPS = 5e11
"""FLOP/s in float64 of a host of 16 cores: 16 · 2 GHz · 16."""
HOST_BYTES = 1e11
"""Bytes/s of the host's memory."""

FLOP_EFFICIENCY = 0.55
"""Share of the peak that matrix products of these sizes are assumed to reach, on the card and on its host."""
BYTES_EFFICIENCY = 0.7
"""Share of the bandwidth that the other operations are assumed to reach."""
LAUNCH_SECONDS = 5e-6
"""Assumed time to start one kernel from Python; a computation takes no less than that for each."""

BAGS = ("_embedding_bag", "_embedding_bag_forward_only")
GATHERS = ("index", "index_select", "gather")


class Cost(NamedTuple):
    """All that a computation does."""

    flop: float = 0.0
    """In 16-bit products."""
    flop_32: float = 0.0
    """In 32-bit products."""
    moved: float = 0.0
    """Bytes."""
    kernels: float = 0.0
    host_flop: float = 0.0
    """On the processor."""
    host_moved: float = 0.0
    """Bytes, on the processor."""

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """Both, the other so many times."""
        return Cost(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))

    def times(self, count: float) -> "Cost":
        """So many of them."""
        return Cost().plus(self, count)

    def roofline(self, card: Card) -> float:
        """Seconds at the peaks."""
        busy = self.flop / card.flops + self.flop_32 / card.flops_32 + self.moved / card.bytes
        return busy + self.host_flop / HOST_FLOPS + self.host_moved / HOST_BYTES

    def predicted(self, card: Card) -> float:
        """Seconds at the assumed efficiencies."""
        busy = (self.flop / card.flops + self.flop_32 / card.flops_32) / FLOP_EFFICIENCY
        busy += self.moved / card.bytes / BYTES_EFFICIENCY
        host = self.host_flop / HOST_FLOPS / FLOP_EFFICIENCY + self.host_moved / HOST_BYTES / BYTES_EFFICIENCY
        return max(busy, self.kernels * LAUNCH_SECONDS) + host


class Counter(TorchDispatchMode):
    """Counts what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it; one that is made of others (under inference_mode they come whole), those."""
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if not func.is_view:
            self.cost = self.cost.plus(operation(func, args, kwargs, out))
        return out


def operation(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Cost:
    """One operation of ATen."""
    flops = flop_registry.get(func._overloadpacket)
    if flops is not None:
        flop = float(flops(*args, **kwargs, out_val=out))
        wide = next(_tensors(args)).dtype in (torch.float32, torch.float64)
        return Cost(flop_32=flop, kernels=1) if wide else Cost(flop=flop, kernels=1)
    name = func._overloadpacket.__name__
    if name in BAGS:  # weight [R, D], indices [N]
        return Cost(moved=_bytes(args[1:]) + args[1].numel() * _bytes(args[0][:1]) + _bytes(out), kernels=1)
    if name == "_embedding_bag_per_sample_weights_backward":  # gradient [B, D], weight [R, D], indices [N]
        return Cost(moved=args[2].numel() * (_bytes(args[0][:1]) + _bytes(args[1][:1])) + _bytes(out), kernels=1)
    if name in GATHERS:
        return Cost(moved=2 * _bytes(out) + _bytes(args[1:]), kernels=1)
    written = [value for value, spec in zip(args, func._schema.arguments, strict=False) if _is_written(spec)]
    fresh = 0 if any(_is_written(spec) for spec in func._schema.returns) else _bytes(out)
    return Cost(moved=_bytes((args, kwargs)) + _bytes(written) + fresh, kernels=1)


def card_here() -> Card:
    """The card that this machine has, as far as it is one of those above; else the H100."""
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return H200 if "H200" in here else H100


def counted(work: Callable[[], object]) -> Cost:
    """What `work` does."""
    with Counter() as counter:
        work()
    return counter.cost


def _is_written(spec: Any) -> bool:
    """Fused Adam may scale gradients in place; it is never asked to."""
    return spec.name != "grads" and spec.alias_info is not None and spec.alias_info.is_write


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))
