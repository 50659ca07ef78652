"""fipo.results: the record of a finished run is read as it is, and everything else refused with its place."""

import contextlib
import copy
import json

import pytest

from fipo.errors import UserError
from fipo.results import FINAL, read_result

NAMES = [f"{who}_top_{k}_test_accuracy" for who in ("llm", "sae") for k in (1, 5)]
EVALUATED = {"dataset_names": ["a"], "k_values": [1, 5]}
LAYER = {
    **{"layer": 3, "dict_size": 64, "training_steps": 40, "held_out_fvu": 0.3, "held_out_l0": 30, "dead_share": 0.1},
    **{"mean_max_cosine": 0.4, "eval_config": EVALUATED, "eval_result_details": [{"dataset_name": "a_results"}]},
}
LAYER["eval_result_details"][0] |= dict.fromkeys(NAMES, 0.5) | {"llm_test_accuracy": None}
LAYER["eval_result_metrics"] = {who: {n: 0.5 for n in NAMES if n.startswith(who)} for who in ("llm", "sae")}
RECORD = {
    **{"run": "run_3", "workload": "tiny", "seed": 1, "git_revision": "abc", "versions": {"torch": "2"}},
    **{"hardware": {"cpu": "x"}, "eval_config": EVALUATED, "layers": {"3": LAYER}, "more": [1]},
}


def write(folder, content):
    (folder / FINAL).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def test_a_good_one(tmp_path):
    assert read_result(write(tmp_path, RECORD)) == RECORD


def test_no_finished_run(tmp_path):
    with pytest.raises(UserError, match="holds no final_info.json: it is no finished run; leave it out or finish it"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("seed", "1", "seed is '1'; expected int"),
        ("seed", True, "seed is True; expected int"),
        ("versions", None, "versions is None"),
        ("versions.torch", 2, "versions.torch is 2; expected str"),
        ("eval_config.k_values", [], "eval_config.k_values is .."),
        ("eval_config.dataset_names", [1], r"eval_config.dataset_names.0. is 1; expected str"),
        ("layers", {}, "layers is no mapping of layers to records"),
        ("layers.3", [], "layers.3 is .."),
        ("layers.3.layer", 4, "layers.3.layer is 4"),
        ("layers.3.held_out_fvu", -0.1, "layers.3.held_out_fvu is -0.1; expected a number, zero or more"),
        ("layers.3.dead_share", 1.1, "layers.3.dead_share is 1.1; expected a share from 0 to 1"),
        ("layers.3.held_out_l0", None, "layers.3.held_out_l0 is None"),
        ("layers.3.held_out_l0", 10**400, "layers.3.held_out_l0 is 1000"),
        ("layers.3.eval_config.dataset_names", ["b"], "eval_result_details is not one row for each"),
        ("layers.3.eval_result_metrics", None, "eval_result_metrics.llm is no mapping"),
        (
            "layers.3.eval_result_metrics.sae.sae_top_1_test_accuracy",
            2,
            "sae_top_1_test_accuracy is 2; expected a share",
        ),
        (
            "layers.3.eval_result_metrics.llm.llm_top_5_test_accuracy",
            None,
            "eval_result_metrics lacks llm_top_5_test_accuracy",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, path, value, text):
    record = copy.deepcopy(RECORD)
    *parents, last = path.split(".")
    section = record
    for name in parents:
        section = section[name]
    section[last] = value
    with pytest.raises(UserError, match=text):
        read_result(write(tmp_path, record))


CONTROLS = {
    "mean": {"random_top_1_test_accuracy": 0.5},
    "datasets": {"a": {"random_top_1_test_accuracy": 0.5}},
    "margin_over_random": {f"top_{k}": {"difference": 0.1, "standard_error": 0.01} for k in (1, 5)},
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (None, "eval_result_controls is None"),
        ({"mean": 3}, "eval_result_controls.mean is 3; expected dict"),
        (
            {"mean": {"random_top_1_test_accuracy": "high"}},
            "mean.random_top_1_test_accuracy is 'high'; expected a share",
        ),
        ({"datasets": {}}, "datasets.a is None; expected dict"),
        ({"margin_over_random": {}}, "margin_over_random.top_1 is None"),
        ({"margin_over_random": CONTROLS["margin_over_random"] | {"top_5": {"difference": 0}}}, "top_5.standard_error"),
        ({"margin_over_random": {"top_1": {"difference": 0.1, "standard_error": -1}}}, "top_1.standard_error is -1"),
    ],
)
def test_controls_are_whole_where_there_are_any(tmp_path, change, text):
    record = copy.deepcopy(RECORD)
    record["layers"]["3"]["eval_result_controls"] = CONTROLS
    assert read_result(write(tmp_path, record)) == record
    record["layers"]["3"]["eval_result_controls"] = None if change is None else CONTROLS | change
    with pytest.raises(UserError, match=text):
        read_result(write(tmp_path, record))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("eval_result_protocol", {"rng": 3}, "eval_result_protocol.rng is 3; expected str"),
        ("eval_result_datasets", [{"dataset_name": "a"}], r"eval_result_datasets\[0\].selected_texts_sha256 is None"),
    ],
)
def test_how_it_was_probed_is_whole_where_it_is_told(tmp_path, key, value, text):
    record = copy.deepcopy(RECORD)
    record["layers"]["3"][key] = value
    with pytest.raises(UserError, match=text):
        read_result(write(tmp_path, record))


OTHERS = {f"{who}_top_3_test_accuracy": 0.6 for who in ("llm", "sae")}


@pytest.mark.parametrize(
    ("others", "text"),
    [
        (None, "3.eval_result_metrics lacks llm_top_3_test_accuracy"),
        ({"mean": OTHERS, "datasets": {}}, "3.eval_result_details of a lacks llm_top_3_test_accuracy"),
        ({"mean": OTHERS | {"sae_top_3_test_accuracy": 2}, "datasets": {}}, "other_ks.mean.sae_top_3.* is 2; expected"),
        ({"mean": OTHERS, "datasets": {"a": []}}, r"eval_result_other_ks.a is \[\]; expected dict"),
        ({"mean": OTHERS, "datasets": {"a": OTHERS}}, ""),
    ],
)
def test_a_k_of_our_own_is_beside_saebenchs(tmp_path, others, text):
    record = copy.deepcopy(RECORD)
    record["layers"]["3"]["eval_config"] = EVALUATED | {"k_values": [1, 3]}
    record["layers"]["3"] |= {} if others is None else {"eval_result_other_ks": others}
    with pytest.raises(UserError, match=text) if text else contextlib.nullcontext():
        assert read_result(write(tmp_path, record)) == record


def test_sparsity_is_a_number(tmp_path):
    record = copy.deepcopy(RECORD)
    record["layers"]["3"] |= {"k": None, "sparsity_penalty": None}
    with pytest.raises(UserError, match="layers.3.sparsity_penalty is None"):
        read_result(write(tmp_path, record))


@pytest.mark.parametrize("content", ["", "[]", "3", "[" * 10_000, '{"seed": NaN}'])
def test_what_is_no_record(tmp_path, content):
    with pytest.raises(UserError, match="final_info.json"):
        read_result(write(tmp_path, content))
