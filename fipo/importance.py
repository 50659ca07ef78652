"""Importance σ_F: an EMA of every latent's activation norm, read through a removable forward hook.

    σ ← β σ + (1-β) · norm_b(codes_BF)      norm: l1 = mean_b |a|, or l2 = sqrt(mean_b a²)

Bias-corrected (Kingma & Ba 2015, section 3), so a constant input gives the constant from the first step. The hook only
collects sums, and only while its module is in training mode; `commit` moves the average once a step. Hence evaluation
never changes σ, and a batch in two halves equals the batch in one, as do its shares in several ranks (for those who
bring a loop for them: fipo.train works in one process). Codes come as a matrix or as pairs (fipo.sparse). Shapes: B
tokens, F latents.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fipo.sparse import Codes


def several_ranks() -> bool:
    """Does this process train together with others?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class ImportanceEMA:
    """σ_F and the dead clock (tokens since each latent last fired). Knows codes, not SAEs."""

    def __init__(self, latents: int, *, decay: float, norm: str = "l1", device: torch.device | str = "cpu") -> None:
        self.decay = decay
        self.norm = norm
        self.mean_F = torch.zeros(latents, device=device)
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.silent_tokens_F = torch.zeros(latents, dtype=torch.int64, device=device)
        self._sum_F = torch.zeros(latents, device=device)
        self._largest_F = torch.zeros(latents, device=device)
        self._tokens = 0

    def attach(self, activation: nn.Module) -> RemovableHandle:
        """Read the codes of `activation` at each of its training forward passes; `handle.remove()` ends it. A deep copy
        of both reads its own codes."""
        return activation.register_forward_hook(self._read)

    def _read(self, module: nn.Module, _inputs: Any, codes: Codes | Tensor) -> None:
        if module.training:
            self.collect(codes)

    @torch.no_grad()
    def collect(self, codes: Codes | Tensor) -> None:
        """Add one batch of non-negative codes, or one part of it."""
        if isinstance(codes, Codes):
            powers_N = codes.values_N if self.norm == "l1" else codes.values_N.pow(2)
            sum_F, largest_F = codes.reduce(powers_N, "sum"), codes.reduce(codes.values_N, "max")
        else:
            sum_F = codes.sum(0, dtype=torch.float32) if self.norm == "l1" else codes.float().pow(2).sum(0)
            largest_F = codes.amax(0).float()
        self._sum_F += sum_F
        torch.maximum(self._largest_F, largest_F, out=self._largest_F)  # in place: a recording reads it (fipo.graphs)
        self._tokens += codes.batch if isinstance(codes, Codes) else codes.shape[0]

    @torch.no_grad()
    def commit(self) -> None:
        """Move the average by what was collected since the last commit, summed over the ranks; nothing if nothing."""
        tokens = self._tokens
        if several_ranks():
            count = torch.tensor([float(tokens)], dtype=torch.float64, device=self._sum_F.device)
            dist.all_reduce(self._sum_F)
            dist.all_reduce(self._largest_F, op=dist.ReduceOp.MAX)
            dist.all_reduce(count)
            tokens = int(count.item())
        if tokens == 0:
            return
        norm_F = self._sum_F / tokens
        norm_F = norm_F if self.norm == "l1" else norm_F.sqrt()
        self.mean_F.mul_(self.decay).add_(norm_F, alpha=1 - self.decay)
        self.weight.mul_(self.decay).add_(1 - self.decay)
        self.silent_tokens_F.add_(tokens).masked_fill_(self._largest_F > 0, 0)
        self.discard()

    def discard(self) -> None:
        """Forget what was collected since the last commit."""
        self._sum_F.zero_()
        self._largest_F.zero_()
        self._tokens = 0

    def rescale(self, factor: float) -> None:
        """Go on as if all codes so far had been `factor` times as large."""
        self.mean_F.mul_(factor)

    def values(self) -> Tensor:
        """σ_F, bias-corrected; zeros before the first commit."""
        return self.mean_F / self.weight.float().clamp_min(1e-30)

    def dead(self, tokens: int) -> Tensor:
        """Which latents have been silent for at least so many tokens, [F]."""
        return self.silent_tokens_F >= tokens

    def state_dict(self) -> dict[str, Tensor]:
        """State between steps (nothing collected is pending there)."""
        return {"mean_F": self.mean_F, "weight": self.weight, "silent_tokens_F": self.silent_tokens_F}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        for name in ("mean_F", "weight", "silent_tokens_F"):
            getattr(self, name).copy_(state[name])
