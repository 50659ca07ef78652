"""Inputs on which ours and SAEBench are compared: eight datasets in the hub's layout, and token activations.

Built of real text where a folder of parquet files with a `text` column is given, else of words drawn by a seeded
generator. Everything is small: a class has 40 training and 20 test texts. Shapes: B texts, L positions, D channels.
"""

import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from benchmarks.ground_truth import METHODS, config_of
from fipo.activations import ReLU
from fipo.data.prepare import statistics
from fipo.sae import SAE
from fipo.state import build_state
from fipo.train import train_step

TRAIN, TEST, SEED = 40, 20, 42
"""Texts a class and seed of the eight datasets."""
PAIRS = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
LANGUAGES = ("C", "Python", "HTML", "Java", "PHP", "Rust", "Go")
WORDS = "river stone market engine violin harbour protein ledger comet orchard senate glacier tariff melody quarry"


def read_texts(folder: Path | None, count: int = 6000) -> list[str]:
    """Distinct texts of the folder's parquet files, or words drawn at random, in an order of their own."""
    if folder is None:
        drawn = random.Random(0)
        return [" ".join(drawn.choices(WORDS.split(), k=5 + number % 30)) + f" {number}" for number in range(count)]
    files = sorted(folder.rglob("*.parquet"))
    texts = {text for file in files for text in pyarrow.parquet.read_table(file, columns=["text"])["text"].to_pylist()}
    ordered = sorted(text for text in texts if text)
    random.Random(0).shuffle(ordered)
    return ordered[:count]


def write_datasets(root: Path, texts: list[str]) -> None:
    """The eight datasets of SAEBench in the hub's layout: classes of uneven size, too small, or of one group only."""
    supply = _Supply(texts)
    for split, least in (("train", TRAIN // 2), ("test", TEST // 2)):
        bios = [
            {"hard_text": supply.next(), "profession": profession, "gender": gender}
            for profession in range(28)
            for gender in ((0, 1) if profession != 3 else (0,))
            for _ in range(least + (7 * profession + 3 * gender) % 11 if profession != 4 else least - 1)
        ]
        _write(root / "LabHC/bias_in_bios", split, _mixed(bios))
        reviews = [
            {"text": supply.next(), "category": category, "rating": rating}
            for category in range(7)
            for rating in (1.0, 5.0)
            for _ in range(least + (5 * category + int(rating)) % 7)
        ]
        _write(root / "canrager/amazon_reviews_mcauley_1and5", split, _mixed(reviews))
        news = [{"text": supply.next(), "label": label} for label in range(4) for _ in range(2 * least + 5 * label)]
        _write(root / "fancyzhx/ag_news", split, _mixed(news))
    code = [
        {"code": supply.long(300 + 97 * (number % 9)), "language": language}
        for number in range(3 * (TRAIN + TEST))
        for language in LANGUAGES[: 7 - number % 2]
    ]
    for part, rows in enumerate((code[: len(code) // 3], code[len(code) // 3 :])):
        _write(root / "codeparrot/github-code/data", f"train-{part:05d}-of-00002", rows)
    for pair in PAIRS.values():
        lines = [
            {"translation": {language: supply.next() for language in pair.split("-")}} for _ in range(TRAIN + TEST + 9)
        ]
        _write(root / "Helsinki-NLP/europarl" / pair, "train", lines)
    configs = "".join(
        f"- config_name: {pair}\n  data_files:\n  - split: train\n    path: {pair}/*.parquet\n"
        for pair in PAIRS.values()
    )
    (root / "Helsinki-NLP/europarl/README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def planted_activations(texts: int, classes: int, width: int, positions: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] and activations [B, L, D] of texts of uneven length, class by class; class c raises channels c
    and c + 1. Integer draws only, so that every machine makes the same. Ids: 0 padding, 1 begin, 2 end."""
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(3, 30_000, (texts * classes, positions), generator=generator)
    length_B = torch.randint(3, positions, (texts * classes,), generator=generator)
    place_L = torch.arange(positions)
    ids_BL[:, 0] = 1
    ids_BL[place_L[None] >= length_B[:, None]] = 0
    ids_BL.scatter_(1, length_B[:, None], 2)
    acts_BLD = torch.randint(-512, 512, (texts * classes, positions, width), generator=generator) / 256
    raised_BL = torch.randint(0, 512, (texts * classes, positions), generator=generator) / 512
    for label in range(classes):
        rows = slice(label * texts, (label + 1) * texts)
        acts_BLD[rows, :, label : label + 2] += raised_BL[rows, :, None]
    acts_BLD[:, :, 0] += (
        1 / 1024
    )  # now no token's channels sum to exactly 0, by which SAEBench would take it for padding
    return ids_BL, acts_BLD


class _Supply:
    """Texts one after another, from the start again (numbered) when all are used."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.used = texts, 0

    def next(self) -> str:
        turn, place = divmod(self.used, len(self.texts))
        self.used += 1
        return self.texts[place] + (f" {turn}" if turn else "")

    def long(self, characters: int) -> str:
        text = self.next()
        while len(text) < characters:
            text += "\n" + self.next()
        return text[:characters]


def _mixed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return random.Random(len(rows)).sample(rows, len(rows))


def _write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")


def planted_codes(texts: int, latents: int, seed: int) -> tuple[Tensor, list[int]]:
    """Sparse codes [N, F] of texts and their labels, which a few latents tell in part; a latent in five is dead."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randperm(texts, generator=generator) % 2
    on_NF = torch.randint(0, 10, (texts, latents), generator=generator) < 3
    on_NF[:, :6] |= (labels_N == 1)[:, None] & (torch.randint(0, 3, (texts, 6), generator=generator) == 0)
    codes_NF = torch.randint(1, 4096, (texts, latents), generator=generator) / 1024 * on_NF
    codes_NF[:, 4::5] = 0
    return codes_NF, labels_N.tolist()


def planted_absorption(tokens: int, latents: int, width: int, seed: int) -> dict[str, Tensor]:
    """Activations of tokens that have a concept, codes, decoder rows, a probe and two main latents, of which one is
    active on a token in three and the other on one in five; several latents lean towards the probe."""
    generator = torch.Generator().manual_seed(seed)
    probe_D = torch.randint(-64, 65, (width,), generator=generator) / 64
    dec_FD = torch.randint(-64, 65, (latents, width), generator=generator) / 128
    lean_F = torch.randint(0, 5, (latents,), generator=generator) / 4 * (torch.arange(latents) % 4 == 0)
    dec_FD = torch.nn.functional.normalize(dec_FD + lean_F[:, None] * probe_D, dim=1)
    codes_NF = torch.randint(1, 65, (tokens, latents), generator=generator) / 32
    active_NF = torch.randint(0, 8, (tokens, latents), generator=generator) == 0
    main_M = torch.tensor([0, 4])
    dec_FD[main_M] = torch.nn.functional.normalize(dec_FD[main_M] + 2 * probe_D, dim=1)
    for main, out_of in zip(main_M.tolist(), (3, 5), strict=True):
        active_NF[:, main] = torch.randint(0, out_of, (tokens,), generator=generator) == 0
    codes_NF *= active_NF
    noise_ND = torch.randint(-64, 65, (tokens, width), generator=generator) / 256
    acts_ND = codes_NF @ dec_FD + noise_ND
    return {"acts_ND": acts_ND, "codes_NF": codes_NF, "dec_FD": dec_FD, "probe_D": probe_D, "main_M": main_M}


def planted_sae(width: int, latents: int, seed: int) -> SAE:
    """A ReLU SAE whose weights are drawn as integers; about a third of its latents are on at a token."""
    sae = SAE(width, latents, ReLU(), generator=torch.Generator())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.enc_FD.copy_(torch.randint(-64, 65, (width, latents), generator=generator).T / 128)
        sae.dec_FD.copy_(torch.randint(-64, 65, (latents, width), generator=generator) / 128)
        sae.enc_bias_F.copy_(torch.randint(-128, 1, (latents,), generator=generator) / 128)
        sae.mean_D.copy_(torch.randint(-64, 65, (width,), generator=generator) / 256)
    return sae.eval()


def trained_sae(acts_ND: Tensor, latents: int = 1024, k: int = 16, steps: int = 200) -> SAE:
    """A small SAE of ours, trained on these activations by all parts of the method; it has a threshold."""
    mean_LD, scale_L = statistics(acts_ND[:, None])
    config = config_of(METHODS["fipo"], latents, k, steps, 3e-3, SEED)
    state = build_state(config, 0, mean_LD[0], scale_L[0].item())
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        train_step(state, acts_ND[torch.randint(len(acts_ND), (config.workload.batch_tokens,), generator=generator)])
    return state.sae.eval()
