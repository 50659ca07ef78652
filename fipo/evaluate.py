"""Sparse probing of saved SAEs: texts once through the language model, for all layers, SAEs and controls at once.

Shapes: N texts, B tokens, T tasks (classes) of a dataset, M rows of a task, D model width, F latents, R repeats.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fipo import controls
from fipo.config import Probing
from fipo.data.harvest import Chunk
from fipo.data.labelled import LabelledText
from fipo.data.lm import LanguageModel
from fipo.data.prepare import probe_chunks, probe_key, probe_store
from fipo.data.store import ActivationStore
from fipo.errors import UserError
from fipo.export import READING, load_sae
from fipo.files import read_json, sha256_file, sha256_json
from fipo.pooling import FeatureMap, encode_in, numbers_or_read, pool_or_read
from fipo.probing import SparseProbes, Tasks, full_accuracies, one_vs_rest, sparse_probes
from fipo.progress import progress, say
from fipo.randomness import generator_for, plain_generator
from fipo.replay import replay
from fipo.sae import SAE
from fipo.screen import screened

SAMPLE_TEXTS = 128
"""Places, evenly spaced over all datasets, from which the tokens come on which an SAE's L0 and scale are found."""
Control = tuple[int, int, float]
"""Layer, latents and L0 of a random SAE."""


class Subject(NamedTuple):
    """An SAE to be probed."""

    layer: int
    sae: SAE
    key: str
    """Names all that its codes depend on."""


class Scores(NamedTuple):
    """What one kind of features scores on one dataset."""

    full_T: Tensor | None
    """Accuracy of the probe on all features; None where it was not asked for."""
    first: SparseProbes
    """Those of the first draw."""
    repeated: dict[int, Tensor]
    """k -> accuracy of every draw, [R, T]."""


class DatasetScores(NamedTuple):
    """All that was found on one dataset for one SAE."""

    name: str
    classes: list[str]
    rows_TM: Tensor
    """Numbers of the test texts behind the rows."""
    scores: dict[str, Scores]
    """`llm` (channels), `sae` (latents), and the controls `pca` and `random`."""
    replayed: dict[str, list[float]] | None = None
    """Metric -> accuracy of every class on SAEBench's own stream of random numbers, where it was asked for."""


def load_subject(folder: Path, layer: int) -> Subject:
    """The SAE saved in `folder`."""
    sae, config = load_sae(folder), read_json(folder / "cfg.json")
    meant = {name: value for name, value in config.items() if name not in ("metadata", "device")}
    return Subject(layer, sae, sha256_json([meant, sha256_file(folder / "sae_weights.safetensors"), READING]))


def probe(
    lm: LanguageModel,
    data: list[LabelledText],
    subjects: Mapping[str, Subject],
    probing: Probing,
    seed: int,
    *,
    keep: bool = True,
    harvested: Callable[[Collection[bool]], None] = lambda _: None,
) -> dict[str, list[DatasetScores]]:
    """Scores of every SAE on every dataset, beside the model's own channels and the controls.

    `keep`: keep the SAEs' pooled codes in the cache (the model's channels always are). `harvested` is called when the
    token activations that are to be kept are on disk, with whether each was made now and not found there.
    """
    for name, subject in subjects.items():
        check_fits(name, subject, lm, probing.ks)
    stores: dict[str, ActivationStore] = {}
    if probing.cached:
        with progress("probe text", sum(len(one.texts) for one in data), "texts") as advance:
            for one in data:
                stores[one.name] = probe_store(one, lm)
                advance(len(one.texts), one.name)
    harvested([store.made for store in stores.values()])
    maps, control_of = _feature_maps(lm, data, stores, subjects, probing, seed, keep)
    results: dict[str, list[DatasetScores]] = {name: [] for name in subjects}
    streams = {name: plain_generator(seed) for name in subjects}
    with progress("probing", len(data) * len(subjects), "datasets") as advance:
        for one in data:
            pooled = dict(zip(maps, _pooled(one, stores.get(one.name), lm, maps.values(), probing), strict=True))
            tasks = Draws(one, probing, seed)
            by_layer = functools.cache(functools.partial(_score_layer, pooled, tasks))
            by_control = functools.cache(functools.partial(_score_control, pooled, tasks))
            for name, subject in subjects.items():
                scores = {**by_layer(subject.layer), "sae": tasks.score("sae", pooled["sae", name], full=True)}
                scores["random"] = by_control(control_of[name])
                found = DatasetScores(one.name, list(one.train), tasks.first[1].rows_TM, scores)
                if probing.rng == "saebench":
                    features = (pooled["llm", subject.layer], pooled["sae", name])
                    sizes = ([len(texts) for texts in split.values()] for split in (one.train, one.test))
                    found = found._replace(replayed=replay(*features, *sizes, probing.ks, streams[name]))
                results[name].append(found)
                advance(1, f"{one.name} {name}")
    return results


class Draws:
    """The binary tasks of a dataset, drawn as often as repeats are asked for: the first on the given split, the others
    on splits drawn anew from the same texts. Every kind of features meets the same tasks."""

    def __init__(self, data: LabelledText, probing: Probing, seed: int) -> None:
        self.data, self.probing, self.seed = data, probing, seed
        train_N, test_N = _numbers(data)
        self.train_texts = sum(map(len, train_N))
        self.draws = [self._draw(train_N, test_N, repeat) for repeat in range(probing.repeats)]

    @property
    def first(self) -> tuple[Tasks, Tasks]:
        """Training and test tasks of the result; rows are numbers of texts."""
        return self.draws[0]

    def _draw(self, train_N: list[Tensor], test_N: list[Tensor], repeat: int) -> tuple[Tasks, Tasks]:
        purpose = (self.data.name,) if repeat == 0 else (self.data.name, "repeat", repeat)
        if repeat:
            generator = generator_for(self.seed, "split", *purpose)
            sizes = [len(class_N) for class_N in train_N]
            whole = [torch.cat(pair) for pair in zip(train_N, test_N, strict=True)]
            mixed = [class_N[torch.randperm(len(class_N), generator=generator)] for class_N in whole]
            train_N = [class_N[:size] for class_N, size in zip(mixed, sizes, strict=True)]
            test_N = [class_N[size:] for class_N, size in zip(mixed, sizes, strict=True)]
        return (
            make_tasks(train_N, self.seed, *purpose, "train"),
            make_tasks(test_N, self.seed, *purpose, "test"),
        )

    def score(self, who: str, features_NF: Tensor, *, full: bool) -> Scores:
        """Scores of pooled features, [N, F] for all texts of the dataset."""
        ks = self.probing.ks
        probes = [sparse_probes(features_NF, features_NF, train, test, ks) for train, test in self.draws]
        full_T = None
        if full:
            train, test = self.first
            rows = self.train_texts
            generator = generator_for(self.seed, "full probe", self.data.name, who)
            test = Tasks(test.rows_TM - rows, test.labels_TM)
            full_T = full_accuracies(features_NF[:rows], features_NF[rows:], train, test, generator)
        repeated = {k: torch.stack([one.right[k].double().mean(1) for one in probes]) for k in ks}
        return Scores(full_T, probes[0], repeated)


def make_tasks(texts: list[Tensor], seed: int, *purpose: object) -> Tasks:
    """One task a class, over the numbers of each class's texts; the same for every k and every kind of features."""
    sizes, numbers_N = [len(class_N) for class_N in texts], torch.cat(texts)
    drawn = [
        one_vs_rest(sizes, positive, generator_for(seed, "probe", *purpose, positive)) for positive in range(len(sizes))
    ]
    return Tasks(numbers_N[torch.stack([rows for rows, _ in drawn])], torch.stack([labels for _, labels in drawn]))


def _numbers(data: LabelledText) -> tuple[list[Tensor], list[Tensor]]:
    """Numbers of each class's training and test texts in `data.texts`."""
    sizes = [len(texts) for split in (data.train, data.test) for texts in split.values()]
    parts = list(torch.arange(sum(sizes)).split(sizes))
    return parts[: len(data.train)], parts[len(data.train) :]


def _score_layer(pooled: dict[tuple[str, object], Tensor], tasks: Draws, layer: int) -> dict[str, Scores]:
    """The model's channels and their principal components: the same for every SAE of a layer."""
    llm_ND = pooled["llm", layer]
    mean_D, directions_DC = controls.principal_components(llm_ND[: tasks.train_texts])
    return {
        "llm": tasks.score("llm", llm_ND, full=True),
        "pca": tasks.score("pca", (llm_ND.float() - mean_D) @ directions_DC, full=False),
    }


def _score_control(pooled: dict[tuple[str, object], Tensor], tasks: Draws, control: Control) -> Scores:
    """A random SAE: the same for every SAE of its layer, size and L0."""
    return tasks.score("random", pooled["random", control], full=False)


def _pooled(
    data: LabelledText, store: ActivationStore | None, lm: LanguageModel, maps: Iterable[FeatureMap], probing: Probing
) -> list[Tensor]:
    def chunks() -> Iterable[Chunk]:
        return probe_chunks(data.texts, lm) if store is None else store.chunks(2048)

    key, texts = probe_key(data, lm), len(data.texts)
    return pool_or_read(key, chunks, texts, list(maps), lm.layers, device=lm.device, precision=probing.pooling)


def _feature_maps(
    lm: LanguageModel,
    data: list[LabelledText],
    stores: dict[str, ActivationStore],
    subjects: Mapping[str, Subject],
    probing: Probing,
    seed: int,
    keep: bool,
) -> tuple[dict[tuple[str, object], FeatureMap], dict[str, Control]]:
    """Channels of every layer asked for, latents of every SAE and random controls; and which control is whose."""
    dtype = getattr(torch, probing.pooling)
    sample = functools.cache(lambda: _sample(data, stores, lm))
    sampled = [probe_key(one, lm) for one in data] + [probing.cached]
    maps: dict[tuple[str, object], FeatureMap] = {}
    control_of: dict[str, Control] = {}
    for layer in sorted({subject.layer for subject in subjects.values()}):
        maps["llm", layer] = FeatureMap(layer, lm.width, lambda acts_BD: acts_BD, ("llm",), channels=True)
    for name, (layer, sae, key) in subjects.items():
        found = numbers_or_read(
            ["measures where active", layer, key, sampled],
            functools.partial(_measure, name, sae.to(lm.device), sample, layer),
        )
        _warn_of_scale(name, found["scale"])
        codes = screened(sae, found["l0"]) if dtype == torch.float32 else functools.partial(encode_in, sae, dtype=dtype)
        maps["sae", name] = FeatureMap(layer, sae.latents, codes, ("sae", key), keep=keep)
        control_of[name] = control = (layer, sae.latents, controls.nearby_l0(found["l0"]))
        maps.setdefault(("random", control), _control_map(control, sample, sampled, seed))
    return maps, control_of


def _measure(name: str, sae: SAE, sample: Callable[[], dict[int, Tensor]], layer: int) -> dict[str, float]:
    """L0 and scale of an SAE's codes on the sample."""
    sample_BD = sample()[layer]
    scale = controls.code_scale(sae, sample_BD)
    if not math.isfinite(scale):
        raise UserError(f"the codes of SAE {name} are not finite numbers: its weights are far too large")
    return {"l0": controls.code_l0(sae, sample_BD), "scale": scale}


def _control_map(
    control: Control, sample: Callable[[], dict[int, Tensor]], sampled: list[Any], seed: int
) -> FeatureMap:
    """Codes of a random SAE, which is made when it is needed first: that takes a few texts through the model."""
    layer, latents, l0 = control

    @functools.cache
    def codes() -> Callable[[Tensor], Tensor]:
        generator = generator_for(seed, "random control", layer)
        return controls.random_codes(controls.random_sae(latents, l0, sample()[layer], generator))

    key = ("random, bfloat16", latents, l0, seed, sampled)
    return FeatureMap(layer, latents, lambda acts_BD: codes()(acts_BD), key)


def _sample(data: list[LabelledText], stores: dict[str, ActivationStore], lm: LanguageModel) -> dict[int, Tensor]:
    """Activations [B, D] from a few places of all datasets, by layer; from the stores where there are any."""
    each = max(1, SAMPLE_TEXTS // len(data))
    if stores:
        places = [(store, at) for store in stores.values() for at in range(0, store.tokens, -(-store.tokens // each))]
        acts_BLD = torch.cat([store.read(at, min(32, store.tokens - at)) for store, at in places])
    else:
        texts = [text for one in data for text in one.texts[:: -(-len(one.texts) // each)]]
        chunks = [chunk.acts_NLD for chunk in probe_chunks(texts, lm)]
        if not chunks:
            raise UserError(f"none of {len(texts)} probing texts has a content token; remove those that have none")
        acts_BLD = torch.cat(chunks)
    return {layer: acts_BLD[:, place].float().to(lm.device) for place, layer in enumerate(lm.layers)}


def check_fits(name: str, subject: Subject, lm: LanguageModel, ks: Sequence[int]) -> None:
    """The SAE reads activations of this model's width and has at least as many latents as a probe may use."""
    if subject.sae.d_in != lm.width:
        raise UserError(
            f"SAE {name} takes activations of width {subject.sae.d_in}, and layer {subject.layer} of {lm.name} has "
            f"{lm.width}: it was trained on another model; name its model"
        )
    if max(ks) > subject.sae.latents:
        raise UserError(f"k = {max(ks)} is more than the {subject.sae.latents} latents of SAE {name}; lower --k")


def _warn_of_scale(name: str, scale: float) -> None:
    if scale == 0:
        say(f"warning: no latent of SAE {name} is active on a sample of the texts: is it of this model and layer?")
    elif scale < 0.03:
        say(
            f"warning: the codes of SAE {name} are {1 / scale:,.0f} times smaller than its input: probes with C = 1 "
            "and no scaler cannot use them, and SAEBench would give 0.5; fold input scale and decoder norms into the "
            "weights (W_enc and b_enc times the row norm of W_dec, W_dec rows to unit norm)"
        )
