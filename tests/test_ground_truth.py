"""benchmarks/ground_truth.py: every method runs, the same tokens reach all, and the ratios are those of its rows."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import toys

from fipo import runs
from fipo.errors import UserError
from fipo.synthetic import Truth, build

FILE = Path(__file__).parent.parent / "benchmarks" / "ground_truth.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("ground_truth", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_gives_a_row_and_a_saved_sae(bench, tmp_path, monkeypatch, capsys):
    out = tmp_path / "result.json"
    arguments = ["--features", "64", "--steps", "4", "--k", "3", "--seeds", "1", "2", "--tokens", "500"]
    arguments += ["--json", str(out), "--save", str(tmp_path / "saes"), "--truth", str(tmp_path / "truth.safetensors")]
    monkeypatch.setattr(sys, "argv", ["ground_truth.py", *arguments])
    bench.main()
    result = json.loads(out.read_text())
    assert {"name", "hardware", "versions", "git_revision", "rows", "ratios"} <= result.keys()
    assert [(row["method"], row["seed"]) for row in result["rows"]] == [(m, s) for s in (1, 2) for m in bench.METHODS]
    assert capsys.readouterr().out.count("\n") == 2 + len(bench.METHODS)
    assert len(list((tmp_path / "saes").glob("*/cfg.json"))) == 2 * len(bench.METHODS)
    monkeypatch.setattr(sys, "argv", ["ground_truth.py", *arguments, "--methods", "fipo", "--seeds", "2"])
    bench.main()
    (again,) = json.loads(out.read_text())["rows"]
    expected = next(row for row in result["rows"] if (row["method"], row["seed"]) == ("fipo", 2))
    assert again["mcc"] == expected["mcc"], "the truth is kept, seeds hold"


def test_the_rival_is_run_9(bench, tmp_path):
    assert runs.resolve(tmp_path / "run_9", FILE.parent.parent / "experiments").levels == bench.MATRYOSHKA


def test_methods_of_a_seed_see_the_same_tokens_whoever_trains_beside_them(bench):
    truth = build(Truth(features=64, width=16), toys.seeded())
    configs = [bench.config_of(bench.METHODS[name], 16, 3, 3, 1e-3, 1) for name in ("fipo", "matryoshka")]
    (beside, _), _ = bench.train(configs, truth, "cpu")
    ((alone, _),) = bench.train(configs[:1], truth, "cpu")
    assert torch.equal(beside.sae.dec_FD, alone.sae.dec_FD)


def test_ratios_are_differences_in_standard_errors_and_shares(bench):
    def row(method, seed, f1, absorption):
        rest = {"mcc": 0.5, "explained_variance": 0.8, "composition": 0.1}
        return {"method": method, "seed": seed, "k": 6, "f1": f1, "absorption": absorption, **rest}

    rows = [row("fipo", 1, 0.9, 0.1), row("fipo", 2, 0.8, 0.1)]
    rows += [row("matryoshka", 1, 0.6, 0.4), row("matryoshka", 2, 0.7, 0.4)]
    found = bench.ratios(rows)
    assert found["f1_ahead_of_matryoshka"] == pytest.approx(0.2)
    assert found["f1_ahead_of_matryoshka_in_standard_errors"] == pytest.approx(0.2 / (2 * 0.005 / 2) ** 0.5)
    assert found["absorption_share_of_matryoshka"] == pytest.approx(0.25)
    assert found["composition_share_of_matryoshka"] == 1 and not [name for name in found if "batchtopk" in name]
    assert bench.ratios(rows[2:]) == {}


def test_results_of_several_seeds_are_put_together(bench, tmp_path, monkeypatch, capsys):
    def written(name, steps, *seeds, cpu="Abacus"):
        rows = [dict.fromkeys(bench.SHOWN, 0.5) | {"method": "fipo", "seed": seed, "k": 6} for seed in seeds]
        result = {"settings": {"steps": steps}, "git_revision": name, "rows": rows, "hardware": {"cpu": cpu}}
        (tmp_path / name).write_text(json.dumps(result))
        return str(tmp_path / name)

    first, second, other, twice = written("a", 4, 1), written("b", 4, 2, 3), written("c", 5, 4), written("d", 4, 1)

    def merge(*files):
        monkeypatch.setattr(sys, "argv", ["ground_truth.py", "--json", str(tmp_path / "all.json"), "--merge", *files])
        bench.main()
        return json.loads((tmp_path / "all.json").read_text())

    result = merge(first, second)
    assert [row["seed"] for row in result["rows"]] == [1, 2, 3] and result["git_revision"] == "a, b"
    assert "| fipo | 6 | 3 |" in capsys.readouterr().out
    assert {row["ms_per_step"] for row in result["rows"]} == {0.5} and result["hardware"] == {"cpu": "Abacus"}
    elsewhere = merge(first, written("e", 4, 5, cpu="Slide rule"))
    assert {row["ms_per_step"] for row in elsewhere["rows"]} == {None}
    assert elsewhere["hardware"] == {"cpu": "Abacus; Slide rule"}
    with pytest.raises(UserError, match="settings of .*c .*those of .*a"):
        merge(first, other)
    with pytest.raises(UserError, match="one that no earlier file has"):
        merge(first, twice)


def test_the_gap_to_saelens_is_the_largest_of_all_measures(bench):
    row = {"method": "fipo", "seed": 1, "k": 6}
    for number, name in enumerate(bench.JUDGED):
        row |= {name: 0.5, f"saelens_{name}": 0.5 - 0.01 * number}
    row |= {"absorption": None, "composition": 0.1}
    assert bench.ratios([row]) == {"largest_gap_to_saelens_evaluation": pytest.approx(0.04)}
