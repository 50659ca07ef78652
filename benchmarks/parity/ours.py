"""What ours computes on the inputs of the parity checks: the public functions of `fipo`, called from one place."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fipo.config import Probing, RunConfig
from fipo.data.harvest import Chunk, harvest
from fipo.data.labelled import _read_split, load_labelled
from fipo.data.store import ActivationStore
from fipo.evaluate import make_tasks, pool
from fipo.export import load_sae
from fipo.files import read_json, sha256_json
from fipo.probing import full_accuracies, sparse_accuracies
from fipo.randomness import generator_for
from fipo.runs import resolve
from fipo.sae import SAE
from fipo.saebench import metric_name, sparse_probing_record

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def selected_texts(names: Iterable[str], train: int, test: int, seed: int) -> dict[str, dict[str, dict[str, str]]]:
    """dataset -> split -> class -> digest of its texts; the datasets lie under FIPO_DATA_ROOT."""
    probing = Probing(datasets=("none",), train_per_class=train, test_per_class=test)
    found = {name: load_labelled(name, probing, seed) for name in names}
    return {
        name: {
            split: {label: sha256_json(texts) for label, texts in getattr(data, split).items()}
            for split in ("train", "test")
        }
        for name, data in found.items()
    }


def content_tokens(ids_BL: Tensor, acts_BLD: Tensor, special: dict[str, int]) -> tuple[list[int], list[Chunk]]:
    """Content tokens a text, and the activations that `harvest` gives when the model answers with `acts_BLD`."""
    pad = special["pad_token_id"]
    rows = [[token for token in row if token != pad] for row in ids_BL.tolist()]
    known = {tuple(row): number for number, row in enumerate(rows)}

    def activations(ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        length_B = mask_BS.sum(1).tolist()
        numbers = [known[tuple(row[:length])] for row, length in zip(ids_BS.tolist(), length_B, strict=True)]
        return acts_BLD[numbers, : ids_BS.shape[1]][None]

    lm = SimpleNamespace(special_ids=sorted(special.values()), pad_id=pad, activations=activations, layers=(0,))
    chunks = list(harvest(lm, rows))  # type: ignore[arg-type]
    counts = torch.bincount(torch.cat([chunk.text_N for chunk in chunks]), minlength=len(rows))
    return counts.tolist(), chunks


def content_of_cache(classes: list[Tensor]) -> list[Chunk]:
    """The same of token activations [B, L, D] a class, in which every position that is not content is zero."""
    chunks, first = [], 0
    for acts_BLD in classes:
        for acts_PLD in acts_BLD.split(64):
            content_PL = (acts_PLD != 0).any(-1)
            text_PL = (first + torch.arange(len(acts_PLD)))[:, None].expand_as(content_PL)
            chunks.append(Chunk(acts_PLD[content_PL][:, None], text_PL[content_PL]))
            first += len(acts_PLD)
    return chunks


def pooled(chunks: list[Chunk], texts: int, sae: SAE) -> tuple[Tensor, Tensor]:
    """Means over the content tokens of every text, [N, D] of the activations and [N, F] of the codes, in float32."""

    def batches(_size: int) -> Iterator[Tensor]:
        return (chunk.acts_NLD for chunk in chunks)

    owners = torch.cat([chunk.text_N for chunk in chunks])
    return pool(SimpleNamespace(texts=lambda: owners, batches=batches), 0, sae, texts)  # type: ignore[arg-type]


def pooled_store(store: ActivationStore, texts: int, sae: SAE) -> tuple[Tensor, Tensor]:
    """The same of token activations on disk, read as they are needed."""
    return pool(store, 0, sae, texts)


def probe(
    llm_ND: Tensor, sae_NF: Tensor, train_sizes: list[int], test_sizes: list[int], ks: tuple[int, ...], seed: int
) -> tuple[dict[str, list[float]], float]:
    """Metric -> accuracy of every class, drawn our own way, and the seconds spent in the probes on everything."""
    train, test = (make_tasks(sizes, seed, split) for sizes, split in ((train_sizes, "train"), (test_sizes, "test")))
    found, seconds = {}, 0.0
    for who, features_NF in (("llm", llm_ND), ("sae", sae_NF)):
        parts = *features_NF.split([sum(train_sizes), sum(test_sizes)]), train, test
        start = time.monotonic()
        found[metric_name(who, None)] = full_accuracies(*parts, generator_for(seed, "full probe", who)).tolist()
        seconds += time.monotonic() - start
        sparse = sparse_accuracies(*parts, ks)
        found |= {metric_name(who, k): accuracy_T.tolist() for k, accuracy_T in sparse.items()}
    return found, seconds


def all_texts(folder: Path, label: str) -> list[str]:
    """Every distinct text of one class of a labelled folder."""
    texts = [text for split in ("train", "test") for text in _read_split(folder, split).get(label, [])]
    return list(dict.fromkeys(texts))


def record(folder: Path, accuracies: dict[str, dict[str, dict[str, float]]], ks: list[int]) -> dict[str, Any]:
    """The result file of these accuracies for the SAE saved in `folder`."""
    config: RunConfig = resolve(Path("run_0"), EXPERIMENTS)
    assert set(ks) <= set(config.workload.probing.ks)
    return sparse_probing_record(config, accuracies, read_json(folder / "cfg.json"), "Unknown")


def open_sae(folder: Path) -> SAE:
    """The SAE of the checks."""
    return load_sae(folder)
