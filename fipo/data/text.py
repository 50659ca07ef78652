"""Training text: a built-in source, a local folder or file, or a dataset of the hub, streamed.

A `TextSource` gives its texts in a fixed order, as often as asked, and a fingerprint that names exactly what they are;
the activations made from them are cached under it. A stream that breaks off is taken up again where it was. `datasets`
is imported here alone. No dataset script is ever run.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fipo.config import Text
from fipo.data import sae_probes
from fipo.errors import UserError
from fipo.files import sha256_file, sha256_json
from fipo.progress import say
from fipo.signals import stopping

PAUSES = (1, 2, 4, 8, 15)
"""Seconds before each new attempt to go on with a stream of the hub that broke off."""


@dataclass(frozen=True)
class TextSource:
    """Texts in a fixed order."""

    fingerprint: str
    """Names the texts and their order."""
    texts: Callable[[], Iterator[str]]
    """A fresh pass over the texts."""


def pinned(text: Text) -> Text:
    """The text with the revision that it is read at: the newest one of a hub dataset of which none is named."""
    if text.source == sae_probes.SOURCE or os.path.exists(text.source):
        return text
    if text.source.startswith((".", "/", "~")):
        raise UserError(f"text source {text.source} does not exist; expected a folder or file of parquet, jsonl or txt")
    return text if text.revision else replace(text, revision=newest_revision(text.source))


def open_text(text: Text) -> TextSource:
    """The text that a workload names."""
    if text.config is not None and (text.source == sae_probes.SOURCE or os.path.isfile(text.source)):
        raise UserError(f"text.config is {text.config!r}, and {text.source} has no configurations; leave it out")
    if text.source == sae_probes.SOURCE:
        return TextSource(sae_probes.fingerprint(), sae_probes.training_texts)
    path = Path(text.source)
    if os.path.exists(path):
        fingerprint = sha256_json([_hash_path(path), text.config, text.split, text.field])
        return TextSource(fingerprint, lambda: _column(lambda: load_local(path, text.split, text.config), text, ()))
    text = pinned(text)
    return TextSource(
        f"{text.source}@{text.revision}/{text.config}/{text.split}/{text.field}",
        lambda: _column(lambda: load_hub(text.source, text.split, text.revision, text.config), text, PAUSES),
    )


def _library() -> Any:
    """`datasets`; what it would say of damage beside its exceptions, we say."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def load_local(path: Path, split: str, config: str | None = None) -> Any:
    """A local folder in the hub's layout, or one file, as a stream of records."""
    datasets = _library()
    builders = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv"}
    kind = Path(path.stem).suffix if path.suffix in (".zst", ".gz", ".xz", ".bz2") else path.suffix
    try:
        if path.is_dir():
            return datasets.load_dataset(str(path), config, split=split, streaming=True)
        if kind not in builders:
            raise UserError(f"text source {path} is no {', '.join(builders)} file, compressed or not")
        return datasets.load_dataset(builders[kind], data_files=str(path), split="train", streaming=True)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds for what is one thing to the user
        raise UserError(f"text source {path}, split {split}, does not load: {error}; repair or replace it") from error


def load_hub(
    name: str, split: str, revision: str | None, config: str | None = None, data_files: str | None = None
) -> Any:
    """A dataset of the hub, or `data_files` of it, as a stream of records."""
    try:
        return _library().load_dataset(
            name, config, split=split, revision=revision, data_files=data_files, streaming=True
        )
    except Exception as error:
        raise UserError(
            f"dataset {data_files or name}, split {split}, cannot be read ({type(error).__name__}: {error}); check the "
            "name, text.config where it has several, the network and HF_TOKEN if it is gated, or give a local folder"
        ) from error


def newest_revision(name: str) -> str:
    """The commit that a hub dataset is at now."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(name).sha or "main"
    except Exception as error:
        raise UserError(
            f"dataset {name} is no local path, and the hub cannot be asked for it ({type(error).__name__}); "
            "check the name, the network and HF_TOKEN if it is gated"
        ) from error


def _column(load: Callable[[], Any], text: Text, pauses: tuple[float, ...]) -> Iterator[str]:
    for record in _records(load, text, pauses):
        if text.field not in record:
            raise UserError(
                f"text source {text.source} has the columns {', '.join(record)}, not {text.field}; set text.field"
            )
        content = record[text.field]
        if content is not None and not isinstance(content, str):
            raise UserError(
                f"text source {text.source}: column {text.field} holds {type(content).__name__}; set text.field"
            )
        if content:
            yield content


def _records(load: Callable[[], Any], text: Text, pauses: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """All records in order. After a break the stream is opened anew at the last record that came, which must still be
    the same; `pauses` are the waits before each attempt, all of them available again once a record has come."""
    read, last, waits = 0, None, list(pauses)
    while True:
        try:
            stream = iter(load().skip(read - 1) if read else load())
            same = read == 0 or (next(stream, None) or {}).get(text.field) == last
            while same and (record := next(stream, None)) is not None:
                read, last, waits = read + 1, record.get(text.field), list(pauses)
                yield record
            break
        except Exception as error:  # datasets raises many kinds for a damaged file or a stream that breaks off
            if stopping():
                raise
            if read and waits:
                say(f"text source {text.source} broke off after record {read}; trying again in {waits[0]} s")
                time.sleep(waits.pop(0))
                continue
            if isinstance(error, UserError) and not read:
                raise
            raise UserError(
                f"text source {text.source} broke off after record {read} ({type(error).__name__}: {error}); repair or "
                "replace the file, or check the network"
            ) from error
    if not same:
        raise UserError(
            f"text source {text.source} came back with another record in place of record {read}; give text.revision, "
            "or a local copy"
        )


def _hash_path(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return sha256_json([[str(file.relative_to(path.parent)), sha256_file(file)] for file in files])
