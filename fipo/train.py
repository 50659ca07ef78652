"""The training step: the one place where importance, reservoir, LSH and penalty meet.

`TrainState` is everything that may influence the next step; `train_step` is the only thing that changes it. Shapes:
B tokens, D model width, F latents, P candidate pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fipo import lsh, objective
from fipo.activations import build_activation
from fipo.checkpoint import check_tensors
from fipo.config import RunConfig
from fipo.decoding import decode, decode_levels
from fipo.errors import UserError
from fipo.importance import ImportanceEMA
from fipo.method import Penalty
from fipo.objective import Terms
from fipo.randomness import generator_for
from fipo.reservoir import PriorityReservoir
from fipo.revival import revive
from fipo.sae import SAE
from fipo.schedules import active_latents, decoder_only, learning_rate, penalty_share, stop_gradient
from fipo.sparse import Codes, positive


@dataclass
class TrainState:
    """One SAE in training. Whatever is not in here (or in the stream of activations) has no influence on the result."""

    config: RunConfig
    sae: SAE
    optimizer: torch.optim.Optimizer
    importance: ImportanceEMA
    reservoir: PriorityReservoir | None
    pairs_P2: Tensor
    generator: torch.Generator
    step: int = 0

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as flat tensors."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for moment, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{moment}"] = value
        tensors |= {f"importance.{name}": value for name, value in self.importance.state_dict().items()}
        if self.reservoir is not None:
            tensors |= {f"reservoir.{name}": value for name, value in self.reservoir.state_dict().items()}
        counters = {"pairs_P2": self.pairs_P2, "step": torch.tensor(self.step)}
        return tensors | counters | {"generator": self.generator.get_state()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, in place; anything else is refused."""
        check_tensors(tensors, self._expected(tensors), "checkpoint")

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.sae.load_state_dict(part("sae."))
        for name, parameter in self.sae.named_parameters():
            self.optimizer.state[parameter] = {
                moment: value.to(parameter.device, copy=True) for moment, value in part(f"adam.{name}.").items()
            }
        self.importance.load_state_dict(part("importance."))
        if self.reservoir is not None:
            self.reservoir.load_state_dict(part("reservoir."))
        self.pairs_P2 = tensors["pairs_P2"].to(self.pairs_P2.device, copy=True)
        self.step = int(tensors["step"])
        self.generator.set_state(tensors["generator"].cpu())

    def _expected(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors like those that `load_state_dict` takes: Adam has moments once it has stepped, pairs any number."""
        expected = self.state_dict()
        if int(tensors.get("step", torch.zeros(1)).sum()):
            for name, parameter in self.sae.named_parameters():
                if not parameter.requires_grad:
                    continue
                expected |= {f"adam.{name}.{moment}": parameter for moment in ("exp_avg", "exp_avg_sq")}
                expected[f"adam.{name}.step"] = torch.zeros(())
        pairs_P2 = tensors.get("pairs_P2", self.pairs_P2)
        if pairs_P2.dim() == 2 and not ((pairs_P2 < 0) | (pairs_P2 >= self.sae.latents)).any():
            expected["pairs_P2"] = pairs_P2.new_zeros(pairs_P2.shape[0], 2, dtype=torch.int64)
        return expected


@dataclass(frozen=True)
class StepReport:
    """What a step leaves to look at. Nothing is computed, and no device waited for, until it is asked."""

    terms: Terms
    x_BD: Tensor
    x_hat_BD: Tensor
    codes: Codes | Tensor

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained on the batch (standardised input has mean 0 over the data)."""
        return ((self.x_BD - self.x_hat_BD).pow(2).sum() / self.x_BD.pow(2).sum()).item()

    @property
    def l0(self) -> float:
        """Active latents a token on the batch."""
        return positive(self.codes).numel() / self.x_BD.shape[0]


def build_state(config: RunConfig, layer: int, mean_D: Tensor, scale: float, device: str = "cpu") -> TrainState:
    """A fresh state for one layer, whose activations have the given mean and scale to mean squared norm D."""
    workload, width = config.workload, mean_D.shape[0]
    activation = build_activation(config.architecture, workload.latents, workload.k)
    # With half of F random latents active, x̂ ≈ gain · F / (2 D) · x: start the dense architectures at x̂ ≈ x.
    gain = 1.0 if config.architecture in ("topk", "batchtopk") else min(1.0, 2 * width / workload.latents)
    sae = SAE(width, workload.latents, activation, gain=gain, generator=generator_for(config.seed, "init", layer))
    sae.mean_D.copy_(mean_D)
    sae.scale.fill_(scale)
    sae.to(device)
    sae.dec_FD.requires_grad_(not config.frozen_decoder)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.0, betas=config.optimiser.betas, fused=True)
    settings = config.importance
    importance = ImportanceEMA(
        workload.latents,
        decay=settings.decay if settings else 0.999,
        norm=settings.norm if settings else "l1",
        device=device,
    )
    importance.attach(sae.activation)
    reservoir = None
    if config.reservoir is not None:
        half_life = config.reservoir.half_life_steps
        reservoir = PriorityReservoir(config.reservoir.slots, (width,), half_life=half_life, device=device)
    return TrainState(
        config=config,
        sae=sae,
        optimizer=optimizer,
        importance=importance,
        reservoir=reservoir,
        pairs_P2=torch.zeros(0, 2, dtype=torch.int64, device=device),
        generator=generator_for(config.seed, "train", layer, device=device),
    )


def train_step(state: TrainState, acts_BD: Tensor) -> StepReport:
    """One step on model activations [B, D]: the only mutator of `state`."""
    config, sae, settings = state.config, state.sae, state.config.optimiser
    frozen = decoder_only(config, state.step)
    refresh_pairs(state)
    sae.train()
    x_BD = sae.standardise(acts_BD)
    with torch.autocast(x_BD.device.type, dtype=torch.bfloat16, enabled=settings.autocast):
        with torch.set_grad_enabled(not frozen):
            pre_BF, codes = sae.training_codes(x_BD, active_latents(config, state.step))
        terms, x_hat_BD = loss_terms(state, x_BD, pre_BF, codes, frozen)
    state.optimizer.zero_grad()
    terms.total.backward()
    sae.project_decoder_gradient()
    norm = torch.nn.utils.get_total_norm([p.grad for p in sae.parameters() if p.grad is not None])
    check_finite(state, terms, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.optimizer.grad_scale = (norm / settings.clip).clamp_min(1)  # fused Adam divides by it as it reads a gradient
    state.optimizer.step()
    if not config.frozen_decoder:
        sae.normalise_decoder()
    with torch.no_grad():
        state.importance.commit()
        sae.activation.observe(codes)
        revive_dead(state, x_BD, x_hat_BD)
    state.step += 1
    return StepReport(Terms(*(term.detach() for term in terms)), x_BD, x_hat_BD.detach(), codes)


def loss_terms(
    state: TrainState, x_BD: Tensor, pre_BF: Tensor | None, codes: Codes | Tensor, frozen: bool
) -> tuple[Terms, Tensor]:
    """L = L_rec + λ_s L_sparsity + α L_aux + λ_o Ω, each weighted, and the full reconstruction x̂ [B, D].

    In the last phase (`frozen`) the codes are constants: only the plain reconstruction and Ω are left. Codes as pairs
    have no L_sparsity. The pre-activations of dead latents, few as a rule, are computed again, with their gradient.
    """
    config, sae, workload = state.config, state.sae, state.config.workload
    share = penalty_share(config, state.step)
    nothing = torch.zeros((), device=x_BD.device)
    if config.levels is None or frozen:
        parts_BMD, held, plain = decode(codes, sae.dec_FD)[:, None], 0.0, 0.0
    else:
        parts_BMD = decode_levels(codes, sae.dec_FD, latent_levels(state), len(config.levels.shares))
        held, plain = stop_gradient(config, state.step, sae.activation.shortage()), config.levels.plain
    reconstruction, x_hat_BD = objective.nested_error(parts_BMD, sae.dec_bias_D, x_BD, held, plain)
    sparsity, auxiliary, orthogonality = nothing, nothing, nothing
    if not frozen and workload.sparsity_penalty > 0 and not isinstance(codes, Codes):
        sparsity = workload.sparsity_penalty * share * sae.activation.sparsity(pre_BF, codes, sae.dec_FD)
    if not frozen and config.aux_weight > 0:
        dead_N = (state.importance.silent_tokens_F >= workload.dead_tokens).nonzero().squeeze(1)
        if dead_N.numel():
            auxiliary = config.aux_weight * objective.auxiliary(
                x_BD - x_hat_BD, sae.pre_codes(x_BD, dead_N), sae.dec_FD[dead_N], max(1, sae.d_in // 2)
            )
    if config.penalty is not None and (state.step + 1) % config.penalty.every == 0:
        weight = config.penalty.every * config.penalty.weight
        orthogonality = weight * share * decoder_penalty(state, config.penalty)
    return Terms(reconstruction, sparsity, auxiliary, orthogonality), x_hat_BD


def decoder_penalty(state: TrainState, penalty: Penalty) -> Tensor:
    """Ω, or a rival's penalty, of the decoder rows; unweighted."""
    dec_FD = state.sae.dec_FD
    if penalty.kind == "ortsae":
        order_F = torch.randperm(len(dec_FD), generator=state.generator, device=state.generator.device)
        return objective.chunked_orthogonality(dec_FD, order_F, penalty.chunk)
    settings = state.config.lsh
    assert settings is not None
    bits = settings.bits_of(len(dec_FD))
    return objective.orthogonality(
        dec_FD,
        state.importance.values(),
        state.pairs_P2,
        estimator=penalty.estimator,
        yields=penalty.yields,
        margin=penalty.margin,
        probability=lambda cos: lsh.collision_probability(cos, settings.tables, bits),
    )


def latent_levels(state: TrainState) -> Tensor:
    """Level of every latent, [F] from 0: by index, or by its rank in σ, largest first. Nothing is permuted."""
    settings, latents = state.config.levels, state.sae.latents
    assert settings is not None
    device = state.sae.dec_FD.device
    rank_F = torch.arange(latents, device=device)
    if settings.order == "importance":
        rank_F[state.importance.values().argsort(descending=True, stable=True)] = rank_F.clone()
    ends = torch.tensor([max(1, round(share * latents)) for share in settings.shares], device=device)
    return torch.searchsorted(ends, rank_F, right=True)


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


def revive_dead(state: TrainState, x_BD: Tensor, x_hat_BD: Tensor) -> None:
    """Offer the tokens to the reservoir by reconstruction error; every n steps revive dead latents from it."""
    settings, config = state.config.reservoir, state.config
    if settings is None or state.reservoir is None:
        return
    state.reservoir.offer(x_BD, (x_BD - x_hat_BD).pow(2).sum(1), state.generator)
    late = state.step >= 0.8 * config.workload.steps or decoder_only(config, state.step)
    if late or (state.step + 1) % settings.revive_every:
        return
    dead_F = state.importance.silent_tokens_F >= config.workload.dead_tokens
    revived = revive(state.sae, state.optimizer, dead_F, state.reservoir.contents(), settings.encoder_scale)
    state.importance.silent_tokens_F[revived] = 0


def check_finite(state: TrainState, terms: Terms, gradient_norm: Tensor) -> None:
    """Stop before the update when the loss or its gradient is not finite."""
    if torch.isfinite(terms.total + gradient_norm):
        return
    culprits = [name for name, term in terms._asdict().items() if not torch.isfinite(term)] or ["the gradient"]
    raise UserError(
        f"step {state.step}: the loss is not finite ({', '.join(culprits)}); the weights were not updated; "
        "lower workload.learning_rate, or look for extreme activations in this layer"
    )
