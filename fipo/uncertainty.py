"""How sure is a mean accuracy? Errors that know that the tasks of a dataset share their texts.

The score of a dataset is the unweighted mean over its T tasks, that of a suite the mean over its datasets. A text
serves in several tasks (as a positive in one, as a negative in others), so it is the text, not the answer, that is
drawn: an error is computed from each text's whole contribution. Shapes: T tasks, M rows of a task, N texts, R
resamples.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Answers(NamedTuple):
    """A value for every row of every task of one dataset: right or wrong, or a difference of two such."""

    values_TM: Tensor
    rows_TM: Tensor
    """Number of the text behind each row; the same one in all that are `joined`."""
    weight: int = 1
    """How often it counts in a mean over several: as many trainings as are `joined` in it."""

    @property
    def mean(self) -> float:
        """The dataset's score."""
        return self.values_TM.double().mean(1).mean().item()


class Interval(NamedTuple):
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def spread(values: Sequence[float | None], form: str = "{:.3f}") -> str:
    """Mean ± standard deviation of several, as text; `-` where one is missing."""
    if not values or None in values:
        return "-"
    beside = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + beside


def task_errors(right_TM: Tensor) -> Tensor:
    """Binomial standard error of every task's accuracy, [T]."""
    mean_T = right_TM.double().mean(1)
    return (mean_T * (1 - mean_T) / right_TM.shape[1]).sqrt()


def dataset_error(answers: Answers) -> float:
    """Standard error of the mean over tasks, clustered by text: √Σ_n (Σ_t (v_tn - mean_t) / (M T))²."""
    values_TM = answers.values_TM.double()
    tasks, rows = values_TM.shape
    share_TM = (values_TM - values_TM.mean(1, keepdim=True)) / (rows * tasks)
    texts_N, text_M = answers.rows_TM.flatten().unique(return_inverse=True)
    by_text_N = torch.zeros(len(texts_N), dtype=torch.float64).index_add_(0, text_M, share_TM.flatten())
    return by_text_N.pow(2).sum().sqrt().item()


def suite_error(errors: Sequence[float]) -> float:
    """Standard error of the mean of independent datasets."""
    return math.sqrt(sum(error * error for error in errors)) / len(errors)


def bootstrap(
    datasets: Sequence[Answers], generator: torch.Generator, resamples: int = 2000
) -> tuple[list[Interval], Interval]:
    """Intervals of each dataset's mean and of the weighted mean over datasets, by drawing texts with replacement."""
    drawn_DR = torch.stack([_resampled(answers, generator, resamples) for answers in datasets])
    means = [answers.mean for answers in datasets]
    weight_D = torch.tensor([answers.weight for answers in datasets], dtype=torch.float64)
    share_D = weight_D / weight_D.sum()
    whole = _interval((share_D @ torch.tensor(means, dtype=torch.float64)).item(), share_D @ drawn_DR)
    return [_interval(mean, drawn_R) for mean, drawn_R in zip(means, drawn_DR, strict=True)], whole


def joined(answers: Sequence[Answers]) -> list[Answers]:
    """Those that share texts as one, of more tasks and as much more weight."""
    same: list[list[Answers]] = []
    for one in answers:
        sharing = [any(_share_texts(one, other) for other in of) for of in same]
        first = (*sharing, True).index(True)
        merged = [other for of, share in zip(same, sharing, strict=True) if share for other in of]
        same = [of for of, share in zip(same, sharing, strict=True) if not share]
        same.insert(first, [*merged, one])
    return [
        Answers(torch.cat([of.values_TM for of in group]), torch.cat([of.rows_TM for of in group]), len(group))
        for group in same
    ]


def _share_texts(one: Answers, other: Answers) -> bool:
    return one.rows_TM.shape[1] == other.rows_TM.shape[1] and bool(torch.isin(one.rows_TM, other.rows_TM).any())


def _resampled(answers: Answers, generator: torch.Generator, resamples: int) -> Tensor:
    """The dataset's mean under `resamples` draws of its texts, [R]."""
    texts_K, place_TM = answers.rows_TM.unique(return_inverse=True)
    tasks, count = place_TM.shape[0], len(texts_K)
    drawn_RK = torch.randint(count, (resamples, count), generator=generator)
    weight_RK = torch.zeros(resamples, count, dtype=torch.float64)
    weight_RK.scatter_add_(1, drawn_RK, torch.ones_like(weight_RK))
    value_KT = torch.zeros(count, tasks, dtype=torch.float64)
    present_KT = torch.zeros(count, tasks, dtype=torch.float64)
    for task in range(tasks):
        value_KT[:, task].index_add_(0, place_TM[task], answers.values_TM[task].double())
        present_KT[:, task].index_add_(0, place_TM[task], torch.ones(place_TM.shape[1], dtype=torch.float64))
    return ((weight_RK @ value_KT) / (weight_RK @ present_KT).clamp_min(1)).mean(1)


def _interval(mean: float, drawn_R: Tensor) -> Interval:
    low, high = drawn_R.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)
