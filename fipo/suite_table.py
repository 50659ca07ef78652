"""Results of the second suite side by side, as Markdown made from their result files alone.

Results of one name and layer are seeds of one another: the table gives mean ± standard deviation over them. Below it
each is set against the one given first, in a sweep at the same sparsity, dataset by dataset: a dataset's difference is
the mean over the seeds that both have, and the standard error is over the datasets, which says what other datasets
would change, not what other trainings would. Reads the folders that `fipo probe --suite sae-probes --out` writes.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fipo.errors import UserError
from fipo.names import CONTROLS, bases, one_of, renamed, seeds_told, sparsity_of, told_apart, with_sparsity
from fipo.results import SUITE_METRICS, SUITE_RESULT_SUFFIX, read_suite_result
from fipo.uncertainty import spread

MEASURED = ("model", "dtype", "random_seed")
"""What a score depends on beside the SAE and the datasets."""

Scores = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""dataset -> `sae`, `llm` or `random` -> k -> metric -> value"""


class Result(NamedTuple):
    """One SAE, as its result file tells."""

    run: str
    seed: int | None
    layer: int
    scores: Scores
    ks: list[int]
    origin: str
    measured: tuple[Any, ...]
    """Model, its format and the seed of the splits; None where an older file does not say."""
    setting: str
    """Of sparsity (fipo.names), as far as the file says."""
    config: dict[str, str]
    """The flat config of the run it is of, empty where the file holds none."""


def holds_suite(folder: Path) -> bool:
    """Does the folder hold results of this suite?"""
    return any(folder.glob(f"*{SUITE_RESULT_SUFFIX}"))


def suite_report(folders: Sequence[Path]) -> str:
    """The table of all results in `folders`, the differences of each from what it is set against, and where the numbers
    come from."""
    results = [_read(file) for folder in folders for file in sorted(folder.glob(f"*{SUITE_RESULT_SUFFIX}"))]
    results = renamed(results, told_apart([one.run for one in results], [one.config for one in results]))
    named = [one.run for one in results], [one.setting for one in results]
    results, against = renamed(results, with_sparsity(*named)), bases(*named)
    _refuse_what_differs(results)
    told = seeds_told((one.run, one.seed) for one in results)
    notes = f"Mean ± standard deviation over seeds ({told}); differences ± standard error over the datasets."
    origins = "\n".join(f"- {origin}" for origin in sorted({one.origin for one in results}))
    made = "Made by `fipo compare` from result files of:\n"
    return "\n".join([*_table(results), *_differences(results, against), f"{notes} {made}", origins]) + "\n"


def _read(file: Path) -> Result:
    record = read_suite_result(file)
    sae, origin = record["sae"], f"git {record['git_revision'][:12]}, {record['hardware']['cpu']}"
    ks = [int(k) for k in record["mean"]["sae"]]
    run, seed, config = sae.get("run") or sae["name"], sae.get("seed"), sae["config"]
    measured = tuple(record.get(key) for key in MEASURED)
    return Result(run, seed, sae["layer"], record["results"], ks, origin, measured, sparsity_of(config), config)


def _refuse_what_differs(results: Sequence[Result]) -> None:
    seen = set()
    for one in results:
        which = one_of(one.run, one.seed, one.layer)
        if which in seen:
            raise UserError(f"the result of {which} is given twice; leave one out")
        if (one.ks, one.scores.keys()) != (results[0].ks, results[0].scores.keys()):
            raise UserError(f"the result of {which} has other datasets or k than the first; compare them apart")
        for key, value, first in zip(MEASURED, one.measured, results[0].measured, strict=True):
            if value != first and None not in (value, first):
                raise UserError(f"the result of {which} is at {key} {value}, the first at {first}; compare them apart")
        seen.add(which)


def _table(results: Sequence[Result]) -> list[str]:
    rows = {(run, layer, "sae"): group for (run, layer), group in _grouped(results).items()}
    for who, title in ((who, CONTROLS[who]) for who in ("llm", "random")):
        for layer in sorted({one.layer for one in results}):
            rows[title, layer, who] = [one for one in results if one.layer == layer]
    lines = _head(f"{len(results[0].scores)} datasets", results)
    for (name, layer, who), group in rows.items():
        cells = (spread([mean_score(one.scores, who, *column) for one in group]) for column in _columns(results))
        lines.append(f"| {name} | {layer} | {' | '.join(cells)} |")
    return [*lines, ""]


def _differences(results: Sequence[Result], against: Mapping[str, str]) -> list[str]:
    lines = []
    for (run, layer), group in _grouped(results).items():
        base = against.get(run)
        first = {one.seed: one for one in results if (one.run, one.layer) == (base, layer)}
        pairs = [(one, first[one.seed]) for one in group if one.seed in first]
        if pairs:
            cells = (_difference(pairs, *column) for column in _columns(results))
            lines.append(f"| {run} - {base} | {layer} | {' | '.join(cells)} |")
    return [*_head("difference", results), *lines, ""] if lines else []


def _grouped(results: Sequence[Result]) -> dict[tuple[str, int], list[Result]]:
    groups: dict[tuple[str, int], list[Result]] = {}
    for one in results:
        groups.setdefault((one.run, one.layer), []).append(one)
    return groups


def _columns(results: Sequence[Result]) -> list[tuple[int, str]]:
    return [(k, metric) for metric in SUITE_METRICS for k in results[0].ks]


def _head(first: str, results: Sequence[Result]) -> list[str]:
    columns = _columns(results)
    heads = " | ".join(f"{SUITE_METRICS[metric]}, k {k}" for k, metric in columns)
    return [f"| {first} | layer | {heads} |", "|---" * (2 + len(columns)) + "|"]


def mean_score(scores: Scores, who: str, k: int, metric: str) -> float:
    """Over the datasets."""
    return statistics.fmean(of_dataset[who][str(k)][metric] for of_dataset in scores.values())


def mean_and_error(differences: Sequence[float]) -> tuple[float, float | None]:
    """Of a difference over the datasets, and its standard error from their spread; of one dataset there is none."""
    count = len(differences)
    return statistics.fmean(differences), statistics.stdev(differences) / count**0.5 if count > 1 else None


def _difference(pairs: Sequence[tuple[Result, Result]], k: int, metric: str) -> str:
    by_dataset = [
        statistics.fmean(
            a.scores[name]["sae"][str(k)][metric] - b.scores[name]["sae"][str(k)][metric] for a, b in pairs
        )
        for name in pairs[0][0].scores
    ]
    mean, error = mean_and_error(by_dataset)
    return f"{mean:+.3f}" + ("" if error is None else f" ± {error:.3f}")
