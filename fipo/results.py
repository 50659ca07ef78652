"""`final_info.json`, read as what others may have written: the record of a finished run, or one clear line why not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fipo.errors import UserError
from fipo.files import read_json

FINAL = "final_info.json"
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
        _check_accuracies(file, path, record)
    return info


def _check_accuracies(file: Path, path: str, record: dict[str, Any]) -> None:
    """Every accuracy is a share, or null for what was not computed; a row a dataset."""
    metrics = record.get("eval_result_metrics")
    rows = [(f"details[{number}]", row) for number, row in enumerate(record["eval_result_details"])]
    for who in ("llm", "sae"):
        rows.append((f"metrics.{who}", metrics.get(who) if isinstance(metrics, dict) else None))
    names = [row.get("dataset_name") for _, row in rows[:-2]]
    if names != [f"{name}_results" for name in record["eval_config"]["dataset_names"]]:
        raise UserError(f"{file}: {path}.eval_result_details is not one row for each of eval_config.dataset_names")
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{file}: {path}.eval_result_{place} is no mapping")
        for key, value in row.items():
            if key != "dataset_name" and value is not None:
                _check(file, f"{path}.eval_result_{place}.{key}", value, SHARE)
        wanted = [f"{who}_top_{k}_test_accuracy" for who in ("llm", "sae") for k in record["eval_config"]["k_values"]]
        for key in wanted:
            if key.startswith(place[-3:] if place.startswith("metrics") else key) and row.get(key) is None:
                raise UserError(f"{file}: {path}.eval_result_{place} lacks {key}")


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
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and (kind is float or 0 <= value <= (1 if kind is SHARE else float("inf")))
    else:
        good = type(value) is kind
    if not good:
        expected = kind if isinstance(kind, str) else getattr(kind, "__name__", "other content")
        raise UserError(f"{file}: {path or 'the record'} is {repr(value)[:80]}; expected {expected}")
