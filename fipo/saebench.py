"""The `sparse_probing` result in SAEBench's own format (schema of SAEBench 0.6.0).

Key order, key names, null for what was not computed, `_results` behind dataset names: all as SAEBench writes it, so
its loaders and plots read ours. Values of our own go under further keys, which its schema lets pass.
"""

import time
import uuid
from typing import Any, NamedTuple

from fipo.config import Probing

SCHEMA_KS = (1, 2, 5, 10, 20, 50, 100)
PROBED_BY = ("llm", "sae")
OTHER_KS = "eval_result_other_ks"
"""Key of our own for what the k that SAEBench's schema does not have would say under its keys: `mean` over datasets,
and each of the `datasets`. Absent where there is no such k."""


class Setting(NamedTuple):
    """What a result was measured with."""

    probing: Probing
    seed: int
    model: str
    dtype: str
    context: int
    release: str
    """Under which name the SAE is filed."""
    training_tokens: int | None
    commit: str


def sparse_probing_record(
    setting: Setting, accuracies: dict[str, dict[str, dict[str, float]]], sae_config: dict[str, Any]
) -> dict[str, Any]:
    """The record of one SAE. `accuracies`: dataset -> metric (`sae_top_1_test_accuracy` ...) -> class -> accuracy;
    `sae_config`: content of its cfg.json."""
    probing = setting.probing
    means = {
        dataset: {name: _mean(by_class) for name, by_class in metrics.items()}
        for dataset, metrics in accuracies.items()
    }
    overall = {name: _mean({dataset: of[name] for dataset, of in means.items()}) for name in next(iter(means.values()))}
    complete = _schema(overall)
    metadata = sae_config.get("metadata", {})
    return {
        "eval_type_id": "sparse_probing",
        "eval_config": {
            "random_seed": setting.seed,
            "dataset_names": list(accuracies),
            "probe_train_set_size": 2 * probing.train_per_class,
            "probe_test_set_size": 2 * probing.test_per_class,
            "context_length": setting.context,
            "sae_batch_size": 125,
            "llm_batch_size": None,
            "llm_dtype": setting.dtype,
            "model_name": setting.model,
            "k_values": list(probing.ks),
            "lower_vram_usage": False,
        },
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": {
            who: {name: value for name, value in complete.items() if name.startswith(who)} for who in PROBED_BY
        },
        "eval_result_details": [{"dataset_name": f"{dataset}_results", **_schema(of)} for dataset, of in means.items()],
        "sae_bench_commit_hash": setting.commit,
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": setting.release,
        "sae_lens_version": metadata.get("sae_lens_version"),
        "sae_cfg_dict": {
            **{name: value for name, value in sae_config.items() if name != "metadata"},
            **metadata,
            "finetuning_scaling_factor": False,
            "activation_fn_str": {"standard": "relu"}.get(sae_config["architecture"], sae_config["architecture"]),
            "dataset_trust_remote_code": False,
            "training_tokens": setting.training_tokens,
        },
        "eval_result_unstructured": {f"{dataset}_results": metrics for dataset, metrics in accuracies.items()},
        **_other_ks(overall, means),
    }


def metric_name(who: str, k: int | None) -> str:
    """`llm_top_1_test_accuracy`, or `llm_test_accuracy` for the probe on everything (k None)."""
    return f"{who}_test_accuracy" if k is None else f"{who}_top_{k}_test_accuracy"


def overall_metrics(record: dict[str, Any]) -> dict[str, Any]:
    """The means over datasets of a record, the model's and the SAE's in one, of every k."""
    others = record.get(OTHER_KS, {}).get("mean", {})
    return {**record["eval_result_metrics"]["llm"], **record["eval_result_metrics"]["sae"], **others}


def dataset_metrics(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Dataset -> the same of that dataset."""
    others = record.get(OTHER_KS, {}).get("datasets", {})
    rows = {row["dataset_name"].removesuffix("_results"): row for row in record["eval_result_details"]}
    return {dataset: {**row, **others.get(dataset, {})} for dataset, row in rows.items()}


def _schema(values: dict[str, float]) -> dict[str, float | None]:
    """All names of the schema in its order; None for what was not computed."""
    names = [metric_name(who, k) for who in PROBED_BY for k in (None, *SCHEMA_KS)]
    return {name: values.get(name) for name in names}


def _other_ks(overall: dict[str, float], means: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What the schema has no names for; nothing where there is no such k."""
    names = overall.keys() - _schema({}).keys()
    mean, *of_each = ({name: of[name] for name in of if name in names} for of in (overall, *means.values()))
    return {OTHER_KS: {"mean": mean, "datasets": dict(zip(means, of_each, strict=True))}} if names else {}


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
