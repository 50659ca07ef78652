"""The training step: the one place where importance, reservoir, LSH and penalty meet.

`TrainState` is everything that may influence the next step; `train_step` is the only thing that changes it. Shapes:
B tokens, D model width, F latents, P candidate pairs.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fipo import lsh, objective, schedules
from fipo.errors import UserError
from fipo.favour import favours
from fipo.graphs import Beside
from fipo.importance import several_ranks
from fipo.levels import nested, spare_share
from fipo.method import Penalty
from fipo.objective import Terms
from fipo.reconstruction import reconstruction_error
from fipo.revival import revive
from fipo.sparse import Codes, positive
from fipo.state import TrainState
from fipo.update import UNCHECKED, update


@dataclass(frozen=True)
class StepReport:
    """What a step leaves to look at, computed when it is asked; on a GPU the next step of the state writes over it."""

    terms: Terms
    x_BD: Tensor
    residual_BD: Tensor
    """x - x̂."""
    codes: Codes | Tensor

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained on the batch (standardised input has mean 0 over the data)."""
        return (self.residual_BD.pow(2).sum() / self.x_BD.pow(2).sum()).item()

    @property
    def l0(self) -> float:
        """Active latents a token on the batch."""
        return positive(self.codes).numel() / self.x_BD.shape[0]


class Plan(NamedTuple):
    """Which parts a step has."""

    k: int
    """Active latents a token, where there is a budget."""
    frozen: bool
    """Is it of the last phase, in which the decoder alone learns?"""
    penalised: bool
    """Has it a penalty on the decoder?"""
    dead: int
    """Places for the latents that may be dead."""


class Numbers(NamedTuple):
    """Where a step is in the schedules (`fipo.schedules`); tensors for a recording."""

    learning_rate: float | Tensor
    penalty_share: float | Tensor
    order_share: float | Tensor
    stop_gradient: float | Tensor


def train_step(state: TrainState, acts_BD: Tensor) -> StepReport:
    """One step on model activations [B, D]: the only mutator of `state`. `UserError` where it is not finite, behind the
    last step of the run, and in one of several ranks, which would share their importance and nothing else: gradients
    and BatchTopK's budget are local."""
    if several_ranks():
        raise UserError("a training step in one of several ranks is given; expected one process: start it without them")
    if state.step >= state.config.workload.steps:
        raise UserError(
            f"step {state.step + 1} of a run of {state.config.workload.steps} is given; expected no more, since its "
            "schedules end there: raise workload.train_tokens"
        )
    state.importance.discard()  # what was encoded since the last step is no part of this one
    refresh_pairs(state)
    plan, numbers = plan_of(state, len(acts_BD)), numbers_of(state)
    if state.graphs is not None and recordable(state):
        report = state.graphs.run(
            lambda acts_BD, pairs_P2, *numbers: compute(state, plan, Numbers(*numbers), acts_BD, pairs_P2),
            plan,
            [acts_BD, padded(state)],
            numbers,
            state.generator,
        )
    else:
        report = compute(state, plan, numbers, acts_BD, state.pairs_P2)
    revive_dead(state)
    state.step += 1
    if (factor := schedules.rescaling(state.config, state.step)) != 1:
        state.sae.rescale(factor)
        state.importance.rescale(factor)
    if state.step % UNCHECKED == 0 or state.step == state.config.workload.steps:
        state.faults.check(state.step)
    return report


def plan_of(state: TrainState, batch: int) -> Plan:
    """The plan of the state's next step, on a batch of so many tokens."""
    config, step = state.config, state.step
    return Plan(
        k=schedules.active_latents(config, step),
        frozen=step >= schedules.first_decoder_only(config),
        penalised=config.penalty is not None and (step + 1) % config.penalty.every == 0,
        dead=dead_places(state, batch) if config.aux_weight > 0 else 0,
    )


def numbers_of(state: TrainState) -> Numbers:
    """Where the state's next step is in its schedules."""
    config, step = state.config, state.step
    return Numbers(*(getattr(schedules, name)(config, step) for name in Numbers._fields))


def dead_places(state: TrainState, batch: int) -> int:
    """Places that the auxiliary loss has. On a CPU: as many as latents are dead. On a GPU: a power of two that holds
    all that can be dead before it is asked again, asked only when the GPU is waited for anyhow. Places too many change
    nothing, and so few different numbers mean few recordings."""
    importance, most = state.importance, state.config.workload.dead_tokens
    if importance.silent_tokens_F.device.type == "cpu":
        return int(importance.dead(most).sum())
    if state.step % UNCHECKED == 0:
        soon = int(importance.dead(most - UNCHECKED * batch).sum())
        state.dead_places = min(state.sae.latents, 2 ** (soon - 1).bit_length()) if soon else 0
    return state.dead_places


def recordable(state: TrainState) -> bool:
    """Can the step be a recording? Then no shape in it may depend on a tensor's values."""
    config, penalty, settings = state.config, state.config.penalty, state.config.lsh
    few_pairs = penalty is None or (
        penalty.kind == "prioritised"
        and penalty.estimator == "max"
        and settings is not None
        and settings.partners is not None
        and len(state.pairs_P2) <= settings.partners * state.sae.latents
    )
    sparse = state.sae.activation.sparse and config.optimiser.autocast
    return sparse and few_pairs


def padded(state: TrainState) -> Tensor:
    """The candidate pairs, filled up to as many as there can be by pairs of a latent with itself, which are free."""
    settings, graphs = state.config.lsh, state.graphs
    if state.config.penalty is None or settings is None or settings.partners is None:  # nobody reads them
        return state.pairs_P2[:0]
    if graphs is not None and graphs.padded is not None and graphs.padded[0] is state.pairs_P2:
        return graphs.padded[1]
    most = settings.partners * state.sae.latents
    filled_P2 = (torch.arange(most, device=state.pairs_P2.device) % state.sae.latents)[:, None].repeat(1, 2)
    filled_P2[: len(state.pairs_P2)] = state.pairs_P2
    if graphs is not None:
        graphs.padded = state.pairs_P2, filled_P2
    return filled_P2


def compute(state: TrainState, plan: Plan, numbers: Numbers, acts_BD: Tensor, pairs_P2: Tensor) -> StepReport:
    """What a step does on the device: loss, gradient, update, and what the state learns from the batch."""
    config, sae, beside = state.config, state.sae, state.graphs.beside if state.graphs else Beside()
    sae.train()
    beside.fork()
    with beside.work():
        order = step_order(state, numbers)
    favour_F = step_favours(state, numbers)
    x_BD = sae.standardise(acts_BD)
    with torch.autocast(x_BD.device.type, dtype=torch.bfloat16, enabled=config.optimiser.autocast, cache_enabled=False):
        with torch.set_grad_enabled(not plan.frozen):
            pre_BF, codes = sae.training_codes(x_BD, plan.k, favour_F)
        beside.join()
        terms, residual_BD = loss_terms(state, plan, numbers, x_BD, pre_BF, codes, order, pairs_P2)
    state.optimizer.zero_grad()
    terms.total.backward()
    terms, codes = Terms(*(term.detach() for term in terms)), codes.detach()
    beside.fork()
    update(sae, state.optimizer, terms, state.faults, state.step, numbers.learning_rate, config.optimiser.clip)
    with torch.no_grad(), beside.work():
        state.importance.commit()
        sae.activation.observe(codes, favour_F)
        if state.reservoir is not None:
            state.reservoir.offer(x_BD, torch.linalg.vector_norm(residual_BD, dim=1).square(), state.generator)
    beside.join()
    return StepReport(terms, x_BD, residual_BD, codes)


def step_favours(state: TrainState, numbers: Numbers) -> Tensor | None:
    """What the latents' codes count for in the contest for the step's budget, [F]; None where all count the same."""
    levels, activation = state.config.levels, state.sae.activation
    if levels is None or not any(levels.favour) or not activation.contested:
        return None
    spare = spare_share(levels, activation.shortage())
    return favours(levels.favour, state.importance.values(), numbers.order_share, spare)


def step_order(state: TrainState, numbers: Numbers) -> dict[str, Any]:
    """The levels of this step, as `reconstruction_error` takes them; none without them."""
    levels = state.config.levels
    if levels is None:
        return {}
    sigma_F, shortage = state.importance.values(), state.sae.activation.shortage()
    return nested(levels, sigma_F, shortage, numbers.order_share, numbers.stop_gradient, state.generator)


def loss_terms(
    state: TrainState,
    plan: Plan,
    numbers: Numbers,
    x_BD: Tensor,
    pre_BF: Tensor | None,
    codes: Codes | Tensor,
    order: dict[str, Any],
    pairs_P2: Tensor,
) -> tuple[Terms, Tensor]:
    """L = L_rec + λ_s L_sparsity + α L_aux + λ_o Ω, each weighted, and the residual x - x̂ [B, D].

    In the last phase (`frozen`) the codes are constants: only the reconstruction and Ω are left. Codes as pairs have
    no L_sparsity. The pre-activations of dead latents, few as a rule, are computed again, with their gradient.
    """
    config, sae, workload = state.config, state.sae, state.config.workload
    nothing = torch.zeros((), device=x_BD.device)
    reconstruction, residual_BD = reconstruction_error(codes, sae.dec_FD, sae.dec_bias_D, x_BD, **order)
    sparsity, auxiliary, orthogonality = nothing, nothing, nothing
    if not plan.frozen and workload.sparsity_penalty > 0 and not isinstance(codes, Codes):
        weight = workload.sparsity_penalty * numbers.penalty_share
        sparsity = weight * sae.activation.sparsity(pre_BF, codes, sae.dec_FD)
    if not plan.frozen and plan.dead:
        auxiliary = config.aux_weight * dead_loss(state, x_BD, residual_BD, plan.dead)
    if config.penalty is not None and plan.penalised:
        weight = config.penalty.every * config.penalty.weight * numbers.penalty_share
        orthogonality = weight * decoder_penalty(state, config.penalty, pairs_P2)
    return Terms(reconstruction, sparsity, auxiliary, orthogonality), residual_BD


def dead_loss(state: TrainState, x_BD: Tensor, residual_BD: Tensor, places: int) -> Tensor:
    """The auxiliary loss of the dead latents, for no more of which than there are places; unweighted."""
    sae, silent_F = state.sae, state.importance.silent_tokens_F
    latent_N = silent_F.topk(places).indices.sort().values
    alive_N = silent_F[latent_N] < state.config.workload.dead_tokens
    pre_BN = sae.pre_codes(x_BD, latent_N).masked_fill(alive_N, -torch.inf)
    loss = objective.auxiliary(residual_BD, pre_BN, sae.dec_FD[latent_N], max(1, sae.d_in // 2))
    return torch.where(alive_N.all(), 0.0, loss)


def decoder_penalty(state: TrainState, penalty: Penalty, pairs_P2: Tensor) -> Tensor:
    """Ω, or a rival's penalty, of the decoder rows; unweighted."""
    dec_FD = state.sae.dec_FD
    if penalty.kind == "ortsae":
        order_F = torch.randperm(len(dec_FD), generator=state.generator, device=state.generator.device)
        return objective.chunked_orthogonality(dec_FD, order_F, penalty.chunk)
    settings = state.config.lsh
    assert settings is not None
    return objective.orthogonality(
        dec_FD,
        state.importance.values(),
        pairs_P2,
        estimator=penalty.estimator,
        yields=penalty.yields,
        margin=penalty.margin,
        probability=lambda cos: lsh.collision_probability(cos, settings.tables, settings.bits_of(len(dec_FD))),
    )


def refresh_pairs(state: TrainState) -> None:
    """Every n steps: mine candidate pairs with new planes. Those held stay in the running, unless each pair is to be
    weighted by its chance of being found."""
    settings, penalty = state.config.lsh, state.config.penalty
    if settings is None or state.step % settings.refresh_every:
        return
    unbiased = penalty is not None and penalty.estimator == "unbiased"
    state.pairs_P2 = lsh.candidate_pairs(
        state.sae.dec_FD.detach(),
        state.importance.values(),
        tables=settings.tables,
        bits=settings.bits_of(state.sae.latents),
        capacity=settings.capacity,
        min_cosine=settings.min_cosine,
        generator=state.generator,
        partners=settings.partners,
        autocast=settings.autocast,
        held_P2=None if unbiased else state.pairs_P2,
    )


def revive_dead(state: TrainState) -> None:
    """Every n steps: revive dead latents from the reservoir."""
    settings, config = state.config.reservoir, state.config
    if settings is None or state.reservoir is None:
        return
    last = min(0.8 * config.workload.steps, schedules.first_decoder_only(config))
    if state.step >= last or (state.step + 1) % settings.revive_every:
        return
    dead_F = state.importance.dead(config.workload.dead_tokens)
    revived = revive(state.sae, state.optimizer, dead_F, state.reservoir.contents(), settings.encoder_scale)
    state.importance.silent_tokens_F[revived] = 0
