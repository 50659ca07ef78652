"""What is said of probing scores: accuracies by class, controls with the margin over them, errors, and the answers.

Everything here goes under keys of its own; SAEBench's keys keep their meaning (fipo.saebench).
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fipo.config import Probing
from fipo.data.labelled import LabelledText
from fipo.evaluate import DatasetScores
from fipo.saebench import metric_name
from fipo.uncertainty import Answers, dataset_error, suite_error, task_errors

CONTROLS = ("pca", "random")

Accuracies = dict[str, dict[str, dict[str, float]]]
"""dataset -> metric -> class -> accuracy"""


def accuracies(results: Sequence[DatasetScores]) -> Accuracies:
    """SAEBench's unstructured result: latents and channels, all features and k of them."""
    return {
        one.name: {
            name: dict(zip(one.classes, values, strict=True))
            for name, values in (one.replayed or _of_first_draw(one)).items()
        }
        for one in results
    }


def _of_first_draw(one: DatasetScores) -> dict[str, list[float]]:
    """Metric -> accuracy of every class, in SAEBench's order."""
    metrics = {}
    for who in ("sae", "llm"):
        full_T = one.scores[who].full_T
        if full_T is not None:
            metrics[metric_name(who, None)] = full_T.tolist()
    for who in ("llm", "sae"):
        for k, right_TM in one.scores[who].first.right.items():
            metrics[metric_name(who, k)] = right_TM.double().mean(1).tolist()
    return metrics


def extras(results: Sequence[DatasetScores], data: Sequence[LabelledText], probing: Probing) -> dict[str, Any]:
    """The keys of our own in a result: `eval_result_protocol`, `eval_result_datasets`, `eval_result_controls`,
    `eval_result_statistics`, `eval_result_chosen_latents`."""
    return {
        "eval_result_protocol": {"rng": probing.rng, "pooling": probing.pooling},
        "eval_result_datasets": [
            {
                "dataset_name": one.name,
                "revision": one.revision,
                "selected_texts_sha256": one.fingerprint,
                "classes": list(one.train),
                "train_texts": sum(map(len, one.train.values())),
                "test_texts": sum(map(len, one.test.values())),
            }
            for one in data
        ],
        "eval_result_controls": _controls(results),
        "eval_result_statistics": _statistics(results),
        "eval_result_chosen_latents": {one.name: _chosen(one) for one in results},
    }


def outcomes(results: Sequence[DatasetScores], data: Sequence[LabelledText]) -> dict[str, Tensor]:
    """Every single answer, for paired comparisons: `DATASET/rows_TM`, `DATASET/who_top_k/right_TM`; and by what the
    texts of other seeds are known again, `DATASET/texts_N`."""
    tensors = {}
    for one, drawn in zip(results, data, strict=True):
        tensors[f"{one.name}/rows_TM"] = one.rows_TM.int()
        tensors[f"{one.name}/texts_N"] = drawn.identities_N
        for who, scores in one.scores.items():
            tensors |= {f"{one.name}/{who}_top_{k}/right_TM": right_TM for k, right_TM in scores.first.right.items()}
    return tensors


def _controls(results: Sequence[DatasetScores]) -> dict[str, Any]:
    """Accuracies of the controls and the margin over the random SAE. Its standard error is that of the texts, given
    this one random SAE: what another draw of it would change is not in it, and may be as much."""
    ks = list(results[0].scores["sae"].first.right)
    by_dataset = {
        one.name: {
            metric_name(who, k): one.scores[who].first.right[k].double().mean().item() for who in CONTROLS for k in ks
        }
        for one in results
    }
    margins = {}
    for k in ks:
        answers = [_difference(one, k) for one in results]
        margins[f"top_{k}"] = {
            "difference": statistics.fmean(one.mean for one in answers),
            "standard_error": suite_error([dataset_error(one) for one in answers]),
        }
    return {
        "mean": {name: _mean(by_dataset, name) for name in next(iter(by_dataset.values()))},
        "datasets": by_dataset,
        "margin_over_random": margins,
    }


def _difference(one: DatasetScores, k: int) -> Answers:
    """Latents against those of the random SAE, row by row."""
    sae_TM, random_TM = (one.scores[who].first.right[k].double() for who in ("sae", "random"))
    return Answers(sae_TM - random_TM, one.rows_TM)


def _chosen(one: DatasetScores) -> dict[str, dict[str, list[Any]]]:
    """Class -> the latents of its probe at the largest k, best first, and how much more active each is in the class."""
    probes = one.scores["sae"].first
    columns = zip(one.classes, probes.chosen_TK.tolist(), probes.difference_TK.tolist(), strict=True)
    return {label: {"latents": latents, "mean_differences": differences} for label, latents, differences in columns}


def _statistics(results: Sequence[DatasetScores]) -> dict[str, Any]:
    names = {metric_name(who, k): (who, k) for who in results[0].scores for k in results[0].scores[who].first.right}

    def of_each(value: Callable[[DatasetScores, str, int], Any]) -> dict[str, dict[str, Any]]:
        return {one.name: {name: value(one, who, k) for name, (who, k) in names.items()} for one in results}

    tasks = of_each(lambda one, who, k: _by_class(one, task_errors(one.scores[who].first.right[k])))
    datasets = of_each(lambda one, who, k: dataset_error(Answers(one.scores[who].first.right[k], one.rows_TM)))
    suite = {name: suite_error([errors[name] for errors in datasets.values()]) for name in names}
    draws = of_each(lambda one, who, k: one.scores[who].repeated[k].mean(1).tolist())
    whole = {
        name: [statistics.fmean(of_draw) for of_draw in zip(*(d[name] for d in draws.values()), strict=True)]
        for name in names
    }
    return {
        "standard_error": {"suite": suite, "datasets": datasets, "tasks": tasks},
        "repeats": {
            "suite": {name: _spread(values) for name, values in whole.items()},
            "datasets": {
                dataset: {name: _spread(values) for name, values in metrics.items()}
                for dataset, metrics in draws.items()
            },
        },
    }


def _spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over draws of splits and negatives; one draw has no spread."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"draws": len(values), "mean": statistics.fmean(values), "standard_deviation": spread}


def _by_class(one: DatasetScores, values_T: Tensor) -> dict[str, float]:
    return dict(zip(one.classes, values_T.tolist(), strict=True))


def _mean(by_dataset: dict[str, dict[str, float]], name: str) -> float:
    return statistics.fmean(metrics[name] for metrics in by_dataset.values())
