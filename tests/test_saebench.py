"""fipo.saebench: the record has SAEBench's keys in SAEBench's order, null for what was not computed, true means."""

import json
import math

import pytest
from toys import run_config

from fipo.config import Probing
from fipo.export import save_sae
from fipo.saebench import Setting, dataset_metrics, metric_name, overall_metrics, sparse_probing_record
from fipo.state import build_state

TOP_LEVEL = (
    "eval_type_id eval_config eval_id datetime_epoch_millis eval_result_metrics eval_result_details "
    "sae_bench_commit_hash sae_lens_id sae_lens_release_id sae_lens_version sae_cfg_dict eval_result_unstructured"
)
EVAL_CONFIG = (
    "random_seed dataset_names probe_train_set_size probe_test_set_size context_length sae_batch_size "
    "llm_batch_size llm_dtype model_name k_values lower_vram_usage"
)
METRICS = {
    who: [f"{who}_test_accuracy", *(f"{who}_top_{k}_test_accuracy" for k in (1, 2, 5, 10, 20, 50, 100))]
    for who in ("llm", "sae")
}
ASKED = ["sae_test_accuracy", "llm_test_accuracy"]
ASKED += [f"{who}_top_{k}_test_accuracy" for who in ("llm", "sae") for k in (1, 5)]


CONFIG = {"architecture": "topk"}


@pytest.fixture
def accuracies():
    """Two datasets, of three and of two classes, with another number everywhere."""
    count = iter(range(1000))
    classes = {"first": ("a", "b", "c"), "second": ("x", "y")}
    return {
        dataset: {name: {label: 0.5 + next(count) / 100 for label in labels} for name in ASKED}
        for dataset, labels in classes.items()
    }


def setting(probing):
    return Setting(probing, 7, "none", "float32", 128, "fipo_run_0_layer_3", 12 * 16, "abc123")


@pytest.fixture
def record(accuracies, tmp_path):
    import torch

    probing = Probing(datasets=("first", "second"), train_per_class=20, test_per_class=10, ks=(1, 5))
    state = build_state(run_config("run_0"), 0, torch.zeros(8), 1.0)
    saved = save_sae(tmp_path, state.sae, model="none", layer=3, context=128, dataset="some/text", beside={})
    return sparse_probing_record(setting(probing), accuracies, saved)


def test_keys_and_their_order(record):
    assert " ".join(record) == TOP_LEVEL
    assert " ".join(record["eval_config"]) == EVAL_CONFIG
    assert list(record["eval_result_metrics"]) == ["llm", "sae"]
    for who in ("llm", "sae"):
        assert list(record["eval_result_metrics"][who]) == METRICS[who]
    for entry in record["eval_result_details"]:
        assert list(entry) == ["dataset_name", *METRICS["llm"], *METRICS["sae"]]


def test_plain_values(record):
    assert record["eval_type_id"] == "sparse_probing" and record["sae_bench_commit_hash"] == "abc123"
    asked = record["eval_config"]
    assert asked["random_seed"] == 7 and asked["dataset_names"] == ["first", "second"] and asked["k_values"] == [1, 5]
    assert asked["probe_train_set_size"] == 40 and asked["probe_test_set_size"] == 20
    assert asked["context_length"] == 128 and asked["llm_dtype"] == "float32" and asked["model_name"] == "none"
    assert asked["lower_vram_usage"] is False
    assert isinstance(record["datetime_epoch_millis"], int) and 1.7e12 < record["datetime_epoch_millis"] < 1e13
    assert len(record["eval_id"]) == 36 and record["sae_lens_id"] == "custom_sae"
    assert record["sae_lens_release_id"] == "fipo_run_0_layer_3" and record["sae_lens_version"].startswith("6.")


def test_what_was_not_asked_is_null(record):
    for who in ("llm", "sae"):
        given = [name for name, value in record["eval_result_metrics"][who].items() if value is not None]
        assert given == [f"{who}_test_accuracy", f"{who}_top_1_test_accuracy", f"{who}_top_5_test_accuracy"]
    assert record["eval_result_details"][0]["sae_top_2_test_accuracy"] is None


def test_means_over_classes_then_over_datasets(record, accuracies):
    for entry, (dataset, metrics) in zip(record["eval_result_details"], accuracies.items(), strict=True):
        assert entry["dataset_name"] == f"{dataset}_results"
        for name, by_class in metrics.items():
            assert entry[name] == pytest.approx(math.fsum(by_class.values()) / len(by_class))
    for who in ("llm", "sae"):
        for name, value in record["eval_result_metrics"][who].items():
            if value is not None:
                first, second = (entry[name] for entry in record["eval_result_details"])
                assert value == pytest.approx((first + second) / 2)


def test_a_k_that_the_schema_does_not_have_is_kept_beside_it(accuracies):
    assert "eval_result_other_ks" not in sparse_probing_record(setting(Probing(datasets=("a",))), accuracies, CONFIG)
    for number, metrics in enumerate(accuracies.values()):
        metrics["sae_top_3_test_accuracy"] = {"x": 0.5 + number / 4, "y": 0.25 + number / 4}
    made = sparse_probing_record(setting(Probing(datasets=("first", "second"), ks=(1, 3, 5))), accuracies, CONFIG)
    assert made["eval_result_other_ks"] == {
        "mean": {"sae_top_3_test_accuracy": 0.5},
        "datasets": {"first": {"sae_top_3_test_accuracy": 0.375}, "second": {"sae_top_3_test_accuracy": 0.625}},
    }
    assert list(made["eval_result_metrics"]["sae"]) == METRICS["sae"]
    assert overall_metrics(made)["sae_top_3_test_accuracy"] == 0.5
    assert dataset_metrics(made)["second"]["sae_top_3_test_accuracy"] == 0.625
    assert dataset_metrics(made)["second"]["sae_top_1_test_accuracy"] is not None


def test_every_class_is_kept(record, accuracies):
    expected = {"first_results": accuracies["first"], "second_results": accuracies["second"]}
    assert record["eval_result_unstructured"] == expected


def test_sae_config_is_what_saebench_reads(record):
    config = record["sae_cfg_dict"]
    assert "metadata" not in config and config["hook_layer"] == 3 and config["hook_name"] == "blocks.3.hook_resid_post"
    assert config["architecture"] == "standard" and config["activation_fn_str"] == "relu"
    assert config["d_in"] == 8 and config["d_sae"] == 16 and config["training_tokens"] == 12 * 16
    assert config["dataset_path"] == "some/text" and config["context_size"] == 128


def test_is_json_without_nan(record):
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_records_have_ids_of_their_own(record, accuracies):
    saved = {"metadata": {"hook_layer": 3, "sae_lens_version": "6"}, "architecture": "standard"}
    again = sparse_probing_record(setting(Probing(datasets=("first",), ks=(1,))), accuracies, saved)
    assert again["eval_id"] != record["eval_id"]


def test_an_sae_without_metadata_has_a_record_too(accuracies):
    made = sparse_probing_record(setting(Probing(datasets=("first",))), accuracies, CONFIG)
    assert made["sae_lens_version"] is None and made["sae_cfg_dict"]["activation_fn_str"] == "topk"


def test_names():
    assert metric_name("sae", 20) == "sae_top_20_test_accuracy" and metric_name("llm", None) == "llm_test_accuracy"
