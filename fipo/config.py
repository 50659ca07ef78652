"""What a run is: frozen, validated records, and nothing that a run depends on outside them.

A `RunConfig` is a workload (which model, layers, text and sizes) and a method (which parts of FIPO are on). A part of
the method that is `None` is off. Built from plain values by `fipo.records.from_dict`, which is strict.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fipo.method import LSH, Importance, Levels, Optimiser, Penalty, Reservoir
from fipo.records import require

LEAST_CONTEXT = 3
"""Tokens of a row that leave one between a model's two special ones."""
BUDGETED = ("topk", "batchtopk")
"""Architectures of which k latents are active a token; those of the others are as many as their penalty leaves."""
Dtype = Literal["float32", "bfloat16", "float16"]
"""Formats in which a language model runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Where training text comes from and how much of it is turned into activations."""

    source: str
    """A Hugging Face dataset id, a local folder or file (parquet, jsonl, txt), or the name of a built-in source."""
    field: str = "text"
    """Column that holds the text."""
    config: str | None = None
    """Configuration of a dataset that has several, such as `en` of allenai/c4."""
    split: str = "train"
    """Split of a dataset."""
    revision: str | None = None
    """Revision of a hub dataset; None: the newest one when the run begins, whose `config.yaml` then names it."""
    tokens: int
    """Content tokens to harvest; training passes over them again when it needs more."""
    held_out_tokens: int
    """Content tokens of the first rows of the text, never trained on, for the final FVU, L0 and dead latents."""
    packed: bool
    """True: documents are joined into full contexts (decoders). False: one document a row, cut at the context."""
    cached: bool = True
    """Keep the activations on disk for the next run; False streams them from the model."""
    buffer_tokens: int = 131_072
    """Size of the shuffle buffer."""

    def __post_init__(self) -> None:
        require(bool(self.source), "text.source", self.source, "a dataset id, a path or a built-in source")
        require(self.tokens > 0, "text.tokens", self.tokens, "a positive number of tokens")
        require(
            self.held_out_tokens > 1, "text.held_out_tokens", self.held_out_tokens, "at least 2 tokens, which can vary"
        )
        require(self.buffer_tokens > 0, "text.buffer_tokens", self.buffer_tokens, "a positive number of tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Probing:
    """The sparse_probing evaluation (SAEBench's protocol)."""

    datasets: tuple[str, ...]
    """Names from the catalogue of labelled text, or local folders; each one-vs-rest over its classes."""
    train_per_class: int = 2000
    """Training texts a class; a binary task has as many negatives, drawn evenly from the other classes."""
    test_per_class: int = 500
    """Test texts a class."""
    ks: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    """Numbers of latents a probe may use."""
    repeats: int = 1
    """Draws of splits and negatives; the first is the result, all of them give its spread."""
    rng: Literal["fipo", "saebench"] = "fipo"
    """`fipo`: one generator a dataset, class and split, hence the same negatives for every k and method. `saebench`:
    SAEBench's single stream of random numbers, replayed."""
    pooling: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of encoding and averaging; `bfloat16` is SAEBench's for models that run in it."""
    cached: bool = False
    """Keep the token activations of the texts on disk, for runs that follow; False pools them as they come."""

    def __post_init__(self) -> None:
        require(len(self.datasets) > 0, "probing.datasets", self.datasets, "at least one dataset")
        ks = len(self.ks) > 0 and min(self.ks) > 0 and len(set(self.ks)) == len(self.ks)
        require(ks, "probing.ks", self.ks, "positive numbers of latents, each once")
        require(self.train_per_class > 1, "probing.train_per_class", self.train_per_class, "at least 2 texts")
        require(self.test_per_class > 1, "probing.test_per_class", self.test_per_class, "at least 2 texts")
        require(self.repeats > 0, "probing.repeats", self.repeats, "at least one draw")


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Model, layers, text, sizes and probing datasets: everything that says how large the job is."""

    name: str
    """Name under which `FIPO_WORKLOAD` finds it."""
    model: str
    """Hugging Face id, local folder, or `package:NAME/FOLDER` for weights inside an installed data package."""
    weights_sha256: str | None = None
    """SHA-256 that the weights file must have, or the run stops; None accepts any."""
    layers: tuple[int, ...]
    """Blocks whose output (residual stream) is read, counted from 0; one SAE each."""
    context: int = 128
    """Tokens a row of text, special tokens included."""
    dtype: Dtype = "float32"
    """Number format in which the language model runs and activations are kept."""
    text: Text
    """Training text."""
    probing: Probing
    """Evaluation text."""
    latents: int
    """F, the dictionary size."""
    k: int
    """Active latents a token for topk and batchtopk (there a few more: whatever ties with the last of a batch)."""
    sparsity_penalty: float
    """λ_s of relu (L1) and jumprelu (L0), on inputs of mean squared norm D and a loss averaged over D."""
    learning_rate: float = 3e-4
    """Peak learning rate of Adam."""
    batch_tokens: int = 2048
    """B, tokens a step."""
    train_tokens: int
    """Tokens trained on, repeats counted; steps = train_tokens // batch_tokens."""
    dead_tokens: int
    """A latent silent for so many training tokens is dead."""

    def __post_init__(self) -> None:
        require(len(self.layers) > 0, "workload.layers", self.layers, "at least one layer")
        require(min(self.layers) >= 0, "workload.layers", self.layers, "layer numbers from 0")
        require(len(set(self.layers)) == len(self.layers), "workload.layers", self.layers, "each layer once")
        require(self.context >= LEAST_CONTEXT, "workload.context", self.context, f"at least {LEAST_CONTEXT} tokens")
        require(self.latents > 0, "workload.latents (F)", self.latents, "a positive number of latents")
        require(self.k > 0, "workload.k", self.k, "a positive number of active latents")
        require(self.k <= self.latents, "workload.k", self.k, f"at most workload.latents = {self.latents}")
        require(
            max(self.probing.ks) <= self.latents,
            "workload.probing.ks",
            self.probing.ks,
            f"at most workload.latents = {self.latents}",
        )
        require(self.sparsity_penalty >= 0, "workload.sparsity_penalty", self.sparsity_penalty, "zero or more")
        require(self.learning_rate > 0, "workload.learning_rate", self.learning_rate, "a positive rate")
        require(self.batch_tokens > 0, "workload.batch_tokens", self.batch_tokens, "a positive number of tokens")
        require(self.dead_tokens > 0, "workload.dead_tokens", self.dead_tokens, "a positive number of tokens")
        require(
            self.train_tokens >= self.batch_tokens,
            "workload.train_tokens",
            self.train_tokens,
            f"at least one batch ({self.batch_tokens} tokens), since a run of zero steps is no result",
        )
        require(
            self.text.buffer_tokens >= self.batch_tokens,
            "workload.text.buffer_tokens",
            self.text.buffer_tokens,
            f"at least one batch ({self.batch_tokens} tokens)",
        )

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.train_tokens // self.batch_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run, whole."""

    run: str
    """Name of the experiment, `run_0` to `run_9`."""
    seed: int = 42
    """Seed of every generator: initialisation, shuffling, reservoir, planes, probes."""
    workload: Workload
    """Model, layers, text and sizes."""
    architecture: Literal["relu", "topk", "batchtopk", "jumprelu"] = "relu"
    """Activation of the SAE."""
    frozen_decoder: bool = False
    """Keep the decoder at its random initialisation: the control that a dictionary worth its training must beat."""
    aux_weight: float = 0.0
    """α of the auxiliary loss by which dead latents learn the residual (Gao et al. 2024); 0 is off."""
    optimiser: Optimiser = dataclasses.field(default_factory=Optimiser)
    """Adam and its schedules."""
    importance: Importance | None = None
    """σ; None: nothing uses it."""
    reservoir: Reservoir | None = None
    """Activation reservoir and revival; None: off."""
    lsh: LSH | None = None
    """Candidate pairs; None: off."""
    penalty: Penalty | None = None
    """Ω; None: off, though pairs may be mined and reported."""
    levels: Levels | None = None
    """Nested reconstruction; None: plain."""
    log_every: int = 25
    """Steps between lines of the training log."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    checkpoint_share: float = 0.02
    """Largest share of the training time that goes into writing checkpoints; a due one waits until then."""

    @property
    def budgeted(self) -> bool:
        """Are k latents active a token?"""
        return self.architecture in BUDGETED

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "zero or more")
        require(self.aux_weight >= 0, "aux_weight", self.aux_weight, "zero or more")
        require(self.log_every > 0, "log_every", self.log_every, "a positive number of steps")
        require(self.checkpoint_every > 0, "checkpoint_every", self.checkpoint_every, "a positive number of steps")
        require(self.checkpoint_share > 0, "checkpoint_share", self.checkpoint_share, "a positive share")
        require(
            self.lsh is None or self.importance is not None,
            "lsh",
            "on",
            "importance as well, since queues keep the latents of highest σ",
        )
        require(
            self.penalty is None or self.penalty.kind == "ortsae" or self.lsh is not None,
            "penalty",
            "on",
            "lsh as well, which finds its pairs",
        )
        moved = [self.reservoir, self.penalty, self.levels if self.levels and self.levels.decoder_only else None]
        require(
            not self.frozen_decoder or moved == [None, None, None],
            "frozen_decoder",
            self.frozen_decoder,
            "no reservoir, no penalty and levels.decoder_only 0, which move decoder rows",
        )
        require(
            self.penalty is None
            or self.lsh is None
            or self.penalty.estimator != "unbiased"
            or self.lsh.partners is None,
            "lsh.partners",
            self.lsh.partners if self.lsh else None,
            "null with penalty.estimator unbiased, whose weights hold for all candidates only",
        )
        require(
            self.penalty is None
            or self.lsh is None
            or self.penalty.estimator != "unbiased"
            or self.lsh.min_cosine <= self.penalty.margin,
            "lsh.min_cosine",
            self.lsh.min_cosine if self.lsh else None,
            "at most penalty.margin with penalty.estimator unbiased, or pairs that pay are never candidates",
        )
        require(
            self.levels is None or not self.levels.by_importance or self.importance is not None,
            "levels",
            "by importance",
            "the section importance as well, or levels.order fixed and levels.favour [0, 0, 0]",
        )
