"""Labelled text for probing: for each class of a dataset its training and test texts.

A name is one of SAEBench's eight (fipo.data.saebench_text; NAME@REVISION pins it), one of their counterparts
(fipo.data.sae_probes), or a local folder with `train.parquet` and `test.parquet` (columns `text`, `label`; optional
`dataset.json` with `label_names`).
"""

import functools
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fipo.config import Probing
from fipo.data import sae_probes, saebench_text
from fipo.errors import UserError
from fipo.files import read_json, sha256_json
from fipo.randomness import generator_for


@dataclass(frozen=True)
class LabelledText:
    """One dataset, cut to size."""

    name: str
    train: dict[str, list[str]]
    """Class -> training texts, as many in each."""
    test: dict[str, list[str]]
    """Class -> test texts, as many in each; of a hub dataset some may be training texts too, as in SAEBench."""
    revision: str | None = None
    """Revision of a hub dataset; the texts of a local one are named by `fingerprint` alone."""

    @property
    def texts(self) -> list[str]:
        """All texts: training classes in order, then test classes in order."""
        return [text for split in (self.train, self.test) for texts in split.values() for text in texts]

    @property
    def fingerprint(self) -> str:
        """Names the selected texts and their labels."""
        return sha256_json([self.name, self.train, self.test])

    @functools.cached_property
    def identities_N(self) -> Tensor:
        """By what each of `texts` is known again in another selection: 60 bits of its SHA-256."""
        return torch.tensor([int(sha256_json(text)[:15], 16) for text in self.texts])


def load_all(probing: Probing, seed: int) -> list[LabelledText]:
    """All datasets of `probing`, whose names must differ: scores are told apart by them."""
    data = [load_labelled(name, probing, seed) for name in probing.datasets]
    names = [one.name for one in data]
    for given, name in zip(probing.datasets, names, strict=True):
        if names.count(name) > 1:
            raise UserError(
                f"two of the probing datasets, {given} one of them, are named {name}; give each once, and folders "
                "different names"
            )
    return data


def load_labelled(name: str, probing: Probing, seed: int) -> LabelledText:
    """The dataset `name` with `train_per_class` and `test_per_class` texts a class, drawn by the seed."""
    if name in sae_probes.DATASETS:
        classes = sae_probes.labelled_texts(name)
        pools = {label: _shuffled(texts, seed, name, label) for label, texts in classes.items()}
        needed = probing.train_per_class + probing.test_per_class
        train = {label: texts[: probing.train_per_class] for label, texts in pools.items()}
        test = {label: texts[probing.train_per_class : needed] for label, texts in pools.items()}
        return _checked(LabelledText(name, train, test), probing, {label: len(texts) for label, texts in pools.items()})
    hub_name, _, revision = name.partition("@")
    if hub_name in saebench_text.NAMES:
        sizes = (probing.train_per_class, probing.test_per_class)
        if hub_name in saebench_text.HALVED and any(size % 2 for size in sizes):
            raise UserError(
                f"dataset {hub_name}: half of a class's texts are of either group; give even numbers of training and "
                f"test texts, not {sizes[0]} and {sizes[1]}"
            )
        train, test, found = saebench_text.select(hub_name, *sizes, seed, revision or None)
        counts = {label: len(train[label]) + len(test[label]) for label in train}
        return _checked(LabelledText(hub_name, train, test, found), probing, counts)
    if os.path.isdir(name):
        return _from_folder(Path(name), probing, seed)
    known = [*sae_probes.DATASETS, *saebench_text.NAMES]
    raise UserError(f"probing dataset {name} is neither a folder nor known; known are {', '.join(known)}")


def _from_folder(folder: Path, probing: Probing, seed: int) -> LabelledText:
    given = {split: _read_split(folder, split) for split in ("train", "test")}
    trained = {text for texts in given["train"].values() for text in texts}
    splits = {"train": _distinct(given["train"], set()), "test": _distinct(given["test"], trained)}
    for split, other in (("train", "test"), ("test", "train")):
        alone = sorted(set(splits[split]) - set(splits[other]))
        if alone:
            raise UserError(f"dataset {folder}: label {alone[0]} occurs in {split} and not in {other}")
    sizes = {"train": probing.train_per_class, "test": probing.test_per_class}
    chosen = {
        split: {
            label: _shuffled(texts, seed, folder.name, split, label)[: sizes[split]]
            for label, texts in sorted(splits[split].items())
        }
        for split in splits
    }
    counts = {label: len(splits["train"][label]) + len(splits["test"][label]) for label in splits["train"]}
    return _checked(LabelledText(folder.name, chosen["train"], chosen["test"]), probing, counts)


def _distinct(classes: dict[str, list[str]], without: set[str]) -> dict[str, list[str]]:
    """Every class's texts once each, in their order; but for those of two classes, or of `without`."""
    owners = Counter(text for texts in classes.values() for text in set(texts))
    return {
        label: [text for text in dict.fromkeys(texts) if owners[text] == 1 and text not in without]
        for label, texts in classes.items()
    }


def _read_split(folder: Path, split: str) -> dict[str, list[str]]:
    import pyarrow.parquet

    file = folder / f"{split}.parquet"
    if not file.is_file():
        raise UserError(f"dataset {folder} has no {file.name}; expected train.parquet and test.parquet")
    try:
        table = pyarrow.parquet.read_table(file)
        columns = [table[name].to_pylist() for name in ("text", "label") if name in table.column_names]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"dataset file {file} is not readable parquet: {error}") from error
    if not {"text", "label"} <= set(table.column_names):
        raise UserError(f"dataset file {file} has the columns {', '.join(table.column_names)}; expected text, label")
    description = folder / "dataset.json"
    names = _label_names(description) if description.is_file() else None
    classes: dict[str, list[str]] = {}
    for text, label in zip(*columns, strict=True):
        if not isinstance(text, str | None) or not isinstance(label, str | int):
            raise UserError(
                f"dataset file {file}: text is {type(text).__name__}, label {type(label).__name__}; expected "
                "text, and text or whole numbers"
            )
        if names is not None and not (type(label) is int and 0 <= label < len(names)):
            raise UserError(
                f"dataset file {file}: label {label!r} is no number below {len(names)}, as {description} says"
            )
        if text:
            classes.setdefault(names[label] if names is not None else str(label), []).append(text)
    return classes


def _label_names(description: Path) -> list[str]:
    value = read_json(description)
    names = value.get("label_names") if isinstance(value, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{description} holds no list of texts under label_names")
    return names


def _checked(data: LabelledText, probing: Probing, counts: dict[str, int]) -> LabelledText:
    if len(data.train) < 2:
        raise UserError(f"dataset {data.name} has the classes {list(data.train)}; probing needs at least two")
    for label in data.train:
        for split, wanted in (("train", probing.train_per_class), ("test", probing.test_per_class)):
            given = len(getattr(data, split)[label])
            if given < wanted:
                raise UserError(
                    f"dataset {data.name}: class {label} has {counts[label]} texts, {given} left for {split}; {wanted} "
                    "are needed: lower probing.train_per_class or probing.test_per_class"
                )
    return data


def _shuffled(texts: list[str], *purpose: object) -> list[str]:
    order = torch.randperm(len(texts), generator=generator_for(0, *purpose))
    return [texts[index] for index in order.tolist()]
