"""What ours computes on the inputs of the parity checks: the public functions of `fipo`, called from one place."""

import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fipo.config import Probing
from fipo.data.harvest import Chunk, harvest
from fipo.data.labelled import _read_split, load_labelled
from fipo.data.store import ActivationStore
from fipo.evaluate import make_tasks
from fipo.export import load_sae
from fipo.files import read_json, sha256_json
from fipo.pooling import FeatureMap, Precision, encode_in, pool
from fipo.probing import full_accuracies, sparse_probes
from fipo.randomness import generator_for
from fipo.sae import SAE
from fipo.saebench import Setting, metric_name, sparse_probing_record
from fipo.screen import screened


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

    special_ids = sorted(special.values())
    lm = SimpleNamespace(special_ids=special_ids, pad_id=pad, activations=activations, layers=(0,), device="cpu")
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
            text_N = text_PL[content_PL]
            chunks.append(Chunk(acts_PLD[content_PL][:, None], text_N, torch.zeros_like(text_N)))
            first += len(acts_PLD)
    return chunks


def pooled(chunks: Iterable[Chunk], texts: int, sae: SAE, precision: Precision = "float32") -> tuple[Tensor, Tensor]:
    """Means over the content tokens of every text, [N, D] of the activations and [N, F] of the codes."""
    chunks = iter(chunks)
    first = next(chunks)
    l0 = (sae.encode(first.acts_NLD[:, 0].float()) > 0).sum().item() / len(first.text_N)
    encode = screened(sae, l0) if precision == "float32" else lambda acts_BD: encode_in(sae, acts_BD, torch.bfloat16)
    maps = [
        FeatureMap(0, sae.d_in, lambda acts_BD: acts_BD, ("llm",), channels=True),
        FeatureMap(0, sae.latents, encode, ("sae",)),
    ]
    llm_ND, sae_NF = pool(itertools.chain([first], chunks), texts, maps, (0,), precision=precision)
    return llm_ND, sae_NF


def pooled_store(store: ActivationStore, texts: int, sae: SAE) -> tuple[Tensor, Tensor]:
    """The same of token activations on disk, read as they are needed."""
    return pooled(store.chunks(2048), texts, sae)


def probe(
    llm_ND: Tensor, sae_NF: Tensor, train_sizes: list[int], test_sizes: list[int], ks: tuple[int, ...], seed: int
) -> tuple[dict[str, list[float]], float]:
    """Metric -> accuracy of every class, drawn our own way, and the seconds spent in the probes on everything."""
    train, test = (
        make_tasks(list(torch.arange(sum(sizes)).split(sizes)), seed, split)
        for sizes, split in ((train_sizes, "train"), (test_sizes, "test"))
    )
    found, seconds = {}, 0.0
    for who, features_NF in (("llm", llm_ND), ("sae", sae_NF)):
        parts = *features_NF.split([sum(train_sizes), sum(test_sizes)]), train, test
        start = time.monotonic()
        found[metric_name(who, None)] = full_accuracies(*parts, generator_for(seed, "full probe", who)).tolist()
        seconds += time.monotonic() - start
        right = sparse_probes(*parts, ks).right
        found |= {metric_name(who, k): right_TM.double().mean(1).tolist() for k, right_TM in right.items()}
    return found, seconds


def all_texts(folder: Path, label: str) -> list[str]:
    """Every distinct text of one class of a labelled folder."""
    texts = [text for split in ("train", "test") for text in _read_split(folder, split).get(label, [])]
    return list(dict.fromkeys(texts))


def record(folder: Path, accuracies: dict[str, dict[str, dict[str, float]]], ks: list[int]) -> dict[str, Any]:
    """The result file of these accuracies for the SAE saved in `folder`."""
    probing = Probing(datasets=tuple(accuracies), ks=tuple(ks))
    setting = Setting(probing, 42, "none", "float32", 128, "fipo_run_0_layer_0", None, "Unknown")
    return sparse_probing_record(setting, accuracies, read_json(folder / "cfg.json"))


def open_sae(folder: Path) -> SAE:
    """The SAE of the checks."""
    return load_sae(folder)
