"""SAELens' own trainer, one step a line of standard input: the rival of benchmarks/train_step.py, in its environment.

    ENVIRONMENT/bin/python benchmarks/saelens_step.py ARCHITECTURE D F B K

Its step as its trainer runs it, bfloat16 autocast on, on the same random batches; `done` is the answer to every line.
"""

import sys

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer


def main() -> None:
    """Build, then step when told."""
    width, latents, batch, k = map(int, sys.argv[2:])
    sae_class, config_class = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }[sys.argv[1]]
    torch.manual_seed(0)
    batches = [torch.randn(batch, width) for _ in range(4)]
    trainer = SAETrainer(
        SAETrainerConfig(total_training_samples=batch * 10_000, train_batch_size_samples=batch, autocast=True),
        sae_class(config_class(d_in=width, d_sae=latents, k=k, normalize_activations="none")),
        iter(batches),
    )
    for step, _ in enumerate(sys.stdin):
        trainer.step(batches[step % 4])
        trainer.n_training_steps += 1
        print("done", flush=True)


if __name__ == "__main__":
    main()
