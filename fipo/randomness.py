"""Independent random streams from one seed.

Every use of chance in a run has a generator of its own, named after what it is for, so adding one use never shifts the
numbers of another. Only entry points call this; everything else takes a `torch.Generator`.
"""

import hashlib

import torch


def plain_generator(seed: int) -> torch.Generator:
    """A generator seeded by the number itself: for replaying what another program draws (fipo.replay)."""
    return torch.Generator().manual_seed(seed)


def generator_for(seed: int, *purpose: object, device: str = "cpu") -> torch.Generator:
    """A generator seeded by SHA-256 of the seed and the purpose, e.g. `generator_for(42, "init", layer)`."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
