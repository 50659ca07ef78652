"""Tables of several runs: means and spreads over seeds from result files alone."""

import json
import re

import pytest
import torch

from fipo.checkpoint import save_tensors
from fipo.compare import pareto_points, report
from fipo.config import Probing
from fipo.errors import UserError
from fipo.saebench import OTHER_KS, Setting, metric_name, sparse_probing_record
from fipo.yamlfile import write_yaml

EVALUATED = {"dataset_names": ["a"], "k_values": [1]}


def finished(folder, run, seed, fvu, top_1=0.7, **more):
    metrics = {"llm": {}, "sae": {}}
    for k in (1, 5):
        metrics["llm"][f"llm_top_{k}_test_accuracy"] = 0.6
        metrics["sae"][f"sae_top_{k}_test_accuracy"] = top_1 if k == 1 else None
    layer = {
        **{"held_out_fvu": fvu, "held_out_l0": 32.0, "dead_share": 0.01, "mean_max_cosine": 0.25},
        **{"layer": 3, "dict_size": 64, "training_steps": 40, "eval_config": EVALUATED},
        **more,
        "eval_result_metrics": metrics,
        "eval_result_details": [{"dataset_name": "a_results", **metrics["llm"], **metrics["sae"]}],
    }
    info = {"run": run, "seed": seed, "workload": "minilm", "layers": {"3": layer}, "git_revision": "abc"}
    info |= {"eval_config": EVALUATED, "versions": {"torch": "2.13.0"}, "hardware": {"cpu": "some"}}
    folder.mkdir()
    (folder / "final_info.json").write_text(json.dumps(info))
    return folder


def test_seeds_of_one_run_become_a_mean_and_a_spread(tmp_path):
    folders = [finished(tmp_path / f"s{seed}", "run_3", seed, fvu) for seed, fvu in ((1, 0.2), (2, 0.3), (3, 0.4))]
    folders.append(finished(tmp_path / "other", "run_0", 1, 0.5))
    lines = report(folders).splitlines()
    assert lines[2].startswith("| minilm | run_0 | 3 | 0.500 | 32.0 | 1.00% | 0.250 | 0.700 | 0.600 |")
    assert lines[3].startswith("| minilm | run_3 | 3 | 0.300 ± 0.100 | 32.0 ± 0.0 |")
    assert "run_0: 1; run_3: 1, 2, 3" in report(folders)


def test_the_table_is_markdown_and_three_runs_are_compared_as_a_whole_only(tmp_path):
    folders = []
    for run, right in (("run_0", 5), ("run_3", 8), ("run_6", 10)):
        folders.append(finished(tmp_path / run, run, 1, 0.3))
        rows_TM = torch.arange(10).repeat(2, 1)
        answers = {"topics/rows_TM": rows_TM, "topics/sae_top_1/right_TM": rows_TM < right}
        save_tensors(folders[-1] / "layer_3" / "probing_outcomes.safetensors", answers)
    lines = report(folders).splitlines()
    for number, line in enumerate(lines):
        if set(line) == {"|", "-"}:
            assert line.count("|") == lines[number - 1].count("|")
    compared = [line for line in lines if line.startswith("| run_")]
    assert [line.split("|")[1:4] for line in compared] == [
        [" run_3 - run_0 ", " 3 ", " all "],
        [" run_6 - run_0 ", " 3 ", " all "],
    ]
    assert "+0.300 [" in compared[0] and "+0.500 [" in compared[1]
    both = [line for line in report(folders[:2]).splitlines() if line.startswith("| run_3 - run_0")]
    assert [line.split("|")[3].strip() for line in both] == ["all", "topics"]


def test_runs_that_differ_in_sparsity_are_no_seeds_of_one_another(tmp_path):
    folders = [finished(tmp_path / f"k{k}", "run_6", 1, k / 100, k=k) for k in (16, 32)]
    lines = report(folders).splitlines()
    assert lines[2].startswith("| minilm | run_6, k 16 | 3 | 0.160 |")
    assert lines[3].startswith("| minilm | run_6, k 32 | 3 | 0.320 |")


def test_differences_are_from_the_run_given_first(tmp_path):
    folders = [finished(tmp_path / run, run, 1, 0.3) for run in ("run_8", "run_6")]
    assert "| run_6 - run_8 |" not in report(folders), "no answers to compare"
    for folder in folders:
        rows_TM = torch.arange(4).repeat(2, 1)
        answers = {"topics/rows_TM": rows_TM, "topics/sae_top_1/right_TM": rows_TM < 2}
        save_tensors(folder / "layer_3" / "probing_outcomes.safetensors", answers)
    assert "| run_6 - run_8 | 3 | all | +0.000" in report(folders)
    assert "| run_8 - run_6 | 3 | all | +0.000" in report(folders[::-1])


def test_over_trainings_the_spread_is_that_of_the_differences(tmp_path):
    """Of seeds that both have; their common ups and downs cancel."""
    values = {"run_8": (0.6, 0.7, 0.8), "run_6": (0.62, 0.71, 0.83)}
    folders = [
        finished(tmp_path / f"{run}_{seed}", run, seed, 0.3, top_1)
        for run, of in values.items()
        for seed, top_1 in enumerate(of)
    ]
    folders.append(finished(tmp_path / "alone", "run_6", 9, 0.3, 0.1))
    assert "| run_6 - run_8 | all | all, over 3 trainings | +0.020 ± 0.006 |" in report(folders)
    assert "trainings" not in report([folders[0], folders[3]])


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no final_info.json"):
        report([tmp_path])


def answered(folder, right_TM, rows_TM=None, texts_N=None, name="topics"):
    rows_TM = torch.arange(right_TM.shape[1]).repeat(len(right_TM), 1) if rows_TM is None else rows_TM
    tensors = {f"{name}/rows_TM": rows_TM, f"{name}/sae_top_1/right_TM": right_TM}
    tensors |= {} if texts_N is None else {f"{name}/texts_N": texts_N}
    save_tensors(folder / "layer_3" / "probing_outcomes.safetensors", tensors)
    return folder


def interval(folders):
    line = next(line for line in report(folders).splitlines() if "| 3 | all |" in line)
    mean, low, high = re.search(r"([+-]\d\.\d+) \[([+-]\d\.\d+), ([+-]\d\.\d+)\]", line).groups()
    return float(mean), float(high) - float(low)


def test_more_seeds_on_the_same_texts_do_not_narrow_what_texts_leave_open(tmp_path):
    """Three trainings that all give the same answers tell no more of other texts than one does; on texts of their own
    they do."""
    generator = torch.Generator().manual_seed(0)
    right = {run: torch.rand(2, 200, generator=generator) < share for run, share in (("run_8", 0.6), ("run_6", 0.7))}

    def folders(seeds, name, mixed):
        made = []
        for run, right_TM in right.items():
            for seed in range(seeds):
                order = torch.randperm(200, generator=torch.Generator().manual_seed(seed if mixed else 0))
                folder = finished(tmp_path / f"{name}{run}{seed}", run, seed, 0.3)
                made.append(answered(folder, right_TM, order.repeat(2, 1)))
        return made

    mean, width = interval(folders(1, "one", False))
    assert interval(folders(3, "same", False)) == pytest.approx((mean, width), abs=0.012)
    assert interval(folders(3, "own", True)) == pytest.approx((mean, width / 3**0.5), abs=0.012)


def test_a_result_of_before_that_names_no_texts_has_none_be_named(tmp_path):
    """Two seeds on the same texts in the same order, one of which tells them: they are drawn together all the same."""
    generator = torch.Generator().manual_seed(0)
    right = {run: torch.rand(2, 200, generator=generator) < share for run, share in (("run_8", 0.6), ("run_6", 0.7))}
    identities_N = torch.randperm(10**6, generator=generator)[:200] + 10**9

    def folders(name, told):
        for run, right_TM in right.items():
            for seed, tells in enumerate(told):
                folder = finished(tmp_path / f"{name}{run}{seed}", run, seed, 0.3)
                yield answered(folder, right_TM, texts_N=identities_N if tells else None)

    whole = interval(list(folders("all", (True, True))))
    assert interval(list(folders("some", (True, False)))) == pytest.approx(whole, abs=0.012)


@pytest.mark.parametrize(
    "rows_TM",
    [
        torch.zeros(2, 0).long(),
        torch.zeros(5).long(),
        torch.zeros(1, 1, 5).long(),
        torch.zeros(2, 5),
        -torch.ones(2, 5).long(),
    ],
)
def test_rows_that_are_no_numbers_of_texts_are_one_line(rows_TM, tmp_path):
    folders = [finished(tmp_path / run, run, 0, 0.3) for run in ("run_8", "run_6")]
    for folder in folders:
        answered(folder, torch.ones(rows_TM.shape, dtype=torch.bool), rows_TM)
    with pytest.raises(UserError, match="rows_TM are no numbers of its texts"):
        report(folders)


def test_seeds_that_asked_the_same_texts_in_another_order_are_no_surer(tmp_path):
    """What tells it are the texts themselves, which results hold; their numbers are of each seed's own order."""
    generator = torch.Generator().manual_seed(0)
    right = {run: torch.rand(2, 200, generator=generator) < share for run, share in (("run_8", 0.6), ("run_6", 0.7))}

    def folders(seeds):
        made = []
        for run, right_TM in right.items():
            for seed in range(seeds):
                order_N = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
                folder = finished(tmp_path / f"{seeds}{run}{seed}", run, seed, 0.3)
                made.append(answered(folder, right_TM[:, order_N], torch.arange(200).repeat(2, 1), order_N + 1000))
        return made

    mean, width = interval(folders(1))
    assert interval(folders(4)) == pytest.approx((mean, width), abs=0.012)


def test_trainings_count_alike_where_some_share_their_texts(tmp_path):
    """Two on the same texts and one on its own: the mean is that of the three."""
    folders = []
    for run, shares in (("run_8", (0, 0, 0)), ("run_6", (2, 2, 8))):
        for seed, share in enumerate(shares):
            folder = finished(tmp_path / f"{run}{seed}", run, seed, 0.3)
            rows_TM = torch.randperm(10, generator=torch.Generator().manual_seed(seed // 2)).repeat(2, 1)
            folders.append(answered(folder, rows_TM < share, rows_TM))
    assert interval(folders)[0] == 0.4
    assert "| run_6 - run_8 | 3 | topics | +0.400 [" in report(folders)


def test_scores_on_other_datasets_are_no_seeds_of_one_another(tmp_path):
    first = finished(tmp_path / "first", "run_6", 1, 0.2, top_1=0.9)
    other = rescored(finished(tmp_path / "other", "run_6", 1, 0.2), ["b"], 0.6)
    lines = report([first, other]).splitlines()
    assert lines[2].startswith("| minilm: a | run_6 | 3 | 0.200 | 32.0 | 1.00% | 0.250 | 0.900 |")
    assert lines[3].startswith("| minilm: b | run_6 | 3 | 0.200 | 32.0 | 1.00% | 0.250 | 0.600 |")
    assert len({point.panel for point in pareto_points([first, other])}) == 2


def test_of_scores_on_several_datasets_none_is_left_out(tmp_path):
    folders = []
    for run, share in (("run_8", 2), ("run_6", 3)):
        for name in ("a", "b"):
            folder = rescored(finished(tmp_path / f"{run}{name}", run, 1, 0.3), [name], 0.6)
            folders.append(answered(folder, torch.arange(4).repeat(2, 1) < share, name=name))
    compared = [
        line.split("|")[3].strip() for line in report(folders).splitlines() if line.startswith("| run_6 - run_8")
    ]
    assert compared[:3] == ["all", "a", "b"]


def test_what_is_given_twice_is_no_second_seed(tmp_path):
    folders = [finished(tmp_path / name, "run_3", 1, 0.2) for name in ("first", "copy")]
    for given in (folders, [folders[0], folders[0]]):
        with pytest.raises(UserError, match="run_3, seed 1, layer 3, is given twice"):
            report(given)
        with pytest.raises(UserError, match="is given twice"):
            pareto_points(given)


def rescored(folder, datasets, top_1):
    """The run in `folder`, scored on other datasets."""
    info = json.loads((folder / "final_info.json").read_text())
    for layer in info["layers"].values():
        layer["eval_config"] = {"dataset_names": datasets, "k_values": [1]}
        row = layer["eval_result_details"][0] | {"sae_top_1_test_accuracy": top_1}
        layer["eval_result_details"] = [row | {"dataset_name": f"{name}_results"} for name in datasets]
        layer["eval_result_metrics"]["sae"]["sae_top_1_test_accuracy"] = top_1
    (folder / "final_info.json").write_text(json.dumps(info))
    return folder


def test_only_what_was_scored_on_the_same_datasets_is_compared_over_trainings(tmp_path):
    base = [finished(tmp_path / f"base{seed}", "run_8", seed, 0.3, top_1=0.6) for seed in (1, 2, 3)]
    other = [finished(tmp_path / f"other{seed}", "run_6", seed, 0.3, top_1=0.7) for seed in (1, 2)]
    other.append(rescored(finished(tmp_path / "other3", "run_6", 3, 0.3), ["b"], 0.9))
    line = next(line for line in report([*base, *other]).splitlines() if "trainings" in line)
    assert "all, over 2 trainings | +0.100 ± 0.000" in line
    assert "trainings" not in report([*base, *[rescored(folder, ["b"], 0.9) for folder in other[:2]]])


def probed_at(folder, scores):
    """The run in `folder`, probed at the k of `scores` (k -> accuracy)."""
    info = json.loads((folder / "final_info.json").read_text())
    for layer in info["layers"].values():
        layer["eval_config"] = {"dataset_names": ["a"], "k_values": list(scores)}
        by_class = {metric_name(who, k): {"x": score} for who in ("sae", "llm") for k, score in scores.items()}
        asked = Setting(Probing(datasets=("a",), ks=tuple(scores)), 1, "m", "float32", 16, "x", None, "abc")
        record = sparse_probing_record(asked, {"a": by_class}, {"architecture": "topk"})
        layer |= {key: record[key] for key in record if key in (OTHER_KS, "eval_result_metrics", "eval_result_details")}
    (folder / "final_info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize(
    ("ks", "shown"),
    [
        (((1, 5), (1, 3)), (1, 5)),
        (((2, 10), (2, 4, 10)), (2, 10)),
        (((1, 2, 3), (1, 3)), (1, 3)),
        (((2, 5),), (2, 5)),
        (((3,),), (3,)),
        (((2, 3), (4, 6)), (2, 6)),
    ],
)
def test_top_1_and_top_5_or_the_ends_of_what_all_have(tmp_path, ks, shown):
    folders = [
        probed_at(finished(tmp_path / f"{seed}", "run_6", seed, 0.3, k=8), {k: k / 20 for k in of})
        for seed, of in enumerate(ks)
    ]
    for folder in folders:
        answers = {f"a/sae_top_{k}/right_TM": torch.ones(2, 4, dtype=torch.bool) for k in range(10)}
        save_tensors(
            folder / "layer_3" / "probing_outcomes.safetensors", answers | {"a/rows_TM": torch.arange(8).view(2, 4)}
        )
    head, _, row = report(folders).splitlines()[:3]
    assert [cell.strip() for cell in head.split("|") if "SAE" in cell] == [f"SAE top-{k}" for k in shown]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    for k in shown:
        assert cells[f"SAE top-{k}"].startswith(f"{k / 20:.3f}" if all(k in of for of in ks) else "-")
    assert {point.panel for point in pareto_points(folders)} == {f"top-{shown[0]} of sparse probing, minilm, layer 3"}
    assert pareto_points(folders)[0].score == shown[0] / 20


def test_answers_of_k_5_alone_are_compared(tmp_path):
    folders = [finished(tmp_path / run, run, 1, 0.3) for run in ("run_8", "run_6")]
    for number, folder in enumerate(folders):
        probed_at(folder, {1: 0.7, 5: 0.8})
        rows_TM = torch.arange(4).repeat(2, 1)
        answers = {"topics/rows_TM": rows_TM, "topics/sae_top_5/right_TM": rows_TM < 2 + number}
        save_tensors(folder / "layer_3" / "probing_outcomes.safetensors", answers)
    lines = [line for line in report(folders).splitlines() if line.startswith("| run_6 - run_8 | 3 |")]
    assert [line.split("|")[3].strip() for line in lines] == ["all", "topics"]
    assert all(line.split("|")[4].strip() == "-" and "+0.250 [" in line for line in lines)


def test_answers_of_another_shape_are_damage(tmp_path):
    folders = [finished(tmp_path / run, run, 1, 0.3) for run in ("run_8", "run_6")]
    for folder, count in zip(folders, (4, 3), strict=True):
        rows_TM = torch.arange(4).repeat(2, 1)
        answers = {"topics/rows_TM": rows_TM, "topics/sae_top_1/right_TM": torch.ones(2, count, dtype=torch.bool)}
        save_tensors(folder / "layer_3" / "probing_outcomes.safetensors", answers)
    with pytest.raises(
        UserError, match=r"probing_outcomes.safetensors is damaged: topics/sae_top_1/right_TM has \(2, 3\)"
    ):
        report(folders)


def timed(folder, training, harvest=10.0, cpu="some", **more):
    times = {"harvest": harvest, "training": training, "harvested": True, "hardware": {"cpu": cpu}, **more}
    (folder / "runtime.json").write_text(json.dumps(times))


def test_times_are_ratios_to_the_run_given_first_seed_by_seed(tmp_path):
    for run, trainings in (("run_0", (10.0, 20.0, 30.0)), ("run_6", (15.0, 40.0, 3.0))):
        for seed, training in enumerate(trainings, start=1):
            timed(finished(tmp_path / f"{run}_{seed}", run, seed, 0.3), training, cpu=f"{run}" if seed == 3 else "some")
    folders = sorted(tmp_path.iterdir())
    assert "| run_6 / run_0 | 1.00 ± 0.00 | 1.75 ± 0.35 |" in report(folders), "of the third seed the processors differ"
    assert "| run_0 / run_6 | 1.00 ± 0.00 | 0.58 ± 0.12 |" in report(folders[::-1])
    (tmp_path / "run_6_1" / "runtime.json").unlink()
    assert "| run_6 / run_0 | 1.00 | 2.00 |" in report(folders)
    timed(tmp_path / "run_6_1", "long")
    with pytest.raises(UserError, match=r"runtime\.json: training is 'long'; expected a number"):
        report(folders)
    (tmp_path / "run_6_1" / "runtime.json").write_text("[]")
    with pytest.raises(UserError, match=r"runtime\.json: the record is \[\]"):
        report(folders)


def test_a_harvest_that_was_found_on_disk_took_no_time(tmp_path):
    """One that does not say whether it was is none to be compared either."""
    folders = [finished(tmp_path / f"{run}_{seed}", run, seed, 0.3) for run in ("run_0", "run_6") for seed in (1, 2)]
    for folder, harvest in zip(folders, (10.0, 10.0, 20.0, 0.1), strict=True):
        timed(folder, 5.0, harvest, harvested=harvest > 1)
    assert "| run_6 / run_0 | 2.00 | 1.00 ± 0.00 |" in report(folders)
    times = json.loads((folders[2] / "runtime.json").read_text())
    del times["harvested"]
    (folders[2] / "runtime.json").write_text(json.dumps(times))
    assert "| run_6 / run_0 | - | 1.00 ± 0.00 |" in report(folders)
    timed(folders[2], 5.0, harvested="yes")
    with pytest.raises(UserError, match=r"runtime\.json: harvested is 'yes'; expected bool"):
        report(folders)


def test_layers_trained_in_folders_of_their_own_are_each_timed(tmp_path):
    """Neither takes the other's place."""
    folders = []
    for run, factor in (("run_0", 1.0), ("run_6", 2.0)):
        for layer, training in ((3, 10.0), (5, 30.0)):
            folder = finished(tmp_path / f"{run}_{layer}", run, 1, 0.3)
            info = json.loads((folder / "final_info.json").read_text())
            info["layers"] = {str(layer): {**info["layers"]["3"], "layer": layer}}
            (folder / "final_info.json").write_text(json.dumps(info))
            timed(folder, training * (factor if layer == 3 else 2 * factor - 1))
            folders.append(folder)
    assert "| run_6 / run_0 | 1.00 ± 0.00 | 2.50 ± 0.71 |" in report([folders[0], folders[1], folders[3], folders[2]])


def test_runs_of_other_layers_are_not_timed_against_each_other(tmp_path):
    folders = [finished(tmp_path / run, run, 1, 0.3) for run in ("run_0", "run_6")]
    for folder in folders:
        timed(folder, 10.0)
    assert "| run_6 / run_0 | 1.00 | 1.00 |" in report(folders)
    info = json.loads((folders[1] / "final_info.json").read_text())
    info["layers"]["5"] = {**info["layers"]["3"], "layer": 5}
    (folders[1] / "final_info.json").write_text(json.dumps(info))
    assert "| ratio |" not in report(folders)


def measured(folder, texts=None, protocol=None, **asked):
    """The run in `folder`, whose result says how and on which texts (dataset -> SHA-256) it was scored."""
    info = json.loads((folder / "final_info.json").read_text())
    for layer in info["layers"].values():
        layer["eval_config"] = {**layer["eval_config"], **asked}
        layer["eval_result_protocol"] = protocol or {"rng": "fipo", "pooling": "float32"}
        layer["eval_result_datasets"] = [
            {"dataset_name": name, "selected_texts_sha256": sha} for name, sha in (texts or {"a": "0" * 64}).items()
        ]
    (folder / "final_info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"probe_test_set_size": 80}, ["; test texts 60", "; test texts 80"]),
        ({"context_length": 64}, ["; context 128", "; context 64"]),
        ({"model_name": "gpt"}, ["; model bert", "; model gpt"]),
        ({"protocol": {"rng": "saebench", "pooling": "float32"}}, ["; rng fipo", "; rng saebench"]),
        ({"protocol": {"rng": "fipo", "pooling": "bfloat16"}}, ["; pooling bfloat16", "; pooling float32"]),
    ],
)
def test_what_was_measured_in_another_way_is_no_seed_and_no_pair(tmp_path, change, names):
    usual = {"probe_test_set_size": 60, "context_length": 128, "model_name": "bert"}
    runs = (("first", "run_6", 1), ("second", "run_6", 2), ("other", "run_8", 2))
    folders = [measured(finished(tmp_path / name, run, seed, 0.3), **usual) for name, run, seed in runs]
    for folder in folders:
        answered(folder, torch.arange(4).repeat(2, 1) < 2, name="a")
    assert "| minilm | run_6 | 3 | 0.300 ± 0.000" in report(folders) and "| run_8 - run_6 | 3 |" in report(folders)
    measured(folders[1], **(usual | change))
    text = report(folders)
    assert {line.split(" | ")[0].removeprefix("| minilm") for line in text.splitlines() if "| minilm" in line} == (
        set(names)
    )
    assert "±" not in text.partition("Mean")[0] and "| run_8 - run_6 |" not in text
    assert {point.panel.split(", ")[1].removeprefix("minilm") for point in pareto_points(folders)} == set(names)


def test_only_answers_to_the_same_texts_are_paired(tmp_path):
    """Of rows of the same numbers: the texts behind them may be others."""
    folders = []
    for run, draw in (("run_8", 1), ("run_6", 2)):
        for seed in (1, 2):
            folder = measured(finished(tmp_path / f"{run}{seed}", run, seed, 0.3), random_seed=seed)
            folders.append(answered(folder, torch.arange(4).repeat(2, 1) < draw, name="a"))
    assert "| run_6 - run_8 | all | all, over 2 trainings |" in report(folders)
    for folder, seed in zip(folders[2:], (3, 4), strict=True):
        measured(folder, {"a": "1" * 64}, random_seed=seed)
    assert "| run_6 - run_8 |" not in report(folders)


def test_one_name_for_two_datasets_is_refused(tmp_path):
    folders = [measured(finished(tmp_path / run, run, 1, 0.3), random_seed=1) for run in ("run_8", "run_6")]
    measured(folders[1], {"a": "f" * 64}, random_seed=1)
    measured(folders[0], random_seed=[])
    assert "| run_6 |" in report(folders), "drawn by another seed"
    measured(folders[0], random_seed=1)
    with pytest.raises(UserError, match=r"scored on other texts of a \(.* ffffffff and 00000000\); compare them apart"):
        report(folders)


def test_how_an_old_run_was_probed_is_in_its_config(tmp_path):
    folders = [finished(tmp_path / name, "run_6", seed, 0.3) for seed, name in enumerate(("a", "b"))]
    for folder, rng in zip(folders, ("fipo", "saebench"), strict=True):
        write_yaml(folder / "config.yaml", {"run": "run_6", "workload": {"probing": {"rng": rng, "cached": rng == ""}}})
    assert "| minilm; rng fipo | run_6 |" in report(folders) and "| minilm; rng saebench | run_6 |" in report(folders)


def test_a_sweep_is_set_against_the_first_run_at_the_same_sparsity(tmp_path):
    """In differences and in times."""
    folders = []
    for run, factor in (("run_8", 1), ("run_6", 2)):
        for k in (16, 32):
            folder = answered(finished(tmp_path / f"{run}{k}", run, 1, 0.3, k=k), torch.arange(8).view(2, 4) < factor)
            timed(folder, training=k * factor)
            folders.append(folder)
    lines = report(folders).splitlines()
    pairs = [line.split("|")[1].strip() for line in lines if " - run_8" in line]
    assert pairs == ["run_8, k 32 - run_8, k 16", "run_6, k 16 - run_8, k 16", "run_6, k 32 - run_8, k 32"]
    for line in ("run_8, k 32 / run_8, k 16", "run_6, k 16 / run_8, k 16", "run_6, k 32 / run_8, k 32"):
        assert f"| {line} | 1.00 | 2.00 |" in lines
