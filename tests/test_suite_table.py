"""fipo.suite_table: means, spreads and paired differences of the second suite's results, against sums by hand."""

import json
import statistics

import pytest

from fipo.cli import main
from fipo.errors import UserError
from fipo.suite_table import suite_report

NAMES = ["a", "b", "c"]


def score(value):
    return {"accuracy": value, "auc": value + 0.05, "f1": value - 0.05, "latents": [1]}


def record(run, seed, values, layer=3):
    results = {
        name: {"sae": {"1": score(value)}, "llm": {"1": score(0.6)}, "random": {"1": score(0.5)}}
        for name, value in zip(NAMES, values, strict=False)
    }
    return {
        "suite": "sae-probes",
        "sae": {"name": f"{run}/layer_{layer}", "run": run, "seed": seed, "layer": layer},
        "mean": {"sae": {"1": score(statistics.fmean(values))}},
        "results": results,
        **{"git_revision": "abc", "hardware": {"cpu": "some"}},
    }


def write(folder, *records):
    folder.mkdir(exist_ok=True)
    for number, one in enumerate(records):
        (folder / f"{number}_sae_probes_results.json").write_text(json.dumps(one))
    return folder


def rows(text, first):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(first)]


BASE = [record("run_8", 1, [0.6, 0.7, 0.8]), record("run_8", 2, [0.5, 0.7, 0.6])]
OTHER = [record("run_6", 2, [0.6, 0.9, 0.6]), record("run_6", 1, [0.7, 0.7, 0.9]), record("run_6", 3, [0.1, 0.2, 0.3])]


def test_means_spreads_and_differences(tmp_path):
    text = suite_report([write(tmp_path / "x", *BASE), write(tmp_path / "y", *OTHER)])
    (head,) = rows(text, "| 3 datasets")
    assert head == ["3 datasets", "layer", "accuracy, k 1", "AUC, k 1", "F1, k 1"]
    means = [0.7, 0.6]
    (base,) = rows(text, "| run_8 |")
    assert base[2] == f"{statistics.fmean(means):.3f} ± {statistics.stdev(means):.3f}" and base[3].startswith("0.700 ±")
    assert rows(text, "| channels")[0][2:4] == ["0.600 ± 0.000", "0.650 ± 0.000"]
    (difference,) = rows(text, "| run_6 - run_8")
    by_dataset = [0.1, 0.1, 0.05]  # of the seeds that both have
    error = statistics.stdev(by_dataset) / 3**0.5
    assert difference[1:3] == ["3", f"{statistics.fmean(by_dataset):+.3f} ± {error:.3f}"]
    assert "run_8: 1, 2; run_6: 1, 2, 3" in text and "- git abc, some" in text
    for line, above in zip(text.splitlines()[1:], text.splitlines(), strict=False):
        assert set(line) != {"|", "-"} or line.count("|") == above.count("|")


def test_saes_from_elsewhere_have_no_seed(tmp_path):
    folder = write(tmp_path / "x", BASE[0] | {"sae": {"name": "mine", "layer": 3}})
    assert "(mine: -)" in suite_report([folder])
    with pytest.raises(UserError, match="result of mine, layer 3 is given twice"):
        suite_report([folder, folder])


def test_one_seed_and_one_name_have_no_spread_and_no_difference(tmp_path):
    text = suite_report([write(tmp_path / "x", BASE[0])])
    assert rows(text, "| run_8 |")[0][2] == "0.700" and "difference |" not in text


def test_the_command_prints_it(tmp_path, capsys):
    assert main(["compare", str(write(tmp_path / "x", *BASE))]) == 0
    assert capsys.readouterr().out == suite_report([tmp_path / "x"])


def test_what_cannot_be_compared(tmp_path):
    with pytest.raises(UserError, match="result of run_8, seed 1, layer 3 is given twice"):
        suite_report([write(tmp_path / "twice", BASE[0], BASE[0])])
    fewer = record("run_6", 1, [0.6, 0.7])
    with pytest.raises(UserError, match="run_6, seed 1, layer 3 has other datasets or k than the first"):
        suite_report([write(tmp_path / "fewer", BASE[0], fewer)])


def of_config(one, **config):
    return one | {"sae": one["sae"] | {"config": config}}


def test_runs_of_one_name_that_differ_are_no_seeds(tmp_path):
    plain, ortsae = (of_config(one, penalty=on) for one, on in zip(BASE, ("off", "on"), strict=True))
    text = suite_report([write(tmp_path / "x", plain, ortsae)])
    assert rows(text, "| run_8, penalty off | 3")[0][2] == "0.700" and rows(text, "| run_8, penalty on | 3")


def test_a_sweep_of_one_seed(tmp_path):
    swept = [of_config(BASE[0], **{"architecture": "topk", "workload.k": k}) for k in ("16", "32")]
    text = suite_report([write(tmp_path / "x", *swept)])
    assert rows(text, "| run_8, k 16 | 3")[0][2] == "0.700" and rows(text, "| run_8, k 32 - run_8, k 16 | 3")


def test_a_sweep_is_set_against_the_first_run_at_the_same_sparsity(tmp_path):
    swept = [of_config(one, **{"architecture": "topk", "workload.k": k}) for k in "24" for one in (BASE[0], OTHER[1])]
    text = suite_report([write(tmp_path / "x", *swept)])
    assert [row[0] for row in rows(text, "| run_")][4:] == [
        *("run_6, k 2 - run_8, k 2", "run_8, k 4 - run_8, k 2", "run_6, k 4 - run_8, k 4")
    ]


@pytest.mark.parametrize(("key", "value"), [("model", "gpt"), ("dtype", "bfloat16"), ("random_seed", 7)])
def test_other_settings_are_compared_apart(tmp_path, key, value):
    usual = {"model": "bert", "dtype": "float32", "random_seed": 42}
    folder = write(tmp_path / "x", *[one | usual for one in BASE], OTHER[0] | {"model": "bert"})
    assert "| run_6 - run_8 |" in suite_report([folder]), "an older file does not say all"
    write(folder, BASE[0] | usual, BASE[1] | usual | {key: value})
    with pytest.raises(UserError, match=f"run_8, seed 2, layer 3 is at {key} {value}, the first at {usual[key]}"):
        suite_report([folder])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sae": 3}, "sae is 3"),
        ({"sae": {"name": "x", "layer": 3, "config": []}}, "sae.config is .."),
        ({"sae": {"name": "x", "layer": 3, "config": {"k": 3}}}, "sae.config.k is 3; expected str"),
        ({"sae": {"name": "x", "layer": 3, "seed": "1"}}, "sae.seed is '1'"),
        ({"mean": {}}, "mean.sae is None"),
        ({"mean": {"sae": {"x": 1}}}, "a k is 'x'"),
        ({"mean": {"sae": {"01": 1}}}, "a k is '01'"),
        ({"mean": {"sae": {"9" * 5000: 1}}}, "a k is '9999"),
        ({"results": {}}, "results is .."),
        ({"results": {"a": {}}}, "results.a.sae is None"),
        ({"hardware": {}}, "hardware.cpu is None"),
    ],
)
def test_what_is_no_result_is_named(tmp_path, change, told):
    with pytest.raises(UserError, match=f"is no result of `fipo probe --suite sae-probes`: .*{told}"):
        suite_report([write(tmp_path / "x", BASE[0] | change)])
    wrong = json.loads(json.dumps(BASE[0]))
    wrong["results"]["b"]["llm"]["1"]["auc"] = 1.2
    with pytest.raises(UserError, match=r"results.b.llm.1.auc is 1.2; expected a share from 0 to 1"):
        suite_report([write(tmp_path / "y", wrong)])
