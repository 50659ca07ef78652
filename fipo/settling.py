"""The last phase: codes are made a little smaller, and the decoder alone settles to them (METHOD 4d).

Minimising ‖x - x̂‖² over directions, what a decoder row learns beside its feature is what the codes of other latents are
too large by whenever both are active: of a kept code noise is a part, and more often than not in its favour. With codes
that are a share γ smaller, x - (1-γ) x̂, the squared error is, but for a factor and a constant,

    ‖x - x̂‖² - γ ‖x̂‖²

so that latents which are active together are held apart less. Which codes are kept does not change, nor what else is
read from the encoder: its rows, biases and thresholds are scaled once, and rest.
"""

import torch

from fipo.schedules import first_decoder_only
from fipo.state import TrainState


@torch.no_grad()
def shrink_codes(state: TrainState) -> None:
    """Make all codes smaller where the last phase is about to begin; else nothing."""
    levels, steps = state.config.levels, state.config.workload.steps
    if levels is None or not state.step == first_decoder_only(state.config) < steps:
        return
    factor = 1 - levels.shrink
    for rows in (state.sae.enc_FD, state.sae.enc_bias_F):
        rows.mul_(factor)
    state.sae.activation.rescale(factor)
    state.importance.rescale(factor)
