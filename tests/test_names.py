"""Runs of one name that differ are told apart by what they differ in, and by nothing else."""

from fipo.compare import report
from fipo.config import RunConfig
from fipo.names import NOT_COMPARED, SPARSITY, additions, bases, flat, sparsity_of, told_apart, with_sparsity
from fipo.records import to_dict
from fipo.workloads import MINILM
from fipo.yamlfile import write_yaml
from tests.test_compare import finished

PLAIN = {"seed": 1, "workload": {"k": 32, "layers": [3]}, "penalty": None}
ORTSAE = {"seed": 1, "workload": {"k": 32, "layers": [3]}, "penalty": {"kind": "ortsae", "weight": 0.1, "every": 1}}


def test_seeds_layers_and_what_does_not_touch_the_result_add_nothing():
    another = {"seed": 2, "workload": {"k": 32, "layers": [1, 5]}, "penalty": None, "log_every": 3}
    assert additions([flat(PLAIN), flat(another)], SPARSITY) == ["", ""]


def test_a_part_that_is_on_in_one_run_only():
    added = additions([flat(PLAIN), flat(ORTSAE), flat(PLAIN)], SPARSITY)
    assert added == ["penalty off", "penalty.kind ortsae, penalty.weight 0.1", "penalty off"]


def test_a_result_without_a_config_neither_gets_a_name_nor_gives_one():
    assert additions([flat(PLAIN), {}], SPARSITY) == ["", ""]
    added = additions([flat(PLAIN), {}, flat(ORTSAE)], SPARSITY)
    assert added == ["penalty off", "", "penalty.kind ortsae, penalty.weight 0.1"]


def test_sparsity_is_told_elsewhere_and_the_method_comes_before_the_workload():
    low = {"workload": {"k": 16, "train_tokens": 9}, "levels": {"rise": 0.5}}
    high = {"workload": {"k": 32, "train_tokens": 7}, "levels": {"rise": 0.8}}
    added = additions([flat(low), flat(high)], SPARSITY)
    assert added == ["levels.rise 0.5, workload.train_tokens 9", "levels.rise 0.8, workload.train_tokens 7"]


def test_where_two_values_do_not_tell_all_apart_every_one_is_given():
    configs = [flat({"a": 1, "b": 1, "c": 1}), flat({"a": 1, "b": 1, "c": 2}), flat({"a": 2, "b": 2, "c": 2})]
    assert additions(configs, SPARSITY)[:2] == ["a 1, b 1, c 1", "a 1, b 1, c 2"]


def test_what_is_not_compared_is_part_of_a_config():
    whole = to_dict(RunConfig(run="run_0", workload=MINILM))
    keys = flat(whole).keys()
    assert keys >= SPARSITY and not keys & NOT_COMPARED
    assert {key for key in NOT_COMPARED if key in whole or key.removeprefix("workload.") in whole["workload"]} == (
        NOT_COMPARED
    )


def test_names_of_runs():
    """One name, two configs of it, and a sweep."""
    low, high, ortsae = ({"workload.k": k, "penalty": on} for k, on in (("16", "off"), ("32", "off"), ("32", "on")))
    assert told_apart(["run_8", "run_6", "run_8"], [low, ortsae, high]) == ["run_8", "run_6", "run_8"]
    names = told_apart(["run_8", "run_8", "run_6", "run_8"], [low, high, high, ortsae])
    assert names == ["run_8, penalty off", "run_8, penalty off", "run_6", "run_8, penalty on"]
    assert with_sparsity(names, ["k 16", "k 32", "k 32", ""]) == [
        *("run_8, penalty off, k 16", "run_8, penalty off, k 32", "run_6", "run_8, penalty on")
    ]


def test_what_a_run_of_a_sweep_is_set_against():
    """The first run's own settings against its first; a setting that it lacks too."""
    assert bases(["a", "a", "b", "b", "b"], ["k 16", "k 32", "k 16", "k 32", "k 64"]) == {
        **{"a, k 32": "a, k 16", "b, k 16": "a, k 16", "b, k 32": "a, k 32", "b, k 64": "a, k 16"}
    }
    assert bases(["a", "a", "b", "c"], ["k 16", "k 32", "k 32", ""]) == {
        **{"a, k 32": "a, k 16", "b": "a, k 32", "c": "a, k 16"}
    }
    assert bases(["a", "b"], ["", ""]) == {"b": "a"} and not bases(["a"], ["k 3"])


def test_the_sparsity_a_config_sets():
    values = {"workload.k": "32", "workload.sparsity_penalty": "0.01"}
    assert sparsity_of(values | {"architecture": "batchtopk"}) == "k 32"
    assert sparsity_of(values | {"architecture": "jumprelu"}) == "λ 0.01"
    assert sparsity_of(values) == sparsity_of({"architecture": "topk"}) == ""


def test_the_table_names_them(tmp_path):
    folders = []
    for seed, (name, config, fvu) in enumerate((("a", PLAIN, 0.2), ("ortsae", ORTSAE, 0.3), ("b", PLAIN, 0.4))):
        folders.append(finished(tmp_path / name, "run_8", seed, fvu))
        write_yaml(folders[-1] / "config.yaml", config)
    rows = {line.split(" | ")[1]: line for line in report(folders).splitlines() if line.startswith("| minilm")}
    assert "| 0.300 ± 0.141 |" in rows["run_8, penalty off"]
    assert "| 0.300 |" in rows["run_8, penalty.kind ortsae, penalty.weight 0.1"]
