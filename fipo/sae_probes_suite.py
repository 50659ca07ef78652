"""The suite of sae-probes: 113 binary datasets, k latents at the last token, L1 logistic regression.

The `normal` setting of sae-probes 0.4.2 (Kantamneni et al. 2025, arXiv 2502.16681), written anew. Of every text the
activation of its last content token is taken, and encoded. Up to 1,024 texts train and the rest test, half of either
class. Latents are divided by the mean of their nonzero codes and ranked by |mean of one class - mean of the other|; on
the k first, as they are, an L1 logistic regression is fitted, its strength C the one of ten with the best AUC on the
last 100 training texts. Scores are accuracy, AUC and F1 (weighted by class) on the test texts. Draws are numpy's and
the solver scikit-learn's, seeded as there, so that numbers are equal. Shapes: N texts, L layers, D width, F latents.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from numpy.random import RandomState
from torch import Tensor

from fipo.data import sae_probes
from fipo.data.harvest import harvest
from fipo.data.lm import LanguageModel
from fipo.errors import UserError

KS = (1, 2, 5)
"""SAEBench's choice; sae-probes' own is 1, 2, 4, ..., 512."""
SEED = 42
LONGEST, MOST_TRAIN, LEAST_TEST, MOST_VALIDATION = 1024, 1024, 100, 100
STRENGTHS = tuple(10 ** (5 - 10 * step / 9) for step in range(10))
"""C of scikit-learn, from weak to strong."""


class SuiteDataset(NamedTuple):
    """One of the 113."""

    name: str
    texts: list[str]
    labels: list[int]
    """0 or 1."""


class ProbeScore(NamedTuple):
    """What a probe on k latents scores on the test texts."""

    accuracy: float
    auc: float
    f1: float
    validation_auc: float
    latents: list[int]
    """The latents it sees, best first."""


def suite_datasets(names: Sequence[str] = ()) -> Iterator[SuiteDataset]:
    """The datasets of these names, or all, one after another in the package's order."""
    known = sae_probes.binary_files()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"sae-probes has no binary dataset {unknown[0]}; its names are like {', '.join(list(known)[:3])}"
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"the dataset {twice[0]} is given twice; give it once")
    for name in names or known:
        yield SuiteDataset(name, *sae_probes.binary_texts(name))


@torch.inference_mode()
def last_token_activations(texts: Sequence[str], lm: LanguageModel) -> Tensor:
    """Activations [N, L, D] in float32 of every text's last content token. Of a text longer than 1,024 tokens, or than
    the model takes, the end is read."""
    last_NLD = torch.full((len(texts), len(lm.layers), lm.width), torch.nan)
    for acts_BLD, text_B, _ in harvest(lm, _rows_from_the_end(texts, lm)):
        owners, counts = text_B.unique_consecutive(return_counts=True)
        last_NLD[owners] = acts_BLD[counts.cumsum(0) - 1].float().cpu()
    empty = last_NLD[:, 0, 0].isnan().nonzero()
    if len(empty):
        raise UserError(f"text {int(empty[0])} of the dataset has no content token; remove it")
    return last_NLD


def longest_row(lm: LanguageModel) -> int:
    """Tokens of a text that are read at most, special ones included."""
    return min(LONGEST, lm.positions or LONGEST)


def split(labels: Sequence[int], seed: int = SEED) -> tuple[Tensor, Tensor]:
    """Numbers of the training and of the test texts, either mixed and half of each class."""
    train = min(len(labels) - LEAST_TEST, MOST_TRAIN)
    test, classes = len(labels) - train - 1, torch.tensor(labels)
    random = RandomState(seed)
    left = [(classes == label).nonzero()[:, 0].numpy() for label in (1, 0)]
    parts = []
    for size in (train, test):
        wanted = (-(-size // 2), size // 2)
        if train < 128 or any(len(pool) < count for pool, count in zip(left, wanted, strict=True)):
            raise UserError(
                f"a dataset of {len(labels)} texts, {sum(labels)} of them positive, is too small or too uneven: "
                f"{train} training and {test} test texts, half of either class, are needed, and 128 to train"
            )
        drawn = [random.choice(pool, size=count, replace=False) for pool, count in zip(left, wanted, strict=True)]
        left = [sorted(set(pool.tolist()) - set(taken.tolist())) for pool, taken in zip(left, drawn, strict=True)]
        left = [torch.tensor(pool, dtype=torch.int64).numpy() for pool in left]
        parts.append(drawn)
    return tuple(  # type: ignore[return-value]
        torch.from_numpy(random.permutation([*drawn[0].tolist(), *drawn[1].tolist()])) for drawn in parts
    )


def ranked_latents(codes_NF: Tensor, labels_N: Tensor) -> Tensor:
    """Latents [F], those first whose codes differ most between the classes in units of their mean nonzero code."""
    mean_F = codes_NF.abs().sum(0) / ((codes_NF != 0).sum(0) + 1e-6)
    scaled_NF = codes_NF / (mean_F + 1e-6)
    difference_F = scaled_NF[labels_N == 1].mean(0) - scaled_NF[labels_N == 0].mean(0)
    return difference_F.abs().argsort(descending=True)


def probe_scores(
    codes_NF: Tensor, labels: Sequence[int], ks: Sequence[int] = KS, seed: int = SEED
) -> dict[int, ProbeScore]:
    """Scores of one dataset for every k. `codes_NF`: codes of the last tokens in the order of the texts."""
    train_N, test_N = split(labels, seed)
    y_N = torch.tensor(labels)
    order_F = ranked_latents(codes_NF[train_N], y_N[train_N])
    scores = {}
    for k in ks:
        parts = codes_NF[train_N][:, order_F[:k]], y_N[train_N], codes_NF[test_N][:, order_F[:k]], y_N[test_N]
        scores[k] = _probe(*(part.numpy() for part in parts), order_F[:k].tolist(), seed)
    return scores


def _probe(x: Any, y: Any, x_test: Any, y_test: Any, latents: list[int], seed: int) -> ProbeScore:
    """Choose C, fit on all training texts in a new order, score. The arrays are numpy's."""
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    kept = len(y) - min(len(y) // 5, MOST_VALIDATION)

    def validation_auc(strength: float) -> float:
        if len(set(y[:kept].tolist())) < 2:
            return 0.5
        fitted = _fit(x[:kept], y[:kept], strength, seed)
        return roc_auc_score(y[kept:], fitted.predict_proba(x[kept:])[:, 1])

    aucs = [validation_auc(strength) for strength in STRENGTHS]
    best = max(range(len(aucs)), key=lambda place: aucs[place])
    mixed = RandomState(seed).permutation(len(y))
    fitted = _fit(x[mixed], y[mixed], STRENGTHS[best], seed)
    answers = fitted.predict(x_test)
    return ProbeScore(
        accuracy=float(accuracy_score(y_test, answers)),
        auc=float(roc_auc_score(y_test, fitted.predict_proba(x_test)[:, 1])),
        f1=float(f1_score(y_test, answers, average="weighted")),
        validation_auc=float(aucs[best]),
        latents=latents,
    )


def _fit(x: Any, y: Any, strength: float, seed: int) -> Any:
    """L1 logistic regression by SAGA; where its 1,000 rounds do not suffice, what it has by then."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return _regression()(C=strength, solver="saga", random_state=seed, max_iter=1000).fit(x, y)


@functools.cache
def _regression() -> Any:
    """scikit-learn's class with an L1 penalty, which version 1.8 has renamed."""
    import sklearn
    from sklearn.linear_model import LogisticRegression

    renamed = tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8)
    return functools.partial(LogisticRegression, **({"l1_ratio": 1.0} if renamed else {"penalty": "l1"}))


def _rows_from_the_end(texts: Iterable[str], lm: LanguageModel) -> Iterator[list[int]]:
    """One row of token ids a text, special tokens included; a long text loses its beginning."""
    longest = longest_row(lm)
    held = list(texts)
    for start in range(0, len(held), 256):
        with _cut_on_the_left(lm.tokenizer):
            encoded = lm.tokenizer(held[start : start + 256], truncation=True, max_length=longest)["input_ids"]
        for ids in encoded:
            if lm.begin_id is not None and ids[:1] != [lm.begin_id]:
                ids = [lm.begin_id, *ids[max(0, len(ids) + 1 - longest) :]]
            yield ids


@contextlib.contextmanager
def _cut_on_the_left(tokenizer: Any) -> Iterator[None]:
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "left"
    try:
        yield
    finally:
        tokenizer.truncation_side = side
