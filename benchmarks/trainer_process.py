"""One trainer in a process of its environment, as many steps as a line of standard input says, for
benchmarks/train_step.py.

    ENVIRONMENT/bin/python -P benchmarks/trainer_process.py TRAINER ARCHITECTURE SETTING THREADS D F B K

Trainers are `saelens`, `dictionary_learning`, `sparsify` and ours, `fipo`. Each runs the step of its own training loop
on the same Gaussian batches [B, D], without the language model, its log and its progress bar. A setting is the name of
a way to run it (`SETTINGS`); the first line that asks for steps builds the trainer. The answer to a line is the mean
time of its steps, on a GPU until the last of them is done, and the memory of the process, as JSON: `seconds`, `peak`
bytes since it began, `before` bytes, held when all was imported and a toy had taken a step.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if sys.argv[1:2] == ["fipo"]:  # before torch, as in experiment.py
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from fipo.memory import keep_freed

    keep_freed()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[[Tensor], float | None]
"""One step; what it returns is added to its time: the share of what does not happen at every step."""
Shape = tuple[int, int, int, int]

if DEVICE == "cuda":
    SETTINGS = {
        ("saelens", "topk"): ("bfloat16", "bfloat16 compiled", "bfloat16 sparse"),
        ("saelens", "batchtopk"): ("bfloat16", "bfloat16 compiled"),
        ("dictionary_learning", "topk"): ("bfloat16",),
        ("dictionary_learning", "batchtopk"): ("bfloat16",),
        ("sparsify", "topk"): ("signum", "signum bfloat16", "adam bfloat16"),
    }
else:
    SETTINGS = {
        ("saelens", "topk"): ("bfloat16", "float32", "bfloat16 compiled", "float32 sparse"),
        ("saelens", "batchtopk"): ("bfloat16", "float32", "bfloat16 compiled"),
        ("dictionary_learning", "topk"): ("bfloat16", "float32"),
        ("dictionary_learning", "batchtopk"): ("bfloat16", "float32"),
        ("sparsify", "topk"): ("signum", "signum bfloat16", "adam", "adam bfloat16", "signum bfloat16 micro-batches"),
    }
SETTINGS |= {("fipo", architecture): ("pairs", "matrix") for architecture in ("topk", "batchtopk")}
"""What each rival offers that may make it faster. On a GPU float32 cannot: its products alone take longer than a step
in bfloat16, but those of sparsify, which takes TensorFloat-32."""
MICRO_BATCHES = 8
"""Chunks of a batch under sparsify's `micro_acc_steps`: its backward pass holds [B, K, D] otherwise."""


def autocast(setting: str) -> Any:
    """bfloat16 autocast where the setting names it."""
    return torch.autocast(DEVICE, dtype=torch.bfloat16) if "bfloat16" in setting.split() else nullcontext()


def saelens(architecture: str, setting: str, shape: Shape) -> Step:
    """`SAETrainer.step`; `compiled` is its flag compile_sae, `sparse` its use_sparse_activations."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    width, latents, batch, k = shape
    sae_class, config_class = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }[architecture]

    more = {"use_sparse_activations": True} if "sparse" in setting else {}
    sae = sae_class(config_class(d_in=width, d_sae=latents, k=k, device=DEVICE, **more))
    if "compiled" in setting:
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    sizes = {"total_training_samples": batch * 10_000, "train_batch_size_samples": batch}
    config = SAETrainerConfig(**sizes, lr_end=3e-5, device=DEVICE, autocast="bfloat16" in setting)
    trainer = SAETrainer(config, sae, iter(()))

    def step(acts_BD: Tensor) -> None:
        trainer.step(acts_BD)
        trainer.n_training_steps += 1

    return step


def dictionary_learning(architecture: str, setting: str, shape: Shape) -> Step:
    """`update` under its `autocast_dtype`, to which activations are cast; its loop does so on a GPU alone."""
    from dictionary_learning.trainers import BatchTopKTrainer, TopKTrainer

    width, latents, _, k = shape
    trainer_class = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[architecture]

    sizes = {"activation_dim": width, "dict_size": latents, "k": k}
    trainer = trainer_class(steps=10_000, **sizes, layer=0, lm_name="none", device=DEVICE)
    dtype = torch.bfloat16 if setting == "bfloat16" else torch.float32
    steps = iter(range(10_000))

    def step(acts_BD: Tensor) -> None:
        with autocast(setting):
            trainer.update(next(steps), acts_BD.to(dtype))

    return step


def sparsify(architecture: str, setting: str, shape: Shape) -> Step:
    """The body of `Trainer.fit` and its hook for one hookpoint; without its masks of tokens, which only cost."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    assert architecture == "topk"
    width, latents, batch, k = shape

    torch.set_float32_matmul_precision("high")
    sae = SparseCoder(width, SparseCoderConfig(num_latents=latents, k=k), DEVICE, dtype=torch.float32)
    if "adam" in setting:
        optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4)
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3), momentum=0.95)
        optimizer.train()
    silent_F = torch.zeros(latents, dtype=torch.long, device=DEVICE)
    fired_F = torch.zeros(latents, dtype=torch.bool, device=DEVICE)
    chunks = MICRO_BATCHES if "micro-batches" in setting else 1

    def step(acts_BD: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        variance = (acts_BD - acts_BD.mean(0)).pow(2).sum()
        for part_BD in acts_BD.chunk(chunks):
            with autocast(setting):
                out = sae(part_BD, total_variance=variance)
            fired_F[out.latent_indices.flatten()] = True
            float(out.fvu.detach())
            (out.fvu / chunks).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent_F.add_(batch)
        silent_F[fired_F] = 0
        fired_F.zero_()

    return step


def fipo(architecture: str, setting: str, shape: Shape) -> Step:
    """`train_step` with every part of the method on, by pairs or by matrices."""
    from benchmarks import our_step

    return our_step.stepper(architecture, shape, setting == "pairs", DEVICE)


TRAINERS = {function.__name__: function for function in (saelens, dictionary_learning, sparsify, fipo)}


def memory(name: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most. (The peak that getrusage tells begins with the parent's.)"""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated() if name == "VmRSS" else torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def main() -> None:
    """Build, then step when told."""
    trainer, architecture, setting, *numbers = sys.argv[1:]
    threads, width, latents, batch, k = map(int, numbers)
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # rivals print
    torch.manual_seed(0)
    TRAINERS[trainer](architecture, setting, (16, 64, 8, 4))(torch.randn(8, 16).to(DEVICE))  # imports what is left
    if "compiled" in setting:
        torch.compiler.reset()
    before = memory("VmRSS")
    torch.manual_seed(0)  # the toy drew numbers: from here on all trainers meet the same
    step: Step | None = None
    for line in sys.stdin:
        count = int(line)
        if step is None and count:
            batches = itertools.cycle([torch.randn(batch, width).to(DEVICE) for _ in range(4)])
            step = TRAINERS[trainer](architecture, setting, (width, latents, batch, k))
        waited_for()
        started, shares = time.perf_counter(), 0.0
        for _ in range(count):
            shares += step(next(batches)) or 0.0
        waited_for()
        seconds = (time.perf_counter() - started + shares) / max(1, count)
        answer = {"seconds": seconds, "peak": memory("VmHWM"), "before": before}
        print(json.dumps(answer), file=answers, flush=True)


def waited_for() -> None:
    """Wait for what the device still does."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
