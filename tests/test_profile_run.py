"""benchmarks.profile_run: the parts of a run add up, and each is a function that a run calls."""

import cProfile
import json
import sys
import time

import pytest
import tiny

from benchmarks import profile_run

UNUSED = {
    *("search.py:largest_of_rows", "loop.py:save", "screen.py:_left", "sae_probes.py:_training_texts"),
    "objective.py:passes",
}
"""Functions of other architectures and workloads, of longer runs, of other processors and without Numba."""
SPARSE_ONLY = {
    *("sparse.py:sum_rows", "sparse.py:row_products", "search.py:largest_of_batch", "sparse.py:grouped"),
    "loss.py:nested_error",
}


@pytest.fixture(params=["run_6", "run_1"])
def result(request, tmp_path, model_folder, text_folder, labelled_folders, monkeypatch):
    values = tiny.workload_values(model_folder("bert"), text_folder, labelled_folders[:1])
    workload = tiny.write_workload(tmp_path / "tiny.yaml", values)
    for name in ("FIPO_CACHE", "FIPO_WORKLOAD"):
        monkeypatch.setenv(name, "restored afterwards")
    arguments = ["--run", request.param, "--workload", str(workload), "--json", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", ["profile_run", *arguments])
    profile_run.main()
    return json.loads((tmp_path / "result.json").read_text())


def test_the_parts_add_up_to_the_whole(result):
    *parts, rest, whole = [row for row in result["rows"] if "part" in row]
    assert rest["seconds"] >= 0, "two of the functions call each other"
    assert sum(row["seconds"] for row in parts) + rest["seconds"] == pytest.approx(whole["seconds"])
    wanted = sum(row["share"] for row in parts if row["wanted"])
    assert result["ratios"]["wanted_share"] == pytest.approx(wanted) and 0 < wanted < 1


def test_every_part_names_functions_that_a_run_calls(result):
    silent = {row["part"] for row in result["rows"] if row.get("part", "all") != "all" and row["seconds"] == 0}
    unused = UNUSED | (SPARSE_ONLY | {"train.py:refresh_pairs"} if result["settings"]["run"] == "run_1" else set())
    named = profile_run.WANTED | profile_run.OTHER | profile_run.DENSE | profile_run.SPARSE
    assert silent <= {part for part, names in named.items() if set(names) <= unused}
    assert any(part.startswith("SAE: dense") for part in named.keys() - silent)


def test_what_a_built_in_function_calls_is_not_its_own():
    profile = cProfile.Profile()
    profile.runcall(sorted, [1, 2], key=lambda n: time.sleep(0.05) or n)
    assert profile_run.seconds_of(profile, ["~:<built-in method builtins.sorted>"]) < 0.04
    assert profile_run.seconds_of(profile, ["~:<built-in method time.sleep>"]) >= 0.1


def test_own_seconds_are_with_built_in_and_without_python_functions(result):
    own = [row for row in result["rows"] if "part" not in row]
    whole = next(row["seconds"] for row in result["rows"] if row.get("part") == "all")
    assert [row["seconds"] for row in own] == sorted((row["seconds"] for row in own), reverse=True)
    assert 0 < sum(row["seconds"] for row in own) <= whole
