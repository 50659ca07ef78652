"""The four activations a_F = act(pre_F): the part of an SAE that makes its codes sparse.

    relu       a = max(pre, 0)                          sparsity: L1, the norm of a decoder row as the unit of its code
    topk       the K largest of a token                 sparsity: by construction (Gao et al. 2024)
    batchtopk  the K B largest of a batch; a learned    sparsity: by construction (Bussmann et al. 2024)
               threshold a latent at inference
    jumprelu   a = pre 1[pre > θ], θ learned            sparsity: L0 by a straight-through estimate
                                                        (Rajamanoharan et al. 2024)

Shapes: B tokens, D model width, F latents, N active pairs. Codes are non-negative. An activation is a module so that a
forward hook can read the codes (fipo.importance); none changes its own state in `forward`. The two that are sparse also
give their codes as pairs, which cost less from there on (fipo.sparse).
"""

import math

import torch
from torch import Tensor, nn

from fipo.search import largest_of_batch, largest_of_rows
from fipo.sparse import Codes, flat, pairs


class Activation(nn.Module):
    """What every activation offers besides `forward(pre_BF, k=None) -> codes_BF`.

    `k`: active latents a token for this once, where it is not the usual number; without a budget it means nothing.
    """

    sparse = False
    """Are codes few by construction, so that pairs had better be used than matrices? Then `forward` gives them."""
    contested = False
    """Do all latents vie for one budget, so that some may be favoured (fipo.favour)? Then `forward` and `observe` take
    `favour_F`."""

    def sparsity(self, pre_BF: Tensor, codes_BF: Tensor, dec_FD: Tensor) -> Tensor:
        """L_sparsity of a batch; 0 where the activation itself sets the budget."""
        return torch.zeros((), device=codes_BF.device)

    def observe(self, codes: Codes | Tensor, favour_F: Tensor | None = None) -> None:
        """Learn from one training batch's codes what inference needs; called by the training step alone."""

    def shortage(self) -> Tensor:
        """How short the budget of active latents is, from 0 (nothing of weight is cut off) to 1, 0-d; 0 without a
        budget, or where it is not known."""
        return torch.zeros(())

    def rescale(self, factor: float) -> None:
        """Go on as before with pre-activations that are `factor` times as large: codes are, too."""


class ReLU(Activation):
    """a = max(pre, 0)."""

    def forward(self, pre_BF: Tensor, *, k: int | None = None) -> Tensor:
        """Codes [B, F]."""
        return pre_BF.relu()

    def sparsity(self, pre_BF: Tensor, codes_BF: Tensor, dec_FD: Tensor) -> Tensor:
        """L1 = mean over tokens of Σ_F |a_F| ‖dec_F‖ (Anthropic, April 2024 update): blind to the scale of a row."""
        mean_F = codes_BF.sum(0, dtype=torch.float32) / codes_BF.shape[0]
        return mean_F @ dec_FD.norm(dim=1)


class TopK(Activation):
    """The k largest positive pre-activations of each token."""

    sparse = True

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre_BF: Tensor, *, as_pairs: bool = False, k: int | None = None) -> Codes | Tensor:
        """Codes [B, F], or their pairs without a gradient."""
        k = min(k or self.k, pre_BF.shape[-1])
        latents_BK = largest_of_rows(pre_BF.detach(), k)
        values_BK = pre_BF.gather(-1, latents_BK).relu()
        if not as_pairs:
            return torch.zeros_like(pre_BF).scatter(-1, latents_BK, values_BK)
        token_N = torch.arange(len(pre_BF), device=pre_BF.device).repeat_interleave(k)
        return pairs(values_BK.detach().flatten(), token_N, latents_BK.flatten(), *pre_BF.shape)


class BatchTopK(Activation):
    """The k·B largest positive pre-activations of a batch in training; those above `threshold_F` in evaluation.

    With `favour_F` they are compared times favour. Ties at the boundary are all kept: in bfloat16, as under autocast,
    up to 3 % more than k·B codes at k = 32. `threshold` and `mean` are the bias-corrected EMAs of the smallest and the
    mean code that was kept, both times favour, `threshold_F` that of what the smallest one asks of each latent's codes.
    All are moved only by `observe`, as is `latest`, the last smallest code, which speeds the search up and no more.
    """

    sparse = True
    contested = True
    threshold: Tensor
    mean: Tensor
    threshold_F: Tensor
    latest: Tensor
    _weight: Tensor

    def __init__(self, latents: int, k: int, decay: float = 0.99) -> None:
        super().__init__()
        self.k = k
        self.decay = decay
        for name in ("threshold", "mean", "_weight"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("threshold_F", torch.zeros(latents))
        self.register_buffer("latest", torch.zeros(()), persistent=False)

    def forward(
        self, pre_BF: Tensor, *, as_pairs: bool = False, k: int | None = None, favour_F: Tensor | None = None
    ) -> Codes | Tensor:
        """Codes [B, F], or their pairs without a gradient. In training with `favour_F`, `pre_BF` comes times favour."""
        count = min((k or self.k) * pre_BF.shape[0], pre_BF.numel())
        if as_pairs:
            assert self.training, "in evaluation the threshold decides, token by token"
            floor = 0.95 * self.latest  # little can have changed since
            values_N, token_N, latent_N, found = largest_of_batch(pre_BF.detach(), count, floor)
            own_N = values_N if favour_F is None else values_N / favour_F.index_select(0, latent_N)
            return pairs(own_N, token_N, latent_N, *pre_BF.shape, found)
        if not self.training:
            return torch.where(pre_BF > self.threshold_F, pre_BF, 0)
        codes_BF = torch.where(pre_BF >= self._boundary(pre_BF.detach(), count).clamp_min(0), pre_BF, 0)
        return codes_BF if favour_F is None else codes_BF / favour_F

    def _boundary(self, pre_BF: Tensor, count: int) -> Tensor:
        """The count-th largest value. Values below the last boundary hardly matter, so they are sorted out first; when
        too few remain the whole batch is searched: the answer is the same, only the time differs."""
        candidates = pre_BF[pre_BF > 0.95 * self.latest.to(pre_BF.dtype)]
        if candidates.numel() < count:
            candidates = pre_BF.flatten()
        return candidates.topk(count, sorted=False).values.min()

    @torch.no_grad()
    def observe(self, codes: Codes | Tensor, favour_F: Tensor | None = None) -> None:
        """Let the inference threshold learn from one training batch's codes, and the favours they were chosen with."""
        values = flat(codes).float()
        if favour_F is not None:
            values = values * (favour_F[codes.latent_N] if isinstance(codes, Codes) else favour_F.repeat(len(codes)))
        kept = values > 0
        least = torch.where(kept, values, math.inf).amin() if len(values) else self.threshold.new_full((), math.inf)
        least = torch.where(least < math.inf, least, 0)
        mean = values.clamp_min(0).sum() / kept.sum().clamp_min(1)
        least_F = least.expand_as(self.threshold_F) if favour_F is None else least / favour_F
        before = self.decay * self._weight
        self._weight.copy_(before + (1 - self.decay))
        for held, new in ((self.threshold, least), (self.mean, mean), (self.threshold_F, least_F)):
            held.copy_((before * held + (1 - self.decay) * new) / self._weight)
        self.latest.copy_(least)

    def shortage(self) -> Tensor:
        """The smallest code kept over the mean one, on average: how much a token lost with the next code."""
        return self.threshold / self.mean.clamp_min(1e-12)

    def rescale(self, factor: float) -> None:
        """What was observed is as much larger."""
        for held in (self.threshold, self.mean, self.threshold_F, self.latest):
            held.mul_(factor)


class _Step(torch.autograd.Function):
    """1[pre > θ] with the derivative of a rectangle of width ε around θ: d/dθ = -1/ε inside it, 0 outside."""

    @staticmethod
    def forward(ctx, pre_BF: Tensor, theta_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_BF, theta_F)
        ctx.bandwidth = bandwidth
        return (pre_BF > theta_F).to(pre_BF.dtype)

    @staticmethod
    def backward(ctx, grad_BF: Tensor) -> tuple[None, Tensor, None]:
        pre_BF, theta_F = ctx.saved_tensors
        inside_BF = (pre_BF - theta_F).abs() < ctx.bandwidth / 2
        return None, -(grad_BF * inside_BF).sum(0, dtype=theta_F.dtype) / ctx.bandwidth, None


class JumpReLU(Activation):
    """a = pre 1[pre > θ]; θ = exp(log_threshold) > 0 a latent, trained through `_Step`."""

    def __init__(self, latents: int, threshold: float = 0.5, bandwidth: float = 0.5) -> None:
        super().__init__()
        self.bandwidth = bandwidth
        self.log_threshold_F = nn.Parameter(torch.full((latents,), threshold).log())

    @property
    def threshold_F(self) -> Tensor:
        """θ, shape [F], in units of the codes."""
        return self.log_threshold_F.exp()

    def forward(self, pre_BF: Tensor, *, k: int | None = None) -> Tensor:
        """Codes [B, F]; the gradient to θ is that of the step, times pre."""
        if not torch.is_grad_enabled():
            return torch.where(pre_BF > self.threshold_F, pre_BF, 0)
        return pre_BF * _Step.apply(pre_BF, self.threshold_F, self.bandwidth)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """θ is as much larger."""
        self.log_threshold_F.add_(math.log(factor))

    def sparsity(self, pre_BF: Tensor, codes_BF: Tensor, dec_FD: Tensor) -> Tensor:
        """L0 = mean over tokens of Σ_F 1[pre_F > θ_F]."""
        step_BF = _Step.apply(pre_BF, self.threshold_F, self.bandwidth)
        return step_BF.sum(dtype=torch.float32) / pre_BF.shape[0]


def threshold_of(activation: Activation) -> Tensor | None:
    """θ, one or [F], where a = pre 1[pre > θ]; None where the values of a token or a batch vie with each other."""
    match activation:
        case ReLU():
            return torch.zeros(())
        case JumpReLU():
            return activation.threshold_F
        case BatchTopK() if not activation.training:
            return activation.threshold_F
    return None


def build_activation(architecture: str, latents: int, k: int) -> Activation:
    """The activation of an architecture's name (`RunConfig.architecture`)."""
    match architecture:
        case "relu":
            return ReLU()
        case "topk":
            return TopK(k)
        case "batchtopk":
            return BatchTopK(latents, k)
        case "jumprelu":
            return JumpReLU(latents)
    raise AssertionError(architecture)
