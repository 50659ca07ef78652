"""Sparse probing of saved SAEs: texts once through the language model, all layers and all SAEs at once.

Token activations come from the activation store, codes are averaged over a text's content tokens as they are made.
Shapes: N texts or tokens, L layers, D model width, F latents.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fipo.config import RunConfig
from fipo.data.labelled import LabelledText
from fipo.data.lm import LanguageModel
from fipo.data.prepare import probe_activations
from fipo.data.store import ActivationStore
from fipo.errors import UserError
from fipo.export import load_sae
from fipo.probing import Tasks, full_accuracies, one_vs_rest, sparse_accuracies
from fipo.progress import progress
from fipo.randomness import generator_for
from fipo.sae import SAE
from fipo.saebench import metric_name

Accuracies = dict[str, dict[str, dict[str, float]]]
"""dataset -> metric -> class -> accuracy"""


def probe(
    config: RunConfig,
    lm: LanguageModel,
    data: list[LabelledText],
    folders: dict[int, Path],
    end_phase: Callable[[str], None],
) -> dict[int, Accuracies]:
    """Accuracies of the SAE saved in each layer's folder, beside the model's own channels.

    `end_phase` is called when the time spent so far belongs to a phase: `harvest` or `probing`.
    """
    saes = {layer: load_sae(folder) for layer, folder in folders.items()}
    stores = []
    with progress("probe text", sum(len(one.texts) for one in data), "texts") as advance:
        for one in data:
            stores.append(probe_activations(one, lm))
            advance(len(one.texts), one.name)
    end_phase("harvest")
    results: dict[int, Accuracies] = {layer: {} for layer in saes}
    with progress("probing", len(data) * len(saes), "datasets") as advance:
        for one, store in zip(data, stores, strict=True):
            for layer, sae in saes.items():
                results[layer][one.name] = _probe_one(config, one, store, lm.layers.index(layer), sae)
                advance(1, one.name)
    return results


def _probe_one(
    config: RunConfig, data: LabelledText, store: ActivationStore, index: int, sae: SAE
) -> dict[str, dict[str, float]]:
    """All metrics of one dataset and one SAE: metric -> class -> accuracy."""
    llm_ND, sae_NF = pool(store, index, sae, len(data.texts))
    labels, rows = list(data.train), sum(map(len, data.train.values()))
    tasks = {
        split: make_tasks([len(texts) for texts in classes.values()], config.seed, data.name, split)
        for split, classes in (("train", data.train), ("test", data.test))
    }
    metrics = {}
    for who, features in (("sae", sae_NF), ("llm", llm_ND)):
        train_NF, test_NF = features[:rows], features[rows:]
        generator = generator_for(config.seed, "full probe", data.name, who)
        metrics[metric_name(who, None)] = full_accuracies(train_NF, test_NF, tasks["train"], tasks["test"], generator)
    for who, features in (("llm", llm_ND), ("sae", sae_NF)):
        sparse = sparse_accuracies(
            features[:rows], features[rows:], tasks["train"], tasks["test"], config.workload.probing.ks
        )
        metrics |= {metric_name(who, k): accuracy_T for k, accuracy_T in sparse.items()}
    return {name: dict(zip(labels, value_T.tolist(), strict=True)) for name, value_T in metrics.items()}


def make_tasks(class_sizes: list[int], seed: int, *purpose: object) -> Tasks:
    """One task a class; the same negatives for every k and for latents and channels alike."""
    drawn = [
        one_vs_rest(class_sizes, positive, generator_for(seed, "probe", *purpose, positive))
        for positive in range(len(class_sizes))
    ]
    return Tasks(torch.stack([rows for rows, _ in drawn]), torch.stack([labels for _, labels in drawn]))


@torch.no_grad()
def pool(store: ActivationStore, index: int, sae: SAE, texts: int) -> tuple[Tensor, Tensor]:
    """Means over each text's content tokens of the layer's activations [N, D] and of the SAE's codes [N, F]."""
    text_N = store.texts()
    llm_ND = torch.zeros(texts, sae.d_in)
    sae_NF = torch.zeros(texts, sae.latents)
    start = 0
    for acts_NLD in store.batches(2048):
        acts_ND = acts_NLD[:, index].float()
        owner_N = text_N[start : start + acts_ND.shape[0]]
        llm_ND.index_add_(0, owner_N, acts_ND)
        sae_NF.index_add_(0, owner_N, sae.encode(acts_ND))
        start += acts_ND.shape[0]
    tokens_N = torch.bincount(text_N, minlength=texts)
    if not tokens_N.all():
        raise UserError(f"probing text {int((tokens_N == 0).nonzero()[0])} has no content token; remove it")
    return llm_ND / tokens_N[:, None], sae_NF / tokens_N[:, None]
