"""Result files, read as what others may have written: the record of a run or a probing, or one clear line why not."""

import contextlib
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fipo.errors import UserError
from fipo.files import read_json
from fipo.saebench import OTHER_KS, dataset_metrics, metric_name, overall_metrics

FINAL, RUNTIME = "final_info.json", "runtime.json"
RESULT_SUFFIX, OUTCOMES_SUFFIX = "_eval_results.json", "_outcomes.safetensors"
PAGE_SUFFIX = "_features.html"
SUITE_RESULT_SUFFIX = "_sae_probes_results.json"
"""How the names end of what `fipo probe --out` writes."""
SUITE_METRICS = {"accuracy": "accuracy", "auc": "AUC", "f1": "F1"}
"""What a probe of the second suite is scored by, and how tables name it."""
_K = re.compile("[1-9][0-9]{0,8}")
SHARE, MEASURE = "a share from 0 to 1", "a number, zero or more"
_RUN: dict[str, Any] = {
    "run": str,
    "workload": str,
    "seed": int,
    "git_revision": str,
    "versions": {"torch": str},
    "hardware": {"cpu": str},
    "eval_config": {"dataset_names": [str], "k_values": [int]},
}
_LAYER: dict[str, Any] = {
    "layer": int,
    "dict_size": int,
    "training_steps": int,
    "held_out_fvu": MEASURE,
    "held_out_l0": MEASURE,
    "dead_share": SHARE,
    "mean_max_cosine": float,
    "eval_config": {"dataset_names": [str], "k_values": [int]},
    "eval_result_details": [dict],
}
_PROBED: dict[str, Any] = {
    "sae": {"name": str, "layer": int},
    **{key: _RUN[key] for key in ("git_revision", "versions", "hardware", "eval_config")},
    "eval_result_details": [dict],
}


_SUITE: dict[str, Any] = {
    "sae": {"name": str, "layer": int},
    **{key: _RUN[key] for key in ("git_revision", "hardware")},
    **{"mean": {"sae": dict}, "results": dict},
}


def read_result(folder: Path) -> dict[str, Any]:
    """The record of the finished run in `folder`; a missing or damaged one is a `UserError`."""
    file = folder / FINAL
    if not file.is_file():
        raise UserError(f"{folder} holds no {FINAL}: it is no finished run; leave it out or finish it")
    info = read_json(file)
    _check(file, "", info, _RUN)
    layers = info.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise UserError(f"{file}: layers is no mapping of layers to records")
    for name, record in layers.items():
        path = f"layers.{name}"
        _check(file, path, record, _LAYER)
        if str(record["layer"]) != name:
            raise UserError(f"{file}: {path}.layer is {record['layer']}")
        _check_accuracies(file, f"{path}.", record)
        if "k" in record and type(record["k"]) is not int:
            _check(file, f"{path}.sparsity_penalty", record.get("sparsity_penalty"), MEASURE)
    return info


def read_runtime(folder: Path) -> dict[str, Any]:
    """Seconds of the phases of the run in `folder`, with the hardware; empty where it has none."""
    file = folder / RUNTIME
    if not file.is_file():
        return {}
    record = read_json(file)
    _check(file, "", record, {"harvest": MEASURE, "training": MEASURE, "hardware": dict})
    if "harvested" in record:
        _check(file, "harvested", record["harvested"], bool)
    return record


def read_probe_result(file: Path) -> dict[str, Any]:
    """A result of `fipo probe`; a damaged one, or something else, is a `UserError`."""
    record = read_json(file)
    with _refused_as(file, "result of `fipo probe`"):
        _check(file, "", record, _PROBED)
        _check_trained(file, record["sae"])
        _check_accuracies(file, "", record)
        of_runs = {key: kind for key, kind in _LAYER.items() if kind in (SHARE, MEASURE, float)}
        _check(file, "", record, {key: kind for key, kind in of_runs.items() if key in record})
    return record


def read_suite_result(file: Path) -> dict[str, Any]:
    """A result of `fipo probe --suite sae-probes`; a damaged one, or something else, is a `UserError`."""
    record = read_json(file)
    with _refused_as(file, "result of `fipo probe --suite sae-probes`"):
        _check(file, "", record, _SUITE)
        _check_trained(file, record["sae"])
        ks = list(record["mean"]["sae"])
        for key in ks:
            _check(file, "mean.sae, a k", int(key) if _K.fullmatch(key) else key, int)
        of_each = {k: dict.fromkeys(SUITE_METRICS, SHARE) for k in ks}
        for name in record["results"]:
            _check(file, f"results.{name}", record["results"][name], dict.fromkeys(("sae", "llm", "random"), of_each))
        _check(file, "results", list(record["results"]), [str])
    return record


@contextlib.contextmanager
def _refused_as(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{file} is no {what}: {str(error).removeprefix(f'{file}: ')}") from error


def _check_trained(file: Path, sae: dict[str, Any]) -> None:
    """Run and seed are null for an SAE from elsewhere, and its config is empty, as that of an older result."""
    for key, kind in (("run", str), ("seed", int)):
        if sae.get(key) is not None:
            _check(file, f"sae.{key}", sae[key], kind)
    _check(file, "sae.config", config := sae.setdefault("config", {}), dict)
    _check(file, "sae.config", config, dict.fromkeys(config, str))


def _check_accuracies(file: Path, path: str, record: dict[str, Any]) -> None:
    """Every accuracy is a share, or null for what was not computed; a row a dataset. `path` is empty or ends in "."."""
    metrics = record.get("eval_result_metrics")
    rows = [(f"details[{number}]", row) for number, row in enumerate(record["eval_result_details"])]
    for who in ("llm", "sae"):
        rows.append((f"metrics.{who}", metrics.get(who) if isinstance(metrics, dict) else None))
    names = [row.get("dataset_name") for _, row in rows[:-2]]
    if names != [f"{name}_results" for name in record["eval_config"]["dataset_names"]]:
        raise UserError(f"{file}: {path}eval_result_details is not one row for each of eval_config.dataset_names")
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{file}: {path}eval_result_{place} is no mapping")
        for key, value in row.items():
            if key != "dataset_name" and value is not None:
                _check(file, f"{path}eval_result_{place}.{key}", value, SHARE)
    _check_other_ks(file, path, record)
    asked = [metric_name(who, k) for k in record["eval_config"]["k_values"] for who in ("llm", "sae")]
    given = {"metrics": overall_metrics(record)}
    given |= {f"details of {dataset}": values for dataset, values in dataset_metrics(record).items()}
    for (place, values), name in itertools.product(given.items(), asked):
        if values.get(name) is None:
            raise UserError(f"{file}: {path}eval_result_{place} lacks {name}")
    if "eval_result_controls" in record:
        _check_controls(file, path, record)
    _check_protocol(file, path, record)


def _check_other_ks(file: Path, path: str, record: dict[str, Any]) -> None:
    """Accuracies for k that SAEBench's schema does not have; none where all have a place in it."""
    if OTHER_KS in record:
        path = f"{path}{OTHER_KS}"
        _check(file, path, record[OTHER_KS], {"mean": dict, "datasets": dict})
        for place, values in {"mean": record[OTHER_KS]["mean"], **record[OTHER_KS]["datasets"]}.items():
            _check(file, f"{path}.{place}", values, dict)
            _check(file, f"{path}.{place}", values, dict.fromkeys(values, SHARE))


def _check_protocol(file: Path, path: str, record: dict[str, Any]) -> None:
    """How it was probed and on which texts, where it tells: older results do not."""
    if "eval_result_protocol" in record:
        protocol = dict.fromkeys(("rng", "pooling"), str)
        _check(file, f"{path}eval_result_protocol", record["eval_result_protocol"], protocol)
    if "eval_result_datasets" in record:
        described = dict.fromkeys(("dataset_name", "selected_texts_sha256"), str)
        _check(file, f"{path}eval_result_datasets", record["eval_result_datasets"], [described])


def _check_controls(file: Path, path: str, record: dict[str, Any]) -> None:
    controls, path = record["eval_result_controls"], f"{path}eval_result_controls"
    _check(file, path, controls, {"mean": dict, "datasets": dict, "margin_over_random": dict})
    for name, value in controls["mean"].items():
        _check(file, f"{path}.mean.{name}", value, SHARE)
    for dataset in record["eval_config"]["dataset_names"]:
        _check(file, f"{path}.datasets.{dataset}", controls["datasets"].get(dataset), dict)
        for name, value in controls["datasets"][dataset].items():
            _check(file, f"{path}.datasets.{dataset}.{name}", value, SHARE)
    for k in record["eval_config"]["k_values"]:
        margin = controls["margin_over_random"].get(f"top_{k}")
        _check(file, f"{path}.margin_over_random.top_{k}", margin, {"difference": float, "standard_error": MEASURE})


def _check(file: Path, path: str, value: Any, kind: Any) -> None:
    """Is the value of this kind: a type, a list of one type, a mapping with these keys, or a number in a range?"""
    if isinstance(kind, Mapping):
        good = isinstance(value, dict)
        for key, inner in kind.items() if good else ():
            _check(file, f"{path}.{key}".lstrip("."), value.get(key), inner)
    elif isinstance(kind, list):
        good = isinstance(value, list) and len(value) > 0
        for number, item in enumerate(value if good else ()):
            _check(file, f"{path}[{number}]", item, kind[0])
    elif isinstance(kind, str) or kind is float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        good = good and (kind is float or 0 <= value <= (1 if kind is SHARE else float("inf")))
    else:
        good = type(value) is kind
    if not good:
        expected = kind if isinstance(kind, str) else getattr(kind, "__name__", "other content")
        raise UserError(f"{file}: {path or 'the record'} is {repr(value)[:80]}; expected {expected}")
