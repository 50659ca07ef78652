"""The labelled text inside the data package `sae-probes` (113 probing datasets, MIT), read as data.

Eight of its subjects stand in for the eight datasets of SAEBench's sparse_probing; the text of all other subjects is
training text, but for bare names and fragments. Nothing of a probing subject is trained on: its files, every file drawn
from the same corpus, and every text that begins like a probing text, up to case, spaces and punctuation, are left out.
The package's code is never imported.
"""

import functools
import io
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from fipo.data.lm import package_folder
from fipo.errors import UserError
from fipo.files import sha256_file, sha256_json
from fipo.randomness import generator_for

SOURCE = "sae-probes"

DATASETS: dict[str, dict[str, tuple[int, str]]] = {
    "sae-probes/occupation_set1": {"journalist": (59, "1"), "athlete": (60, "1"), "actor": (61, "1")},
    "sae-probes/occupation_set2": {"politician": (62, "1"), "singer": (63, "1"), "researcher": (64, "1")},
    "sae-probes/ticket_category": {
        name: (103, name) for name in ("HR Support", "Hardware", "Administrative rights", "Access", "Purchase")
    },
    "sae-probes/amazon_5star": {"not 5 stars": (157, "0"), "5 stars": (157, "1")},
    "sae-probes/movie_sentiment": {"negative": (113, "0"), "positive": (113, "1")},
    "sae-probes/code_language": {"C": (158, "1"), "Python": (159, "1"), "HTML": (160, "1")},
    "sae-probes/ag_news": {"World": (161, "1"), "Sports": (162, "1"), "Business": (163, "1")},
    "sae-probes/human_or_gpt3": {"human": (110, "0"), "gpt3": (110, "1")},
}
"""Counterpart datasets: class name -> (file number, target). In SAEBench's order: bias_in_bios sets 1 to 3, Amazon
categories, Amazon sentiment, GitHub code, AG News, and, for Europarl's languages, the nearest there is: whose text."""

RELATED_FILES = {
    *range(56, 65),  # Wikidata subjects: passages of the same corpus as the occupations
    *(97, 139, 140, 141),  # news classes: articles of AG's corpus
    92,  # SST-2: sentences of the movie reviews
    *(103, 151, 152, 153),  # tickets
    *(110, 113, 157, 158, 159, 160, 161, 162, 163),  # the probing files themselves
}


SHORTEST_TEXT = 40
"""Characters below which a training text is a bare name or a fragment ("Being Twenty") and left out."""
_NO_LETTERS = bytes(byte for byte in range(128) if not chr(byte).isalnum())


def labelled_texts(name: str) -> dict[str, list[str]]:
    """All distinct texts of every class of a counterpart dataset, in the order of the files; a text with two labels,
    or empty, is dropped."""
    classes: dict[str, list[str]] = {}
    for label, (number, target) in DATASETS[name].items():
        prompts, targets = _read(number)
        classes[label] = [text for text, given in zip(prompts, targets, strict=True) if given == target]
    owners: dict[str, set[str]] = {}
    for label, texts in classes.items():
        for text in texts:
            owners.setdefault(_normalised(text), set()).add(label)
    return {
        label: _distinct([text for text in texts if len(owners[_normalised(text)]) == 1])
        for label, texts in classes.items()
    }


def training_texts() -> Iterator[str]:
    """The text of all other subjects, each text once, in a fixed shuffled order."""
    texts = _training_texts()
    for index in torch.randperm(len(texts), generator=generator_for(0, SOURCE)).tolist():
        yield texts[index]


@functools.cache
def _training_texts() -> list[str]:
    probing = {_beginning(text) for number in RELATED_FILES for text in _read(number)[0]}
    others = sorted(set(_files()) - RELATED_FILES)
    texts = _distinct([text for number in others for text in _read(number)[0]])
    return [text for text in texts if len(text) >= SHORTEST_TEXT and _beginning(text) not in probing]


@functools.cache
def fingerprint() -> str:
    """Names the package's files and what is trained on."""
    hashes = [sha256_file(file) for _, file in sorted(_files().items())]
    return sha256_json([hashes, sorted(RELATED_FILES), SHORTEST_TEXT])


@functools.cache
def binary_files() -> dict[str, int]:
    """The package's 113 files of binary classification, in its order: name (`5_hist_fig_ismale`) -> file number."""
    master = package_folder("sae_probes") / "data" / "probing_datasets_MASTER.csv.zst"
    kinds, paths = _columns(master, "Data type", "Dataset save name")
    chosen = [path for kind, path in zip(kinds, paths, strict=True) if kind == "Binary Classification"]
    names = [path.rsplit("/", 1)[-1].split(".")[0] for path in chosen]
    return {name: int(name.split("_", 1)[0]) for name in names}


def binary_texts(name: str) -> tuple[list[str], list[int]]:
    """All texts of a binary file and their labels, 1 for the target that is last in alphabetical order."""
    prompts, targets = _read(binary_files()[name])
    classes = sorted(set(targets))
    if len(classes) != 2:
        raise UserError(f"dataset {name} of sae-probes has the targets {classes}; expected two")
    return prompts, [classes.index(target) for target in targets]


@functools.cache
def _files() -> dict[int, Path]:
    folder = package_folder("sae_probes") / "data" / "cleaned_data"
    files = {int(file.name.split("_", 1)[0]): file for file in folder.glob("*.csv.zst")}
    if not files:
        raise UserError(f"{folder} holds no datasets; install sae-probes again (`make setup`)")
    return files


def _read(number: int) -> tuple[list[str], list[str]]:
    """Prompts and targets of one file, as strings."""
    return _columns(_files()[number], "prompt", "target")


def _columns(file: Path, first: str, second: str) -> tuple[list[str], list[str]]:
    import pyarrow
    import pyarrow.csv

    with pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd") as stream:
        table = pyarrow.csv.read_csv(
            io.BytesIO(stream.read()),
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False
            ),  # left running, they abort a process that ends soon
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=[first, second],
                column_types={first: pyarrow.string(), second: pyarrow.string()},
                strings_can_be_null=False,
            ),
        )
    return table[first].to_pylist(), table[second].to_pylist()


def _normalised(text: str) -> str:
    """Letters and digits alone, in lower case. Most of what goes is plain ASCII, which bytes lose in one pass."""
    text = text.encode(errors="surrogatepass").translate(None, _NO_LETTERS).decode(errors="surrogatepass")
    return (text if text.isascii() else re.sub(r"[\W_]+", "", text)).lower()


def _beginning(text: str) -> str:
    """The first 200 letters and digits: enough to know a text by, at a fraction of the time for long ones."""
    return _normalised(text[:2000])[:200]


def _distinct(texts: list[str]) -> list[str]:
    return list({normal: text for text in reversed(texts) if (normal := _normalised(text))}.values())[::-1]
