"""Finished runs, and what `fipo probe` wrote, as results that can be set side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fipo.errors import UserError
from fipo.names import SPARSITY, Suite, additions, flat
from fipo.report import OUTCOMES
from fipo.results import FINAL, OUTCOMES_SUFFIX, RESULT_SUFFIX, read_probe_result, read_result, read_runtime
from fipo.yamlfile import read_yaml


class Result(NamedTuple):
    """One SAE of one run, as its result file tells."""

    run: str
    setting: str
    """What sets its sparsity: `k 32`, or `λ 0.01`; empty where the file does not say."""
    seed: int
    layer: int
    record: dict[str, Any]
    outcomes: Path
    origin: str
    config: dict[str, str]
    """The flat config of the run (fipo.names), empty where the folder holds none."""
    runtime: dict[str, Any]
    """What its `runtime.json` says of the run, whose `layers` stand beside it; empty where there is none."""

    @property
    def suite(self) -> Suite:
        """On what it was scored."""
        return self.record["workload"], tuple(self.record["eval_config"]["dataset_names"])


def read_all(folders: Sequence[Path]) -> list[Result]:
    """Those of all folders, of runs and of `fipo probe`. Where runs of one name differ in more than sparsity, what
    differs becomes part of the name; what is given twice is a `UserError`."""
    results = _by_config([result for folder in folders for result in _read(folder)])
    _refuse_twins(results)
    return results


def _read(folder: Path) -> list[Result]:
    """The results in a run folder or in a folder of `fipo probe`."""
    if (folder / FINAL).is_file():
        info, file = read_result(folder), folder / "config.yaml"
        config = flat(read_yaml(file)) if file.is_file() else {}
        runtime = {**found, "layers": tuple(info["layers"])} if (found := read_runtime(folder)) else {}
        return [
            Result(
                info["run"],
                _setting(record),
                info["seed"],
                int(layer),
                {"workload": info["workload"], **record},
                folder / f"layer_{layer}" / OUTCOMES,
                _origin(info),
                config,
                runtime,
            )
            for layer, record in info["layers"].items()
        ]
    found = []
    for file in sorted(folder.glob(f"*{RESULT_SUFFIX}")):
        record, beside = read_probe_result(file), file.name.removesuffix(RESULT_SUFFIX) + OUTCOMES_SUFFIX
        sae = record["sae"]
        run, seed = sae.get("run") or sae["name"], sae.get("seed") or 0
        record = {**record, "workload": "-"}
        found.append(Result(run, "", seed, sae["layer"], record, folder / beside, _origin(record), {}, {}))
    if not found:
        raise UserError(f"{folder} holds no {FINAL} and no *{RESULT_SUFFIX}: finish the run, or leave it out")
    return found


def _refuse_twins(results: Sequence[Result]) -> None:
    """What is given twice is no second seed."""
    given: dict[tuple[Any, ...], Path] = {}
    for result in results:
        which = (result.run, result.setting, *result.suite, result.seed, result.layer)
        if which in given:
            raise UserError(
                f"{result.run}, seed {result.seed}, layer {result.layer}, is given twice: beside {given[which]} and "
                f"{result.outcomes}; leave one out"
            )
        given[which] = result.outcomes


def _setting(record: dict[str, Any]) -> str:
    if "k" not in record:
        return ""
    return f"λ {record['sparsity_penalty']:g}" if record["k"] is None else f"k {record['k']}"


def _by_config(results: Sequence[Result]) -> list[Result]:
    added = {
        run: iter(additions([result.config for result in results if result.run == run], without=SPARSITY))
        for run in {result.run for result in results}
    }
    return [r._replace(run=f"{r.run}, {more}" if (more := next(added[r.run])) else r.run) for r in results]


def _origin(info: dict[str, Any]) -> str:
    return f"git {info['git_revision'][:12]}, torch {info['versions']['torch']}, {info['hardware']['cpu']}"
