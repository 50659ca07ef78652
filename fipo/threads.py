"""The same work on several parts at once, by as many threads as torch has. It has to let others run meanwhile, as
NumPy's vector code and compiled loops do."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def in_threads(work: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
    """`work` on each part, neighbours by one thread; its results in the order of the parts."""
    threads = max(1, min(torch.get_num_threads(), len(parts)))
    shares = [parts[len(parts) * n // threads : len(parts) * (n + 1) // threads] for n in range(threads)]

    def one_by_one(share: Sequence[Any]) -> list[Any]:
        return [work(part) for part in share]

    others = [_helpers(threads - 1).submit(one_by_one, share) for share in shares[1:]]
    done = one_by_one(shares[0])
    return done + [result for other in others for result in other.result()]


@functools.cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    """Threads that stay, since each new one would have its own arena of memory."""
    return ThreadPoolExecutor(threads)
