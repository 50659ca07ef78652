"""The parts of the method as records, one for each: what each can be set to, and what it is by default.

All shares are of the run's steps, so that a schedule fits a run of any length.
"""

import math
from dataclasses import dataclass
from typing import Literal

from fipo.records import require


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """σ_F, the EMA of activation norms (METHOD section 1)."""

    decay: float = 0.999
    """β, decay a step."""
    norm: Literal["l1", "l2"] = "l1"
    """Norm over the batch: l1 is mean |a|, l2 the root mean square."""

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, "importance.decay", self.decay, "a decay from 0 to below 1")

    def half_life_tokens(self, batch_tokens: int) -> float:
        """Tokens after which a past batch counts half."""
        return batch_tokens * math.log(0.5) / math.log(self.decay) if self.decay > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservoir:
    """The activation reservoir and the revival of dead latents from it (METHOD section 2)."""

    slots: int = 4096
    """R, tokens kept."""
    half_life_steps: float = 50.0
    """Steps after which a kept token's weight counts half against a new one's (forward decay)."""
    revive_every: int = 50
    """Steps between revivals; none in the last fifth of training, where the rate is too low to learn a new latent."""
    encoder_scale: float = 0.5
    """Norm of a revived encoder row, in units of the mean norm of the live ones."""

    def __post_init__(self) -> None:
        require(self.slots > 0, "reservoir.slots", self.slots, "a positive number of slots")
        require(self.half_life_steps > 0, "reservoir.half_life_steps", self.half_life_steps, "a positive number")
        require(self.revive_every > 0, "reservoir.revive_every", self.revive_every, "a positive number of steps")
        require(self.encoder_scale > 0, "reservoir.encoder_scale", self.encoder_scale, "a positive factor")


@dataclass(frozen=True, kw_only=True, slots=True)
class LSH:
    """Candidate pairs of similar decoder rows by sign random projections (METHOD section 3)."""

    tables: int = 8
    """T, hash tables."""
    bits: int | None = None
    """S, sign bits a table; 2^S buckets. null: as few as leave a bucket no more latents, on average, than a queue has
    room for. 0, with one table and a capacity of F, compares all pairs."""
    capacity: int = 128
    """C, latents of highest importance that a bucket keeps."""
    min_cosine: float = 0.1
    """Pairs below this cosine are not candidates."""
    partners: int | None = 2
    """Candidates kept a latent, those of higher importance for which it pays most; null keeps all."""
    refresh_every: int = 50
    """Steps between refreshes; planes are redrawn at each."""
    autocast: bool = True
    """Project under torch.autocast in bfloat16."""

    def __post_init__(self) -> None:
        require(self.tables > 0, "lsh.tables", self.tables, "a positive number of tables")
        require(self.bits is None or 0 <= self.bits <= 24, "lsh.bits", self.bits, "0 to 24 bits, or null")
        require(self.capacity > 1, "lsh.capacity", self.capacity, "room for at least one pair")
        places = self.capacity << (self.bits or 0)
        require(
            places <= 2**24, "lsh.bits", self.bits, f"at most 2^24 places in the queues of {self.capacity}, or null"
        )
        require(0 <= self.min_cosine < 1, "lsh.min_cosine", self.min_cosine, "a cosine from 0 to below 1")
        require(self.partners is None or self.partners > 0, "lsh.partners", self.partners, "a positive number or null")
        require(self.refresh_every > 0, "lsh.refresh_every", self.refresh_every, "a positive number of steps")

    def bits_of(self, latents: int) -> int:
        """S for a dictionary of F latents."""
        return self.bits if self.bits is not None else min(24, ((latents - 1) // self.capacity).bit_length())


@dataclass(frozen=True, kw_only=True, slots=True)
class Penalty:
    """Ω, importance-weighted orthogonality (METHOD section 4), or a rival's."""

    kind: Literal["prioritised", "ortsae"] = "prioritised"
    """Ω over the pairs that LSH finds, or OrtSAE's: every row's largest cosine in a random chunk of the dictionary."""
    weight: float = 0.02
    """λ_o."""
    every: int = 5
    """Ω is a term of every n-th step alone, with n times its weight (lazy regularisation, Karras et al. 2020, arXiv
    1912.04958, appendix B; unlike there, Adam's settings stay as they are): directions change slowly."""
    estimator: Literal["max", "sum", "unbiased"] = "max"
    """Over a latent's candidates: the worst one, all of them, or all weighted by one over their collision chance."""
    yields: Literal["less_important", "both"] = "less_important"
    """Who moves: only the less important of a pair, or both."""
    margin: float = 0.0
    """Cosine that costs nothing."""
    chunk: int = 8192
    """Rows a chunk of ortsae, drawn anew at each step."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, "penalty.weight", self.weight, "zero or more")
        require(self.every > 0, "penalty.every", self.every, "a positive number of steps")
        require(0 <= self.margin < 1, "penalty.margin", self.margin, "a cosine from 0 to below 1")
        require(self.chunk > 1, "penalty.chunk", self.chunk, "at least 2 rows")


@dataclass(frozen=True, kw_only=True, slots=True)
class Levels:
    """Nested reconstruction (METHOD section 4b): level m is reconstructed from levels 1..m."""

    order: Literal["fixed", "importance"] = "importance"
    """By index (Matryoshka) or by σ, largest first."""
    shares: tuple[float, ...] = (1 / 256, 1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Share of the dictionary in the first m levels; increasing, the last one is 1. The first ones are small, since
    within a level nothing keeps a parent's few children from holding its direction in its place."""
    drawn: bool = True
    """Draw the cuts anew at each step, each between its share and the next one."""
    rise: float = 0.8
    """Share of the steps over which the power of the shares rises from `short_power` to 1, and favours go from their
    first power to the later ones: latents must first be found, by every level's gradient."""
    stop_gradient: float = 0.25
    """s: 0 lets later levels pull at earlier ones (Matryoshka), 1 leaves each only what the earlier ones left."""
    held: tuple[float, ...] = (0.6, 0.8)
    """Shares of the steps from which on s rises from 0, and at which it is whole: directions are learned without it."""
    short: tuple[float, ...] = (0.4, 0.5)
    """Smallest code kept over the mean one (`BatchTopK.shortage`) up to which s and the powers are those of the step,
    and from which they are 0 and as at first: where codes as good as those kept are cut off, a level that learns only
    what is left wastes its share of the budget, and small levels take codes that it lacks."""
    short_power: float = 0.75
    """Power of the shares at first, and where the budget is short: it makes levels larger."""
    favour: tuple[float, ...] = (-0.2, -0.1, 0.25)
    """Powers by which codes count where they vie for one budget (batchtopk): of σ over its mean at first, and after
    `rise` where the budget is short; of 1 + σ over its mean where it is not. All 0: all count the same."""
    robust: float = 1.0
    """Power by which tokens that are explained badly count less: 0, as by the squared error; 1, as by its root; 2, as
    by its logarithm."""
    plain: float = 0.0
    """Weight of the unlevelled reconstruction beside the mean over the levels, from 0 (levels alone) to 1."""
    decoder_only: float = 0.1
    """Share of the steps, the last ones, in which the encoder is frozen and the decoder alone learns."""
    settling_rate: float = 0.3
    """Learning rate of these steps at first, in units of the run's; from there it falls to 0, as it did before them."""
    shrink: float = 0.1
    """By how much of themselves codes are made smaller before these steps: kept codes are too large (METHOD 4d)."""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.shares), self.shares, strict=False))
        require(rising and self.shares[-1:] == (1.0,), "levels.shares", self.shares, "rising shares that end in 1.0")
        require(0 <= self.stop_gradient <= 1, "levels.stop_gradient", self.stop_gradient, "a strength from 0 to 1")
        bounds = len(self.short) == 2 and 0 <= self.short[0] < self.short[1]
        require(bounds, "levels.short", self.short, "two rising numbers, such as [0.4, 0.5] or, for always, [1, 2]")
        held = len(self.held) == 2 and 0 <= self.held[0] <= self.held[1] <= 1
        require(held, "levels.held", self.held, "two shares, such as [0.6, 0.8] or, from the first step on, [0, 0]")
        require(0 <= self.rise <= 1, "levels.rise", self.rise, "a share from 0 to 1")
        require(0 < self.short_power <= 1, "levels.short_power", self.short_power, "a power above 0, at most 1")
        favour = len(self.favour) == 3 and all(-1 <= power <= 1 for power in self.favour)
        require(favour, "levels.favour", self.favour, "three powers from -1 to 1; [0, 0, 0] for none")
        require(0 <= self.robust <= 2, "levels.robust", self.robust, "a power from 0 to 2")
        require(0 <= self.plain <= 1, "levels.plain", self.plain, "a weight from 0 to 1")
        require(0 <= self.decoder_only < 1, "levels.decoder_only", self.decoder_only, "a share from 0 to below 1")
        require(0 <= self.settling_rate <= 1, "levels.settling_rate", self.settling_rate, "a share from 0 to 1")
        require(0 <= self.shrink < 1, "levels.shrink", self.shrink, "a share from 0 to below 1")

    @property
    def by_importance(self) -> bool:
        """Does anything here read σ?"""
        return self.order == "importance" or any(self.favour)


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimiser:
    """Adam and its schedules, as shares of the run so that they fit any length."""

    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    k_start: float = 2.0
    """Multiple of k with which topk and batchtopk start, so that every latent learns before the budget is short."""
    k_fall: float = 0.8
    """Share of the steps over which it falls to 1."""
    penalty_warmup: float = 0.5
    """Share of the steps over which λ_s and λ_o rise from 0: an unlearned dictionary must not be thinned."""
    decay: float = 0.2
    """Share of the steps, the last ones in which the encoder learns, over which the learning rate falls to 0."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Adam's two decays."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    autocast: bool = True
    """Run the matrix products in bfloat16 (weights, moments, losses and statistics stay float32)."""

    def __post_init__(self) -> None:
        require(0 <= self.warmup <= 1, "optimiser.warmup", self.warmup, "a share from 0 to 1")
        require(1 <= self.k_start <= 1e6, "optimiser.k_start", self.k_start, "a multiple from 1 to a million")
        require(0 <= self.k_fall <= 1, "optimiser.k_fall", self.k_fall, "a share from 0 to 1")
        require(0 <= self.penalty_warmup <= 1, "optimiser.penalty_warmup", self.penalty_warmup, "a share from 0 to 1")
        require(0 <= self.decay <= 1, "optimiser.decay", self.decay, "a share from 0 to 1")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optimiser.betas",
            self.betas,
            "two decays from 0 to below 1",
        )
        require(self.clip > 0, "optimiser.clip", self.clip, "a positive norm")
