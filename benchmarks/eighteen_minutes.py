"""The whole gemma-2-2b job in 18 minutes of one card: measured on a GPU, predicted elsewhere.

    python -m benchmarks.eighteen_minutes [--json OUT] [--tiny 1]

The job: three SAEs (layers 5, 12, 19; F = 16,384; K = 64; B = 2,048) on 50 M tokens of the residual stream, which come
from the model as they are needed, then sparse probing of all three (36 classes of 2,500 texts of up to 128 tokens).
Measured: the real architecture with random weights on random tokens, a warm-up, then a slice of every phase, scaled to
the job. Predicted: what every phase does, counted by running a part of it on the CPU (benchmarks/roofline.py), at
assumed efficiencies. Left out of both: reading weights and text, tokenising, mean and scale of the first pool,
checkpoints. The last quarter of the steps, in which the decoder alone learns, is counted like the rest. `--tiny 1`
measures a toy model, on any device: it tries the code and says nothing of the card.
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

from benchmarks import roofline
from benchmarks.common import arguments, publish
from benchmarks.our_step import whole_method
from benchmarks.roofline import Cost, counted
from fipo import controls
from fipo.config import LSH, Probing, Reservoir, RunConfig, Workload
from fipo.data.buffer import LiveSource, ShuffleBuffer
from fipo.data.harvest import Chunk, harvest
from fipo.data.labelled import LabelledText
from fipo.data.lm import LanguageModel, find_blocks
from fipo.evaluate import Draws
from fipo.loop import build_all
from fipo.pooling import FeatureMap, pool, pool_or_read
from fipo.randomness import generator_for
from fipo.sae import SAE
from fipo.train import TrainState, build_state, train_step
from fipo.workloads import GEMMA_2_2B

BUDGET = 18 * 60
"""Seconds."""
PHASES = ("LM forward", "harvest and buffer", "SAE steps", "probing: LM forward", "probing: encode and pool")
PHASES += ("probing: fits",)
EPOCHS, DENSITY = 30, 0.1
"""Assumed of the fits: epochs until a probe on everything stops, share of nonzeros in pooled codes."""


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
    steps=100,
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
        self.seconds = 0.0

    def activations(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Of the wanted layers, [L, B, S, D], on the clock."""
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
    """Our method as a run has it: refreshes and revivals fall where they fall."""
    return whole_method("batchtopk", workload, refresh_every=LSH().refresh_every, revive_every=Reservoir().revive_every)


def slice_texts(job: Job) -> int:
    """Texts of the probing dataset that is measured."""
    return job.slice_classes * (job.workload.probing.train_per_class + job.workload.probing.test_per_class)


def scales(job: Job) -> dict[str, float]:
    """How often the measured slice of each phase fits into the job."""
    workload = job.workload
    training, probing = workload.train_tokens / (job.steps * workload.batch_tokens), job.classes / job.slice_classes
    return dict(zip(PHASES, 3 * [training] + 3 * [probing], strict=True))


def measured(job: Job, device: str) -> dict[str, float]:
    """Seconds of the slice of every phase."""
    lm = RandomModel(job, device)
    config = run_config(job.workload)
    generator = generator_for(0, "tokens")
    source = LiveSource(lambda skip: harvest(lm, lm.random_rows(generator), skip=skip))
    buffer, states = build_all(config, source, None, device)
    train_slice(lm, buffer, states, job.warm_up, device)
    seconds = train_slice(lm, buffer, states, job.steps, device)
    probe_slice(lm, states, job, device, texts=max(2, slice_texts(job) // 50))
    return seconds | probe_slice(lm, states, job, device, texts=slice_texts(job))


def train_slice(
    lm: RandomModel, buffer: ShuffleBuffer, states: dict[int, TrainState], steps: int, device: str
) -> dict[str, float]:
    """Steps as the training loop takes them."""
    lm.seconds = reading = training = 0.0
    for _ in range(steps):
        started = now(device)
        batch_BLD = buffer.next_batch()
        read = now(device)
        for place, state in enumerate(states.values()):
            train_step(state, batch_BLD[:, place])
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


def costs(job: Job) -> dict[str, Cost]:
    """What every phase of the job does."""
    workload = job.workload
    layers, width = len(workload.layers), job.model["hidden_size"]
    rows = workload.train_tokens / (workload.context - 1)  # a begin token leads every row, and is not trained on
    texts = job.classes * (workload.probing.train_per_class + workload.probing.test_per_class)
    row = block_cost(job).times(max(workload.layers) + 1)
    # Stacked, cut to content and turned, checked, put into the pool, drawn, moved into holes: read and written each.
    buffered = Cost(moved=12 * layers * width * 2, kernels=40 / workload.batch_tokens)
    found = (
        row.times(rows),
        buffered.times(workload.train_tokens),
        step_cost(job).times(layers * workload.steps),
        row.times(texts),
        pooling_cost(job).times(layers * texts),
        fit_cost(job),
    )
    return dict(zip(PHASES, found, strict=True))


def block_cost(job: Job) -> Cost:
    """One block of the model on one row of text. Kernels are those of a batch, shared by the 2,048 tokens of it."""
    found = []
    for layers in (1, 2):
        sizes = job.model | {"num_hidden_layers": layers, "vocab_size": 16}
        lm = RandomModel(job._replace(model=sizes, workload=replace(job.workload, layers=(layers - 1,))), "cpu")
        ids_BS = torch.full((1, lm.context), 3)
        found.append(counted(lambda lm=lm, ids_BS=ids_BS: lm.activations(ids_BS, torch.ones_like(ids_BS).bool())))
    cost = found[1].plus(found[0], -1)
    return cost._replace(kernels=cost.kernels * lm.context / max(2048, lm.context))


def step_cost(job: Job) -> Cost:
    """One step of one SAE, between refreshes of the pairs, and a share of a refresh."""
    workload, width = job.workload, job.model["hidden_size"]
    config = run_config(workload)
    state = build_state(config, 0, torch.zeros(width), 1.0)
    acts_BD = torch.randn(workload.batch_tokens, width, generator=generator_for(0, "acts"))
    first = counted(lambda: train_step(state, acts_BD))
    step = counted(lambda: train_step(state, acts_BD))
    return step.plus(first.plus(step, -1), 1 / LSH().refresh_every)


def pooling_cost(job: Job) -> Cost:
    """Encoding and pooling of one text for one layer: channels, latents, random control. Kernels as of 2,048 tokens."""
    workload, width = job.workload, job.model["hidden_size"]
    state = build_state(run_config(workload), 0, torch.zeros(width), 1.0)
    lm: Any = SimpleNamespace(width=width, device="cpu")
    maps = feature_maps(lm, {workload.layers[0]: state})
    acts_BLD = torch.randn(workload.context, 1, width, generator=generator_for(0, "acts"))
    text_B = torch.zeros(workload.context, dtype=torch.int64)
    cost = counted(lambda: pool([Chunk(acts_BLD, text_B)], 1, maps, workload.layers[:1]))
    return cost._replace(kernels=cost.kernels * workload.context / max(2048, workload.context))


def fit_cost(job: Job) -> Cost:
    """The probes, by formula: singular values, and what a probe on everything reads."""
    probing, width, latents = job.workload.probing, job.model["hidden_size"], job.workload.latents
    train, each = probing.train_per_class, probing.train_per_class + probing.test_per_class
    datasets, layers = job.classes / job.slice_classes, len(job.workload.layers)
    texts, rows = job.slice_classes * each, 2 * train
    flop = 6 * job.slice_classes * train * width**2 + 20 * width**3  # thin SVD
    flop += 2 * texts * width**2 + 8 * job.slice_classes * texts * (width + latents)  # components, mean differences
    numbers = rows * (width + DENSITY * latents * 5)  # of a sparse row also places, gathered and scattered
    moved = job.slice_classes * EPOCHS * 2 * 4 * numbers + 2 * 4 * texts * (width + 2 * latents)
    return Cost(host_flop=flop, host_moved=moved).times(datasets * layers)


def table(seconds: dict[str, float], kind: str, found: dict[str, Cost]) -> list[dict[str, Any]]:
    """One row a phase; `seconds` are those of the whole job."""
    rows = []
    for phase in PHASES:
        cost, took = found[phase], seconds[phase]
        rows.append(
            {
                "phase": phase,
                f"seconds, {kind}": took,
                "of 18 minutes": took / BUDGET,
                "PFLOP": (cost.flop + cost.flop_32 + cost.host_flop) / 1e15,
                "TB": (cost.moved + cost.host_moved) / 1e12,
                "M kernels": cost.kernels / 1e6,
                "roofline seconds": cost.roofline,
                "share of roofline": cost.roofline / took,
            }
        )
    return rows


def in_time(job: Job, seconds: dict[str, float]) -> dict[str, float]:
    """Minutes of the job, and the tokens that can be trained on in 18 minutes with the probing in them."""
    training, probing = (sum(seconds[phase] for phase in part) for part in (PHASES[:3], PHASES[3:]))
    share = max(0.0, BUDGET - probing) / training
    tokens = share * job.workload.train_tokens / 1e6
    return {"minutes": (training + probing) / 60, "million_tokens_in_18_minutes": tokens, "share_of_the_plan": share}


def main() -> None:
    """Measure or predict, and publish."""
    given = arguments(__doc__, tiny=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    job = TINY if given.tiny else GEMMA
    found = costs(job)
    if given.tiny or device == "cuda":
        kind, settings = "measured", {"kind": "measured", "rooflines are those of": roofline.CARD}
        times = scales(job)
        seconds = {phase: times[phase] * value for phase, value in measured(job, device).items()}
    else:
        kind, seconds = "prediction", {phase: cost.predicted for phase, cost in found.items()}
        settings = {"kind": "prediction, not measured", "card": roofline.CARD, **assumptions()}
    publish("eighteen_minutes", table(seconds, kind, found), in_time(job, seconds), given.json, settings)


def assumptions() -> dict[str, float]:
    """All that a prediction assumes."""
    names = ("FLOPS", "FLOPS_32", "BYTES", "HOST_FLOPS", "HOST_BYTES", "FLOP_EFFICIENCY", "BYTES_EFFICIENCY")
    return {name: getattr(roofline, name) for name in (*names, "LAUNCH_SECONDS")} | {
        "epochs": EPOCHS,
        "density": DENSITY,
    }


if __name__ == "__main__":
    main()
