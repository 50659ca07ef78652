"""One update of the weights: gradients projected and clipped, Adam, decoder rows back to unit norm.

Memory binds it, so every parameter is read and written once: by a kernel on a GPU (fipo.kernels), by a compiled loop on
a processor (fipo.native); where neither is at hand, the same in torch. A step that is not finite changes no weight.
Shapes: D model width, F latents.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fipo.adam import Adam
from fipo.errors import UserError
from fipo.sae import SAE
from fipo.sparse import kernels_for, native_for

PARTS = ("reconstruction", "sparsity", "auxiliary", "orthogonality", "the gradient")
"""What can fail to be finite: the terms of the loss, in their order, and its gradient."""
UNCHECKED = 16
"""Steps of a GPU after which it is asked for faults: it would have to be waited for."""


class Faults:
    """What has not been finite in any step so far."""

    def __init__(self, device: torch.device | str) -> None:
        self.found_5 = torch.zeros(len(PARTS), dtype=torch.bool, device=device)

    @torch.no_grad()
    def add(self, terms: Sequence[Tensor], gradient_norm: Tensor) -> Tensor:
        """Note what is not finite; are all, now and before, 0-d?"""
        self.found_5 |= ~torch.isfinite(torch.stack([*terms, gradient_norm]))
        return ~self.found_5.any()

    def check(self, step: int) -> None:
        """`UserError` where something was not finite before, or on the processor in, this step."""
        found = self.found_5.tolist()
        if not any(found):
            return
        when = f"within {UNCHECKED} steps before step {step}"
        if self.found_5.device.type == "cpu":  # no weight, moment or statistic has changed
            self.found_5.zero_()
            when = f"step {step}"
        culprits = [name for name, bad in zip(PARTS[:-1], found, strict=False) if bad] or PARTS[-1:]
        raise UserError(
            f"{when}: the loss is not finite ({', '.join(culprits)}); the weights were not updated; "
            "lower workload.learning_rate, or look for extreme activations in this layer"
        )


def update(
    sae: SAE,
    adam: Adam,
    terms: Sequence[Tensor],
    faults: Faults,
    step: int,
    learning_rate: float | Tensor,
    clip: float,
) -> None:
    """Change the weights by their gradients, unless a term or the gradient is not finite, or was before; then
    `UserError` on the processor, while a GPU has to be asked (`Faults.check`)."""
    gpu, native = kernels_for(sae.dec_FD), native_for(sae.dec_FD, torch.float32)
    learned = [parameter for parameter in sae.parameters() if parameter.grad is not None]
    dec_FD = sae.dec_FD if sae.dec_FD.grad is not None else None
    if kernels := gpu or native:
        states = [adam.moments(parameter) for parameter in learned]
        squares, along_F = (0.0, None) if dec_FD is None else kernels.squares(dec_FD)
        if rest := [parameter.grad for parameter in learned if parameter is not dec_FD]:
            squares += torch.stack(torch._foreach_norm(rest)).square().sum()
        norm = squares.sqrt()
        fine = faults.add(terms, norm)
        if not gpu:
            faults.check(step)
        torch._foreach_add_([state["step"] for state in states], [fine.float()] * len(states))
        unbiased_2 = [1 - beta ** states[0]["step"].double() for beta in adam.betas]
        numbers = learning_rate / unbiased_2[0], unbiased_2[1].sqrt(), (norm / clip).clamp_min(1), fine
        numbers_4 = torch.stack([number.float() for number in numbers])
        for parameter, state in zip(learned, states, strict=True):
            moments = state["exp_avg"], state["exp_avg_sq"]
            assert all(tensor.is_contiguous() for tensor in (parameter, *moments)), "they are changed in place"
            own_F = along_F if parameter is dec_FD else None
            kernels.adam(parameter, *moments, numbers_4, adam.betas, adam.epsilon, own_F)
        return
    sae.project_decoder_gradient()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in learned])
    faults.add(terms, norm)
    faults.check(step)
    adam.step(learned, learning_rate, (norm / clip).clamp_min(1))
    if dec_FD is not None:
        sae.normalise_decoder()
