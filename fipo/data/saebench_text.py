"""The eight datasets of SAEBench's sparse_probing, by their names: same classes, filters, sampling and seeds.

| name | classes (in the order of the probes) | a class's texts |
|---|---|---|
| LabHC/bias_in_bios_class_set1, 2, 3 | professions | half of either gender |
| canrager/amazon_reviews_mcauley_1and5 | product categories | half with 1, half with 5 stars |
| canrager/amazon_reviews_mcauley_1and5_sentiment | 1.0 and 5.0 stars | drawn over all categories |
| codeparrot/github-code | languages | first of the stream, long ones, without the licence header |
| fancyzhx/ag_news | four topics | drawn at random |
| Helsinki-NLP/europarl | languages | first of the stream |

Read from `FIPO_DATA_ROOT`/NAME in the hub's layout (parquet or jsonl), or from the hub. Samples are drawn by pandas and
by Python's `random`, as SAEBench draws them, so the same seed gives the same texts of the same revision. No dataset
script is run: where the hub offers one (github-code), its parquet files are read instead.
"""

import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fipo.data.text import load_hub, load_local, newest_revision
from fipo.errors import UserError
from fipo.progress import say

Classes = dict[str, list[str]]
Splits = tuple[Classes, Classes]
Reader = Callable[[str, str, str | None], Iterator[dict[str, Any]]]
"""(dataset id, split, config) -> records"""

_BIOS = {
    "LabHC/bias_in_bios_class_set1": ("0", "1", "2", "6", "9"),
    "LabHC/bias_in_bios_class_set2": ("11", "13", "14", "18", "19"),
    "LabHC/bias_in_bios_class_set3": ("20", "21", "22", "25", "26"),
}
_GITHUB = "codeparrot/github-code"
_AMAZON = "canrager/amazon_reviews_mcauley_1and5"
_EUROPARL = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
_LANGUAGES = {
    "C": (".c", ".h"),
    "Python": (".py",),
    "HTML": (".html",),
    "Java": (".java",),
    "PHP": (".php", ".php3", ".php4", ".php5", ".phps", ".phpt"),
}
"""With the endings by which the hub's script for github-code tells a file's language."""
_SOURCES = {**dict.fromkeys(_BIOS, "LabHC/bias_in_bios"), f"{_AMAZON}_sentiment": _AMAZON}
_SHORTEST_CODE, _LICENCE_HEADER = 534, 150


def _bios(read: Reader, name: str, train: int, test: int, seed: int) -> Splits:
    columns = ("hard_text", "profession", "gender")
    return _each_split(read, _SOURCES[name], columns, _BIOS[name], train, test, seed)


def _amazon_categories(read: Reader, name: str, train: int, test: int, seed: int) -> Splits:
    return _each_split(read, name, ("text", "category", "rating"), ("1", "2", "3", "5", "6"), train, test, seed)


def _each_split(
    read: Reader, source: str, columns: tuple[str, str, str], classes: tuple[str, ...], train: int, test: int, seed: int
) -> Splits:
    splits = [
        _halves(_table(read, source, split, columns), columns, size // 2, seed)
        for split, size in (("train", train), ("test", test))
    ]
    return tuple(_chosen(source, split, classes) for split in splits)  # type: ignore[return-value]


def _halves(table: Any, columns: tuple[str, str, str], size: int, seed: int) -> Classes:
    """Of every class `size` texts of either group; classes with one group, or a group too small, are dropped."""
    text, label, group = columns
    classes: Classes = {}
    for value, members in table.groupby(label):
        groups = [rows for _, rows in members.groupby(group)]
        if len(groups) >= 2 and min(map(len, groups)) >= size:
            drawn = [rows.sample(n=size, random_state=seed)[text].tolist() for rows in groups]
            classes[str(value)] = [one for texts in drawn for one in texts]
    return classes


def _amazon_sentiment(read: Reader, _name: str, train: int, test: int, seed: int) -> Splits:
    return _drawn(read, _AMAZON, "rating", ("1.0", "5.0"), _rating, train, test, seed)


def _rating(value: Any) -> str:
    try:
        return str(float(value))
    except ValueError as error:
        raise UserError(f"dataset {_AMAZON}: rating is {str(value)[:80]!r}; expected a number") from error


def _ag_news(read: Reader, name: str, train: int, test: int, seed: int) -> Splits:
    return _drawn(read, name, "label", ("0", "1", "2", "3"), str, train, test, seed)


def _drawn(
    read: Reader,
    source: str,
    label: str,
    classes: tuple[str, ...],
    key: Callable[[Any], str],
    train: int,
    test: int,
    seed: int,
) -> Splits:
    splits = []
    for split, size in (("train", train), ("test", test)):
        table = _table(read, source, split, ("text", label))
        drawn = {
            key(value): members.sample(n=min(size, len(members)), random_state=seed)["text"].tolist()
            for value, members in table.groupby(label)
        }
        splits.append(_chosen(source, drawn, classes))
    return splits[0], splits[1]


def _github(read: Reader, name: str, train: int, test: int, seed: int) -> Splits:
    found: Classes = {language: [] for language in _LANGUAGES}
    for record in read(name, "train", None):
        language, code = _code(name, record)
        if language in found and len(code or "") > _SHORTEST_CODE:
            found[language].append(code[_LICENCE_HEADER:])
            if min(map(len, found.values())) > train + test:
                break
    return _shuffled_and_cut(found, train, test, seed)


def _code(name: str, record: dict[str, Any]) -> tuple[str | None, str | None]:
    """Language and code of a record: as the hub's script gives them, or of its files, which hold path and content."""
    if "language" in record:
        return _text(name, record, "language"), _text(name, record, "code")
    path = _text(name, record, "path") or ""
    language = next((one for one, endings in _LANGUAGES.items() if path.endswith(endings)), None)
    return language, _text(name, record, "content")


def _europarl(read: Reader, name: str, train: int, test: int, seed: int) -> Splits:
    found: Classes = {}
    for language, pair in _EUROPARL.items():
        found[language] = []
        for record in read(name, "train", pair):
            found[language].append(_value(name, record, "translation", language))
            if len(found[language]) > train + test:
                break
    return _shuffled_and_cut(found, train, test, seed)


def _shuffled_and_cut(classes: Classes, train: int, test: int, seed: int) -> Splits:
    """Python's own generator, seeded once, shuffles the classes in their order: SAEBench's way for streams."""
    generator = random.Random(seed)
    for texts in classes.values():
        generator.shuffle(texts)
    return (
        {label: texts[:train] for label, texts in classes.items()},
        {label: texts[train : train + test] for label, texts in classes.items()},
    )


def _chosen(source: str, classes: Classes, names: tuple[str, ...]) -> Classes:
    missing = [name for name in names if name not in classes]
    if missing:
        raise UserError(
            f"dataset {source}: class {missing[0]} is missing or has too few texts; lower probing.train_per_class or "
            f"probing.test_per_class (classes that suffice: {', '.join(classes) or 'none'})"
        )
    return {name: classes[name] for name in names}


def _table(read: Reader, source: str, split: str, columns: tuple[str, ...]) -> Any:
    """The wanted columns of a split as a data frame, in the order of the files."""
    import pandas

    rows = [tuple(_value(source, record, column) for column in columns) for record in read(source, split, None)]
    return pandas.DataFrame(rows, columns=list(columns))


def _value(source: str, record: dict[str, Any], *keys: str) -> Any:
    """What a record holds under these keys, one inside the other."""
    value: Any = record
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise UserError(
                f"dataset {source}: a record has the columns {', '.join(record)}, and no {'.'.join(keys)}; it is not "
                "what SAEBench reads"
            )
        value = value[key]
    if not isinstance(value, str | int | float | None):
        raise UserError(f"dataset {source}: {'.'.join(keys)} holds {type(value).__name__}; expected text or a number")
    return value


def _text(source: str, record: dict[str, Any], *keys: str) -> str | None:
    """The same where it must be text."""
    value = _value(source, record, *keys)
    if not isinstance(value, str | None):
        raise UserError(f"dataset {source}: {'.'.join(keys)} holds {type(value).__name__}; expected text")
    return value


def _records(revision: str | None, source: str, split: str, config: str | None) -> Iterator[dict[str, Any]]:
    """The records of a split; one line where they break off."""
    try:
        yield from _stream(revision, source, split, config)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds for a damaged file or a stream that breaks off
        raise UserError(f"dataset {source}, split {split}, broke off ({type(error).__name__}): {error}") from error


def _stream(revision: str | None, source: str, split: str, config: str | None) -> Iterator[dict[str, Any]]:
    """From a local folder in the hub's layout, or from the hub."""
    folder = _local(source)
    if folder is not None:
        inside = folder / config if config else folder
        files = sorted(
            file
            for file in inside.rglob("*")
            if file.suffix in (".parquet", ".jsonl") and (split in file.name or split in file.parent.name)
        )
        if not files:
            raise UserError(f"dataset {source}: {inside} holds no parquet or jsonl file of the split {split}")
        for file in files:
            yield from load_local(file, split)
    elif source == _GITHUB:  # offered by a script; its files are plain parquet
        files_of = f"hf://datasets/{_GITHUB}@{revision}/data/*.parquet"
        yield from load_hub("parquet", "train", None, data_files=files_of)
    else:
        yield from load_hub(source, split, revision, config)


def _local(source: str) -> Path | None:
    """The folder of a dataset under `FIPO_DATA_ROOT`, where there is one."""
    root = os.environ.get("FIPO_DATA_ROOT")
    folder = Path(root) / source if root else None
    return folder if folder is not None and folder.is_dir() else None


_BUILDERS: dict[str, Callable[[Reader, str, int, int, int], Splits]] = {
    **dict.fromkeys(_BIOS, _bios),
    _AMAZON: _amazon_categories,
    f"{_AMAZON}_sentiment": _amazon_sentiment,
    _GITHUB: _github,
    "fancyzhx/ag_news": _ag_news,
    "Helsinki-NLP/europarl": _europarl,
}
HALVED = (*_BIOS, _AMAZON)
"""Those of which half of a class's texts are of either group."""
NAMES = tuple(_BUILDERS)
"""In SAEBench's order."""


def select(
    name: str, train: int, test: int, seed: int, revision: str | None = None
) -> tuple[Classes, Classes, str | None]:
    """Training and test texts of every class of the dataset `name`, `train` and `test` a class, and the revision they
    are from (None for a local folder). Without a revision the hub's newest is taken, the same for all its files."""
    source = _SOURCES.get(name, name)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} is more than the generators of dataset {source} take; give one below 2^32")
    if (folder := _local(source)) is not None:
        if revision is not None:
            say(f"warning: dataset {source} is read from {folder}, whose revision is not known to be {revision}")
        revision = None
    elif revision is None:
        revision = newest_revision(source)
    chosen, tested = _BUILDERS[name](functools.partial(_records, revision), name, train, test, seed)
    for classes in (chosen, tested):
        for label, texts in classes.items():
            if not all(isinstance(text, str) for text in texts):
                raise UserError(f"dataset {source}: class {label} holds what is no text; repair the local files")
    return chosen, tested, revision
