"""The state of one SAE in training: everything that may influence its next step, from the start or from a checkpoint.

Shapes: D model width, F latents, P candidate pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fipo.activations import build_activation
from fipo.adam import Adam
from fipo.checkpoint import check_tensors
from fipo.config import RunConfig
from fipo.graphs import StepGraphs
from fipo.importance import ImportanceEMA
from fipo.randomness import generator_for
from fipo.reservoir import PriorityReservoir
from fipo.sae import SAE
from fipo.schedules import first_decoder_only
from fipo.sparse import kernels_for
from fipo.update import Faults


@dataclass
class TrainState:
    """One SAE in training. Whatever is not in here (or in the stream of activations) has no influence on the result."""

    config: RunConfig
    sae: SAE
    optimizer: Adam
    importance: ImportanceEMA
    reservoir: PriorityReservoir | None
    pairs_P2: Tensor
    generator: torch.Generator
    faults: Faults
    """What was not finite so far; no step is taken, and no state saved, once anything was."""
    graphs: StepGraphs | None = None
    """Recordings of the step on a GPU; they hold nothing that the other fields do not."""
    step: int = 0
    dead_places: int = 0
    """Places for latents that may be dead, as a GPU last said (`fipo.train.dead_places`)."""

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as flat tensors; `UserError` where a step was not finite."""
        self.faults.check(self.step)
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for moment, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{moment}"] = value
        tensors |= {f"importance.{name}": value for name, value in self.importance.state_dict().items()}
        if self.reservoir is not None:
            tensors |= {f"reservoir.{name}": value for name, value in self.reservoir.state_dict().items()}
        counters = {"step": torch.tensor(self.step), "dead_places": torch.tensor(self.dead_places)}
        return tensors | counters | {"pairs_P2": self.pairs_P2, "generator": self.generator.get_state()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, in place; anything else is refused."""
        check_tensors(tensors, self._expected(tensors), "checkpoint")
        if self.graphs is not None:  # recordings were made for tensors that are now replaced
            self.graphs = StepGraphs(self.graphs.device)

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
        self.step, self.dead_places = int(tensors["step"]), int(tensors["dead_places"])
        self.generator.set_state(tensors["generator"].cpu())

    def _expected(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors like those that `load_state_dict` takes: Adam has moments once it has stepped, pairs any number."""
        expected = self.state_dict()
        if int(tensors.get("step", torch.zeros(1)).sum()):
            for name, parameter in self.sae.named_parameters():
                frozen = first_decoder_only(self.config) == 0 and not name.startswith("dec_")  # from the first step on
                if frozen or not parameter.requires_grad:
                    continue
                expected |= {f"adam.{name}.{moment}": parameter for moment in ("exp_avg", "exp_avg_sq")}
                expected[f"adam.{name}.step"] = torch.zeros(())
        pairs_P2 = tensors.get("pairs_P2", self.pairs_P2)
        if pairs_P2.dim() == 2 and not ((pairs_P2 < 0) | (pairs_P2 >= self.sae.latents)).any():
            expected["pairs_P2"] = pairs_P2.new_zeros(pairs_P2.shape[0], 2, dtype=torch.int64)
        return expected


def build_state(config: RunConfig, layer: int, mean_D: Tensor, scale: float, device: str = "cpu") -> TrainState:
    """A fresh state for one layer, whose activations have the given mean and scale to mean squared norm D."""
    workload, width = config.workload, mean_D.shape[0]
    activation = build_activation(config.architecture, workload.latents, workload.k)
    # With half of F random latents active, x̂ ≈ gain · F / (2 D) · x: start the dense architectures at x̂ ≈ x.
    gain = 1.0 if config.budgeted else min(1.0, 2 * width / workload.latents)
    sae = SAE(width, workload.latents, activation, gain=gain, generator=generator_for(config.seed, "init", layer))
    sae.mean_D.copy_(mean_D)
    sae.scale.fill_(scale)
    sae.to(device)
    sae.dec_FD.requires_grad_(not config.frozen_decoder)
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
        optimizer=Adam(sae.parameters(), config.optimiser.betas),
        importance=importance,
        reservoir=reservoir,
        pairs_P2=torch.zeros(0, 2, dtype=torch.int64, device=device),
        generator=generator_for(config.seed, "train", layer, device=device),
        faults=Faults(device),
        graphs=StepGraphs(sae.dec_FD.device) if kernels_for(sae.dec_FD) else None,
    )
