"""What SAELens' own code says, as fixtures for our tests and as a second judge of our SAEs.

Run in an environment of its own that has sae-lens 6.54, with this repository on PYTHONPATH:

    python benchmarks/saelens_reference.py fixtures tests/fixtures/saelens.json
    python benchmarks/saelens_reference.py judge SAE_FOLDER ... --truth TRUTH.safetensors   # a saved SyntheticModel

The package itself never imports sae-lens.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import sae_lens
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
)

from fipo.checkpoint import load_tensors
from fipo.randomness import generator_for
from fipo.synthetic import SyntheticModel as Ours
from fipo.synthetic import from_saelens

WIDTH, LATENTS, BATCH, SPARSITY = 6, 12, 16, 0.3


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors as nested lists of numbers that JSON keeps exactly (float32 to 9 digits)."""
    return {name: json.loads(json.dumps(tensor.detach().tolist())) for name, tensor in tensors.items()}


def truth_and_samples() -> dict[str, Any]:
    """A small model of SAELens, and the statistics of its samples."""
    config = SyntheticModelConfig(
        num_features=24,
        hidden_dim=8,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=0.02),
        hierarchy=HierarchyConfig(
            total_root_nodes=2,
            branching_factor=2,
            max_depth=2,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=OrthogonalizationConfig(num_steps=20, lr=0.01),
        correlation=LowRankCorrelationConfig(rank=3, correlation_scale=0.3),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=7,
    )
    model, tokens = SyntheticModel(config), 400_000
    torch.manual_seed(11)
    values_NG = torch.cat([model.sample_with_features(20_000)[1] for _ in range(tokens // 20_000)])
    fires_NG = (values_NG > 0).float()
    samples = {
        "tokens": tokens,
        "cofiring_GG": (fires_NG.T @ fires_NG / tokens).tolist(),
        "mean_value_G": (values_NG.sum(0) / fires_NG.sum(0)).tolist(),
    }
    return {"truth": plain(from_saelens(model).state_dict()), "samples": samples}


class Duck:
    """All that SAELens' evaluation asks of an SAE."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.W_dec = tensors, tensors["dec_FD"]

    def eval(self) -> None:
        """No mode to change."""

    def encode(self, acts_BD: torch.Tensor) -> torch.Tensor:
        """ReLU codes."""
        return (acts_BD @ self.tensors["enc_DF"] + self.tensors["enc_bias_F"]).relu()

    def decode(self, codes_BF: torch.Tensor) -> torch.Tensor:
        """The reconstruction."""
        return codes_BF @ self.W_dec + self.tensors["dec_bias_D"]


class Given:
    """A generator of activations, or a dictionary, that gives what it was given."""

    def __init__(self, values_BG: torch.Tensor, features_GD: torch.Tensor, bias_D: torch.Tensor) -> None:
        self.values_BG, self.feature_vectors, self.bias_D = values_BG, features_GD, bias_D

    def sample(self, tokens: int) -> torch.Tensor:
        """The values."""
        return self.values_BG[:tokens]

    def __call__(self, values_BG: torch.Tensor) -> torch.Tensor:
        return values_BG @ self.feature_vectors + self.bias_D


def evaluation() -> dict[str, Any]:
    """A random SAE judged on given tokens."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    features_GD = normal(20, 8)
    features_GD /= features_GD.norm(dim=1, keepdim=True)
    noisy_FD = features_GD[:12] + 0.25 * normal(12, 8)
    tensors = {
        "features_GD": features_GD,
        "bias_D": 0.1 * normal(8),
        "values_BG": (normal(50, 20) - 1).relu() * 3,
        "dec_FD": noisy_FD / noisy_FD.norm(dim=1, keepdim=True),
        "enc_DF": noisy_FD.T.contiguous(),
        "enc_bias_F": torch.full((12,), -0.3).index_fill(0, torch.tensor([4, 9]), -100.0),
        "dec_bias_D": 0.1 * normal(8),
    }
    given = Given(tensors["values_BG"], features_GD, tensors["bias_D"])
    result = eval_sae_on_synthetic_data(Duck(tensors), given, given, num_samples=50)  # type: ignore[arg-type]
    return {"tensors": plain(tensors), "result": result.to_dict()}


def losses() -> dict[str, Any]:
    """Loss and gradients of SAELens' training classes on the same tensors. Its loss sums over D where ours averages,
    so ours is theirs over D; its sparsity weight is ours times D."""
    generator = torch.Generator().manual_seed(5)
    dec_FD = torch.randn(LATENTS, WIDTH, generator=generator)
    dec_FD /= dec_FD.norm(dim=1, keepdim=True)
    tensors = {
        "x_BD": torch.randn(BATCH, WIDTH, generator=generator),
        "dec_FD": dec_FD,
        "enc_DF": dec_FD.T + 0.2 * torch.randn(WIDTH, LATENTS, generator=generator),
        "enc_bias_F": 0.1 * torch.randn(LATENTS, generator=generator),
        "dec_bias_D": 0.1 * torch.randn(WIDTH, generator=generator),
    }
    shape = {"d_in": WIDTH, "d_sae": LATENTS, "apply_b_dec_to_input": False}
    # A threshold near the codes and a band of width 1, so that the straight-through estimate has something to do.
    jump = {"jumprelu_init_threshold": 0.5, "jumprelu_bandwidth": 0.5, "l0_coefficient": SPARSITY}
    classes: dict[str, Any] = {
        "relu": StandardTrainingSAE(StandardTrainingSAEConfig(**shape, l1_coefficient=SPARSITY)),
        "topk": TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=3)),
        "batchtopk": BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape, k=3)),
        "matryoshka": MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**shape, k=3, matryoshka_widths=[3, 6, 12])
        ),
        "jumprelu": JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**shape, jumprelu_sparsity_loss_mode="step", **jump)),
    }
    found = {}
    for name, sae in classes.items():
        with torch.no_grad():
            sae.W_enc.copy_(tensors["enc_DF"])
            sae.b_enc.copy_(tensors["enc_bias_F"])
            sae.W_dec.copy_(tensors["dec_FD"])
            sae.b_dec.copy_(tensors["dec_bias_D"])
        step = TrainStepInput(
            sae_in=tensors["x_BD"],
            coefficients={"l1": SPARSITY, "l0": SPARSITY},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
        output = sae.training_forward_pass(step)
        output.loss.backward()
        gradients = {"enc_DF": sae.W_enc.grad, "enc_bias_F": sae.b_enc.grad, "dec_FD": sae.W_dec.grad}
        found[name] = {
            "loss": output.loss.item(),
            "losses": {part: value.item() for part, value in output.losses.items()},
            "l0": (output.feature_acts > 0).sum().item() / BATCH,
            "gradients": plain(gradients),
        }
    return {"sparsity": SPARSITY, "tensors": plain(tensors), "classes": found}


def judge(folder: Path, truth: Ours, tokens: int) -> dict[str, Any]:
    """SAELens' evaluation of a saved SAE on the tokens on which benchmarks/ground_truth.py evaluates."""
    generator = generator_for(0, "held out")
    sae = sae_lens.SAE.load_from_disk(str(folder))

    class Source:
        """Our samples, in SAELens' terms."""

        feature_vectors = truth.features_GD

        def sample(self, tokens: int) -> torch.Tensor:
            """Values of the true features."""
            return truth.sample(tokens, generator).values_BG

        def __call__(self, values_BG: torch.Tensor) -> torch.Tensor:
            return values_BG @ truth.features_GD + truth.bias_D

    source = Source()
    return eval_sae_on_synthetic_data(sae, source, source, num_samples=tokens, batch_size=2000).to_dict()  # type: ignore[arg-type]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="SAELens' own numbers.")
    parser.add_argument("what", choices=["fixtures", "judge"])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    given = parser.parse_args()
    if given.what == "judge":
        truth = Ours(**load_tensors(given.truth))
        said = {str(folder): judge(folder, truth, given.tokens) for folder in given.paths}
        sys.stdout.write(json.dumps(said, indent=1) + "\n")
        return
    warnings.simplefilter("ignore")
    content = {
        "made_by": f"benchmarks/saelens_reference.py, sae-lens {sae_lens.__version__}, torch {torch.__version__}",
        **truth_and_samples(),
        "evaluation": evaluation(),
        "losses": losses(),
    }
    (out,) = given.paths
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
