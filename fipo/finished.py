"""Finished runs, and what `fipo probe` wrote, as results that can be set side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fipo.errors import UserError
from fipo.names import Suite, flat, one_of, renamed, sparsity_of, suite_of, told_apart
from fipo.report import OUTCOMES
from fipo.results import FINAL, OUTCOMES_SUFFIX, RESULT_SUFFIX, read_probe_result, read_result, read_runtime
from fipo.yamlfile import read_yaml


class Result(NamedTuple):
    """One SAE of one run, as its result file tells."""

    run: str
    setting: str
    """What sets its sparsity: `k 32`, or `λ 0.01`; empty where the file does not say."""
    seed: int | None
    """None for an SAE from elsewhere, which does not tell."""
    layer: int
    record: dict[str, Any]
    outcomes: Path
    origin: str
    suite: Suite
    """On what it was scored, and how."""
    config: dict[str, str]
    """The flat config of the run (fipo.names), empty where the folder or result holds none."""
    runtime: dict[str, Any]
    """What its `runtime.json` says of the run, whose `layers` stand beside it; empty where there is none."""

    @property
    def texts(self) -> dict[str, str]:
        """Dataset -> SHA-256 of the texts that were drawn of it; none of a result that does not tell."""
        described = self.record.get("eval_result_datasets", [])
        return {entry["dataset_name"]: entry["selected_texts_sha256"] for entry in described}


def read_all(folders: Sequence[Path]) -> list[Result]:
    """Those of all folders, of runs and of `fipo probe`. Where runs of one name differ in more than sparsity, what
    differs becomes part of the name; what is given twice, or scored on other texts of one name, is a `UserError`."""
    results = [result for folder in folders for result in _read(folder)]
    results = renamed(results, told_apart([result.run for result in results], [result.config for result in results]))
    _refuse_twins(results)
    _refuse_other_texts(results)
    return results


def _read(folder: Path) -> list[Result]:
    """The results in a run folder or in a folder of `fipo probe`."""
    if (folder / FINAL).is_file():
        return _of_run(folder)
    found = [_of_probe(file) for file in sorted(folder.glob(f"*{RESULT_SUFFIX}"))]
    if not found:
        raise UserError(f"{folder} holds no {FINAL} and no *{RESULT_SUFFIX}: finish the run, or leave it out")
    return found


def _of_run(folder: Path) -> list[Result]:
    info, file = read_result(folder), folder / "config.yaml"
    config = read_yaml(file) if file.is_file() else {}
    runtime = {**found, "layers": tuple(info["layers"])} if (found := read_runtime(folder)) else {}
    results = []
    for layer, record in info["layers"].items():
        record = {"workload": info["workload"], **record}
        results.append(
            Result(
                info["run"],
                _setting(record),
                info["seed"],
                int(layer),
                record,
                folder / f"layer_{layer}" / OUTCOMES,
                _origin(info),
                suite_of(record, _probing(config)),
                flat(config),
                runtime,
            )
        )
    return results


def _of_probe(file: Path) -> Result:
    record, beside = {**read_probe_result(file), "workload": "-"}, file.name.removesuffix(RESULT_SUFFIX)
    sae, outcomes = record["sae"], file.parent / f"{beside}{OUTCOMES_SUFFIX}"
    run, seed = sae.get("run") or sae["name"], sae.get("seed")
    config, suite = sae["config"], suite_of(record, {})
    setting = sparsity_of(config)
    return Result(run, setting, seed, sae["layer"], record, outcomes, _origin(record), suite, config, {})


def _probing(config: dict[str, Any]) -> dict[str, Any]:
    """How a run's config has it probed; empty where it does not say."""
    workload = config.get("workload")
    probing = workload.get("probing") if isinstance(workload, dict) else None
    return probing if isinstance(probing, dict) else {}


def _refuse_twins(results: Sequence[Result]) -> None:
    """What is given twice is no second seed."""
    given: dict[tuple[Any, ...], Path] = {}
    for result in results:
        which = (result.run, result.setting, result.suite, result.seed, result.layer)
        if which in given:
            raise UserError(
                f"{one_of(result.run, result.seed, result.layer)}, is given twice: beside {given[which]} and "
                f"{result.outcomes}; leave one out"
            )
        given[which] = result.outcomes


def _refuse_other_texts(results: Sequence[Result]) -> None:
    """Of one suite, one seed draws the same texts of a dataset; where it did not, the datasets were others."""
    drawn: dict[tuple[Any, ...], tuple[str, Result]] = {}
    for result in results:
        drawn_by = str(result.record["eval_config"].get("random_seed"))
        for dataset, texts in result.texts.items():
            known, first = drawn.setdefault((result.suite, drawn_by, dataset), (texts, result))
            if texts != known:
                raise UserError(
                    f"{result.outcomes.parent} and {first.outcomes.parent} were scored on other texts of {dataset} "
                    f"(selected_texts_sha256 {texts[:8]} and {known[:8]}); compare them apart"
                )


def _setting(record: dict[str, Any]) -> str:
    if "k" not in record:
        return ""
    return f"λ {record['sparsity_penalty']:g}" if record["k"] is None else f"k {record['k']}"


def _origin(info: dict[str, Any]) -> str:
    return f"git {info['git_revision'][:12]}, torch {info['versions']['torch']}, {info['hardware']['cpu']}"
