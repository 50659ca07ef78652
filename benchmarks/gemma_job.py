"""The gemma-2-2b job and its phases, a slice of each of which can be run and timed on any device.

The architecture is the real one with random weights, its tokens are random; everything behind the language model is the
code of a run.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from benchmarks.our_step import MEAN_K, make_families, whole_method
from fipo import controls
from fipo.config import LSH, Penalty, Probing, Reservoir, RunConfig, Workload
from fipo.data.buffer import LiveSource, ShuffleBuffer
from fipo.data.harvest import harvest
from fipo.data.labelled import LabelledText
from fipo.data.lm import LanguageModel, find_blocks
from fipo.evaluate import Draws
from fipo.loop import build_all
from fipo.pooling import FeatureMap, pool_or_read
from fipo.randomness import generator_for
from fipo.sae import SAE
from fipo.state import TrainState
from fipo.train import train_step
from fipo.workloads import GEMMA_2_2B

PHASES = ("LM forward", "harvest and buffer", "SAE steps", "probing: LM forward", "probing: encode and pool")
PHASES += ("probing: fits",)
TRAINING = "the first three, as a run takes them"
"""Without waiting for the device behind each."""


class Job(NamedTuple):
    """The whole job and how much of it is measured."""

    workload: Workload
    model: dict[str, Any]
    """Of Gemma2Config."""
    classes: int
    """Over all probing datasets."""
    slice_classes: int
    """Classes of the one dataset that is measured."""
    warm_up: int
    """Steps before the clock starts."""
    steps: int
    """Steps that are measured."""


GEMMA = Job(
    workload=replace(GEMMA_2_2B, latents=16_384),
    model={
        **{"vocab_size": 256_000, "hidden_size": 2304, "num_hidden_layers": 26, "intermediate_size": 9216},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    },
    classes=36,
    slice_classes=5,
    warm_up=50,
    steps=128,
)
_SMALL = Probing(datasets=("none",), train_per_class=12, test_per_class=6, ks=(1, 5))
TINY = Job(
    workload=replace(
        GEMMA_2_2B,
        layers=(0, 1, 2),
        context=16,
        text=replace(GEMMA_2_2B.text, buffer_tokens=2048),
        probing=_SMALL,
        latents=64,
        k=4,
        batch_tokens=1024,
        train_tokens=16_384,
    ),
    model={
        **{"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 32},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    },
    classes=6,
    slice_classes=3,
    warm_up=2,
    steps=4,
)


class RandomModel(LanguageModel):
    """The architecture with random weights; adds up the time that its forward passes take."""

    def __init__(self, job: Job, device: str) -> None:
        self.name, self.layers, self.context, self.device = "random", job.workload.layers, job.workload.context, device
        with torch.device(device):
            config = transformers.Gemma2Config(**job.model)
            self.model = transformers.AutoModel.from_config(config, dtype=getattr(torch, job.workload.dtype))
        self.model.eval().requires_grad_(False)
        self.model.config.use_cache = False
        self.blocks = find_blocks(self.model, job.model["num_hidden_layers"])
        names = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "cls_token_id": None, "sep_token_id": None}
        self.tokenizer = SimpleNamespace(**names)
        self.seconds: float | None = 0.0

    def activations(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Of the wanted layers, [L, B, S, D], on the clock where there is one."""
        if self.seconds is None:
            return super().activations(ids_BS, mask_BS)
        started = now(self.device)
        acts_LBSD = super().activations(ids_BS, mask_BS)
        self.seconds += now(self.device) - started
        return acts_LBSD

    def random_rows(self, generator: torch.Generator, count: int | None = None) -> Iterator[list[int]]:
        """Full rows: a begin token and random content; endless where no count is given."""
        vocabulary = self.model.config.vocab_size
        while count is None or count > 0:
            ids_BS = torch.randint(3, vocabulary, (min(count or 256, 256), self.context), generator=generator)
            ids_BS[:, 0] = 2
            yield from ids_BS.tolist()
            count = None if count is None else count - len(ids_BS)


def now(device: str) -> float:
    """The time, when the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def run_config(workload: Workload) -> RunConfig:
    """Our method as a run has it, at the mean of the falling k: refreshes and revivals fall where they fall."""
    workload = replace(workload, k=round(MEAN_K * workload.k))
    return whole_method(
        "batchtopk",
        workload,
        refresh_every=LSH().refresh_every,
        revive_every=Reservoir().revive_every,
        penalty_every=Penalty().every,
    )


def slice_texts(job: Job) -> int:
    """Texts of the probing dataset that is measured."""
    return job.slice_classes * (job.workload.probing.train_per_class + job.workload.probing.test_per_class)


def scales(job: Job) -> dict[str, float]:
    """How often the measured slice of each phase fits into the job."""
    workload = job.workload
    training, probing = workload.train_tokens / (job.steps * workload.batch_tokens), job.classes / job.slice_classes
    return dict(zip((TRAINING, *PHASES), 4 * [training] + 3 * [probing], strict=True))


def measured(job: Job, device: str) -> dict[str, float]:
    """Seconds of the slice of every phase, and of training as a whole."""
    lm = RandomModel(job, device)
    config = run_config(job.workload)
    generator = generator_for(0, "tokens")
    source = LiveSource(lambda skip: harvest(lm, lm.random_rows(generator), skip=skip))
    buffer, states = build_all(config, source, None, device)
    for state in states.values():
        make_families(state)
    train_slice(lm, buffer, states, job.warm_up, device)
    seconds = train_slice(lm, buffer, states, job.steps, device)
    lm.seconds, started = None, now(device)
    for _ in range(job.steps):
        train_on(buffer.next_batch(), states)
    seconds[TRAINING] = now(device) - started
    probe_slice(lm, states, job, device, texts=max(2, slice_texts(job) // 50))
    return seconds | probe_slice(lm, states, job, device, texts=slice_texts(job))


def train_on(batch_BLD: Tensor, states: dict[int, TrainState]) -> None:
    """One step of every SAE."""
    for place, state in enumerate(states.values()):
        train_step(state, batch_BLD[:, place])


def train_slice(
    lm: RandomModel, buffer: ShuffleBuffer, states: dict[int, TrainState], steps: int, device: str
) -> dict[str, float]:
    """Seconds of the phases of so many steps. In the passes of the model, which the clock waits for, nothing else is
    done; a run is quicker."""
    lm.seconds = reading = training = 0.0
    for _ in range(steps):
        started = now(device)
        batch_BLD = buffer.next_batch()
        read = now(device)
        train_on(batch_BLD, states)
        reading, training = reading + read - started, training + now(device) - read
    return dict(zip(PHASES[:3], (lm.seconds, reading - lm.seconds, training), strict=True))


def probe_slice(
    lm: RandomModel, states: dict[int, TrainState], job: Job, device: str, *, texts: int
) -> dict[str, float]:
    """One dataset through the model and all SAEs; when it is whole, the fits too. In a cache of its own."""
    generator = generator_for(0, "texts", texts)
    maps = feature_maps(lm, states)
    lm.seconds, started = 0.0, now(device)
    with tempfile.TemporaryDirectory() as cache:
        outer, os.environ["FIPO_CACHE"] = os.environ.get("FIPO_CACHE"), cache
        try:
            rows = partial(lm.random_rows, generator, texts)
            pooled = pool_or_read({"texts": texts}, lambda: harvest(lm, rows()), texts, maps, lm.layers, device=device)
        finally:
            del os.environ["FIPO_CACHE"]
            os.environ |= {"FIPO_CACHE": outer} if outer is not None else {}
    pooling = now(device) - started - lm.seconds
    if texts == slice_texts(job):
        started = now(device)
        fit_all(pooled, job)
    return dict(zip(PHASES[3:], (lm.seconds, pooling, now(device) - started), strict=True))


def feature_maps(lm: RandomModel, states: dict[int, TrainState]) -> list[FeatureMap]:
    """Of each layer channels, latents and latents of the random control, as fipo.evaluate makes them."""
    maps = []
    for layer, state in states.items():
        sae = state.sae.eval()
        sample_BD = 4 * torch.randn(512, lm.width, generator=generator_for(0, "sample")).to(lm.device)
        l0 = controls.nearby_l0(state.config.workload.k)
        control = controls.random_sae(sae.latents, l0, sample_BD, generator_for(0, "control", layer))
        maps += [
            FeatureMap(layer, lm.width, lambda acts_BD: acts_BD, ("llm",), channels=True),
            FeatureMap(layer, sae.latents, sae.encode, ("sae", layer), keep=False),
            FeatureMap(layer, sae.latents, partial(low, control), ("random", layer)),
        ]
    return maps


def low(sae: SAE, acts_BD: Tensor) -> Tensor:
    """Codes under autocast, as those of the random control are made."""
    with torch.autocast(acts_BD.device.type, dtype=torch.bfloat16):
        return sae.encode(acts_BD)


def fit_all(pooled: list[Tensor], job: Job) -> None:
    """Every probe of one dataset, as fipo.evaluate fits them."""
    probing = job.workload.probing
    train = {str(place): ["text"] * probing.train_per_class for place in range(job.slice_classes)}
    test = {str(place): ["text"] * probing.test_per_class for place in range(job.slice_classes)}
    draws = Draws(LabelledText("random", train, test), probing, 0)
    for llm_ND, sae_NF, random_NF in zip(pooled[::3], pooled[1::3], pooled[2::3], strict=True):
        mean_D, directions_DC = controls.principal_components(llm_ND[: draws.train_texts])
        draws.score("llm", llm_ND, full=True)
        draws.score("pca", (llm_ND - mean_D) @ directions_DC, full=False)
        draws.score("sae", sae_NF, full=True)
        draws.score("random", random_NF, full=False)
