"""Several finished runs side by side, as Markdown made from their result files alone.

Runs of one name, config and layer are seeds of one another: the table gives mean ± standard deviation over them. Where
configs of one name differ, the name says in what (fipo.names). Below it each other run is set against the one given
first, in a sweep at the same sparsity, answer by answer, with 95 % bootstrap intervals. They say what other texts would
change, not what other SAEs would: that is in the standard error over trainings, of all seeds and layers that both have.
Last come the times of whole runs, as ratios. Reads run folders and the folders that `fipo probe --out` writes.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fipo.checkpoint import load_tensors
from fipo.errors import UserError
from fipo.files import sha256_json
from fipo.finished import Result, read_all
from fipo.names import CONTROLS, KINDS, MEASURES, bases, renamed, seeds_told, suite_names, with_sparsity
from fipo.pareto import Point
from fipo.randomness import generator_for
from fipo.saebench import metric_name, overall_metrics
from fipo.uncertainty import Answers, Interval, bootstrap, joined, spread

SHOWN_KS = (1, 5)
TIMED = ("harvest", "training")
TIMES_NOTE = (
    "Times are as the runs met the machine, since each was last resumed; of harvests, those that found nothing on disk."
)


def report(folders: Sequence[Path]) -> str:
    """The table of all runs in `folders`, the differences between them, and where the numbers come from."""
    results = read_all(folders)
    named = [result.run for result in results], [result.setting for result in results]
    results, against, ks = renamed(results, with_sparsity(*named)), bases(*named), shown_ks(results)
    told = seeds_told((one.run, one.seed) for one in sorted(results, key=lambda one: one.run))
    notes = f"Mean ± standard deviation over seeds ({told}). Made by `fipo compare` from result files of:\n"
    origins = "\n".join(f"- {origin}" for origin in sorted({result.origin for result in results}))
    return (
        "\n".join([table(results, ks), *differences(results, ks, against), *times(results, against), notes, origins])
        + "\n"
    )


def pareto_points(folders: Sequence[Path]) -> list[Point]:
    """Explained variance against top-1 (or the smallest k that is shown) of every run; what lacks one of them, as a
    `fipo probe` result, is left out."""
    results = read_all(folders)
    told, k = suite_names(result.suite for result in results), shown_ks(results)[0]
    return [
        Point(
            f"top-{k} of sparse probing, {told[result.suite]}, layer {result.layer}",
            result.run,
            result.setting,
            1 - result.record["held_out_fvu"],
            score,
            _references(result.record, k),
        )
        for result in results
        if "held_out_fvu" in result.record
        and (score := overall_metrics(result.record).get(metric_name("sae", k))) is not None
    ]


def _references(record: dict[str, Any], k: int) -> tuple[tuple[str, float], ...]:
    scores = _flat(record)
    found = {title: scores.get(metric_name(who, k)) for who, title in CONTROLS.items()}
    return tuple((title, score) for title, score in found.items() if score is not None)


def shown_ks(results: Sequence[Result]) -> list[int]:
    """The k of the probes that are shown: 1 and 5 where any result has them; else the smallest for the one and the
    largest for the other, of those that all results have."""
    ks = [set(result.record["eval_config"]["k_values"]) for result in results]
    some = set.union(*ks)
    common = set.intersection(*ks) or some
    ends = zip(SHOWN_KS, (min(common), max(common)), strict=True)
    return sorted({k if k in some else end for k, end in ends})


def table(results: Sequence[Result], ks: Sequence[int]) -> str:
    """One row a workload, run and layer."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    told = suite_names(result.suite for result in results)
    for result in results:
        groups.setdefault((told[result.suite], result.run, result.layer), []).append(_flat(result.record))
    probed = {f"{title} top-{k}": (metric_name(who, k), "{:.3f}") for k in ks for who, title in KINDS.items()}
    shown = {
        title: column
        for title, column in (MEASURES | probed).items()
        if any(column[0] in r for of in groups.values() for r in of)
    }
    lines = [f"| workload | run | layer | {' | '.join(shown)} |", "|---" * (3 + len(shown)) + "|"]
    for (workload, run, layer), records in sorted(groups.items()):
        cells = [spread([record.get(key) for record in records], form) for key, form in shown.values()]
        lines.append(f"| {workload} | {run} | {layer} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def differences(results: Sequence[Result], ks: Sequence[int], against: Mapping[str, str]) -> list[str]:
    """Paired differences of every run from the one it is set against: by layer, and between two runs by dataset as
    well."""
    lines = []
    for other, base in against.items():
        for layer in sorted({result.layer for result in results}):
            rows = {k: _paired(results, base, other, layer, k) for k in ks}
            names = dict.fromkeys(name for k in ks for name in rows[k])
            for place, name in enumerate(names):
                if place == 0 or len(against) == 1:
                    cells = " | ".join(_shown(rows[k].get(name)) for k in ks)
                    lines.append(f"| {other} - {base} | {layer} | {name} | {cells} |")
        by_k = {k: _by_training(results, base, other, k) for k in ks}
        trainings = max(map(len, by_k.values()))
        if trainings > 1:
            cells = " | ".join(_over_trainings(by_k[k]) for k in ks)
            lines.append(f"| {other} - {base} | all | all, over {trainings} trainings | {cells} |")
    if not lines:
        return []
    heads = " | ".join(f"SAE top-{k}" for k in ks)
    return [f"| difference | layer | datasets | {heads} |", "|---" * (3 + len(ks)) + "|", *lines, ""]


def times(results: Sequence[Result], against: Mapping[str, str]) -> list[str]:
    """Seconds of every run over those of the one it is set against: mean ± standard deviation over the seeds that both
    have of the same layers on the same hardware."""
    runtimes = {(r.run, r.record["workload"], r.seed, r.runtime["layers"]): r.runtime for r in results if r.runtime}
    lines = []
    for other, base in against.items():
        pairs = [(of, runtimes.get((base, *which))) for (run, *which), of in runtimes.items() if run == other]
        fair = [(ours, theirs) for ours, theirs in pairs if theirs and ours["hardware"] == theirs["hardware"]]
        ratios = [
            [ours[phase] / theirs[phase] for ours, theirs in fair if _timed(ours, phase) and _timed(theirs, phase)]
            for phase in TIMED
        ]
        if any(ratios):
            lines.append(f"| {other} / {base} | {' | '.join(spread(values, '{:.2f}') for values in ratios)} |")
    heads = " | ".join(f"{phase} time" for phase in TIMED)
    return [f"| ratio | {heads} |", "|---" * (1 + len(TIMED)) + "|", *lines, "", TIMES_NOTE, ""] if lines else []


def _timed(runtime: dict[str, Any], phase: str) -> bool:
    """Does it say how long the phase takes? It does not of a harvest of which a part was found on disk."""
    return runtime[phase] > 0 and (phase != "harvest" or runtime.get("harvested", False))


def _paired(results: Sequence[Result], base: str, other: str, layer: int, k: int) -> dict[str, Interval]:
    """`all` and every dataset -> difference of accuracies over the seeds that both runs have, of answers to the same
    texts. Seeds that answered the same texts are drawn together: a text is no surer for being asked of more of them."""
    numbered: dict[str, list[Answers]] = {}
    named: dict[str, list[Answers]] = {}
    taken: set[tuple[Any, ...]] = set()
    of_run = {run: [r for r in results if (r.run, r.layer) == (run, layer)] for run in (base, other)}
    for result, partner in itertools.product(of_run[other], of_run[base]):
        measured = (result.suite.workload, result.suite.settings, result.seed)
        if measured != (partner.suite.workload, partner.suite.settings, partner.seed):
            continue
        if not (result.outcomes.is_file() and partner.outcomes.is_file()):
            continue
        ours, theirs = load_tensors(result.outcomes), load_tensors(partner.outcomes)
        for name in [key.removesuffix("/rows_TM") for key in ours if key.endswith("/rows_TM")]:
            key = f"{name}/sae_top_{k}/right_TM"
            same = f"{name}/rows_TM" in theirs and ours[f"{name}/rows_TM"].equal(theirs[f"{name}/rows_TM"])
            same = same and result.texts.get(name) == partner.texts.get(name)
            if same and key in ours and key in theirs and (*measured, name) not in taken:
                taken.add((*measured, name))
                _check_answers(result.outcomes, ours, name, key)
                _check_answers(partner.outcomes, theirs, name, key)
                values_TM = ours[key].double() - theirs[key].double()
                rows_TM = ours[f"{name}/rows_TM"].long()
                numbered.setdefault(name, []).append(Answers(values_TM, _own_numbers(rows_TM, name, result)))
                if f"{name}/texts_N" in ours:
                    named.setdefault(name, []).append(Answers(values_TM, ours[f"{name}/texts_N"][rows_TM]))
    if not numbered:
        return {}
    # By the identities of texts where all results tell them; those of before number each its own.
    all_named = {name: of for name, of in named.items() if len(of) == len(numbered[name])}
    found = {name: joined(of) for name, of in (numbered | all_named).items()}
    intervals = {
        name: bootstrap(answers, generator_for(0, "bootstrap", name, layer, k))[1] for name, answers in found.items()
    }
    everything = [one for answers in found.values() for one in answers]
    return {"all": bootstrap(everything, generator_for(0, "bootstrap", layer, k))[1], **intervals}


def _own_numbers(rows_TM: Tensor, name: str, result: Result) -> Tensor:
    """What names the text behind every row where results of before do not: the same for two seeds where all of their
    texts are the same."""
    drawn = int(sha256_json([result.texts.get(name), rows_TM.tolist()])[:7], 16)
    return rows_TM + (drawn << 32)


def _check_answers(file: Path, tensors: dict[str, Tensor], name: str, key: str) -> None:
    right_TM, rows_TM, texts_N = tensors[key], tensors[f"{name}/rows_TM"], tensors.get(f"{name}/texts_N")
    if right_TM.shape != rows_TM.shape or right_TM.dtype != torch.bool:
        raise UserError(f"{file} is damaged: {key} has {tuple(right_TM.shape)} answers; make it again")
    whole = all(one is None or one.dtype in (torch.int32, torch.int64) for one in (rows_TM, texts_N))
    numbers = whole and rows_TM.dim() == 2 and rows_TM.numel() > 0 and int(rows_TM.min()) >= 0
    if not numbers or (texts_N is not None and (texts_N.dim() != 1 or int(rows_TM.max()) >= len(texts_N))):
        raise UserError(f"{file} is damaged: {name}/rows_TM are no numbers of its texts; make it again")


def _by_training(results: Sequence[Result], base: str, other: str, k: int) -> list[float]:
    """Difference of the suites' accuracies for every seed and layer that both runs have on the same texts."""
    name = metric_name("sae", k)
    scores = {(r.run, r.suite, *r.texts.items(), r.seed, r.layer): _flat(r.record).get(name) for r in results}
    pairs = [(score, scores.get((base, *which))) for (run, *which), score in scores.items() if run == other]
    return [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]


def _over_trainings(differences: Sequence[float]) -> str:
    if len(differences) < 2:
        return "-"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.fmean(differences):+.3f} ± {error:.3f}"


def _shown(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    controls = record.get("eval_result_controls", {}).get("mean", {})
    return {**record, **overall_metrics(record), **controls}
