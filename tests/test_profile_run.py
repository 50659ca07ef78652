"""benchmarks.profile_run: the parts of a run add up, each names functions that there are, a moment has one part."""

import ast
import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny

from benchmarks import profile_run


@pytest.fixture(params=["run_6", "run_1"])
def result(request, tmp_path, model_folder, text_folder, labelled_folders, monkeypatch):
    values = tiny.workload_values(model_folder("bert"), text_folder, labelled_folders[:1])
    workload = tiny.write_workload(tmp_path / "tiny.yaml", values)
    for name in ("FIPO_CACHE", "FIPO_WORKLOAD"):
        monkeypatch.setenv(name, "restored afterwards")
    arguments = ["--run", request.param, "--workload", str(workload), "--json", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", ["profile_run", *arguments])
    monkeypatch.setattr(profile_run, "EVERY", 0.0005)
    profile_run.main()
    return json.loads((tmp_path / "result.json").read_text())


def test_the_parts_add_up_to_the_whole(result):
    *parts, rest, whole = [row for row in result["rows"] if "part" in row]
    assert sum(row["seconds"] for row in parts) + rest["seconds"] == pytest.approx(whole["seconds"])
    assert 0 <= rest["share"] < 0.5 and all(row["seconds"] >= 0 for row in parts)
    wanted = sum(row["share"] for row in parts if row["wanted"])
    assert result["ratios"]["wanted_share"] == pytest.approx(wanted) and 0 < wanted < 1
    seen = {row["part"] for row in parts if row["seconds"]}
    assert len(seen) > 5 and "set-up: model, texts, imports" in seen  # what takes no millisecond may be missed
    assert (result["settings"]["run"] == "run_1") == any(row["part"].startswith("SAE: dense") for row in parts)
    functions = [row for row in result["rows"] if "part" not in row]
    assert len(functions) == 20 and functions[0]["seconds"] >= functions[-1]["seconds"] > 0


def test_every_part_names_functions_that_there_are():
    sources = Path(profile_run.job.__file__).parent.rglob("*.py")
    defined = {
        f"{path.name}:{node.name}"
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    named = [*profile_run.WANTED.values(), *profile_run.OTHER.values(), *profile_run.DENSE.values()]
    names = [name for part in named for name in part]
    assert set(names) - defined == {profile_run.BACKWARD} and len(names) == len(set(names))


def inner():
    time.sleep(0.15)


def outer():
    time.sleep(0.15)
    inner()


def test_a_moment_belongs_to_the_innermost_part():
    stacks = profile_run.sampled(outer, 0.002)
    here = "test_profile_run.py"
    seconds = profile_run.by_part(stacks, {"in": [f"{here}:inner"], "out": [f"{here}:outer"]})
    assert seconds["in"] == pytest.approx(0.15, abs=0.05) and seconds["out"] == pytest.approx(0.15, abs=0.05)
    assert profile_run.by_part(stacks, {"out": [f"{here}:outer"]})["out"] == pytest.approx(0.3, abs=0.08)
    assert profile_run.by_function(stacks, {here}).keys() >= {f"{here}:inner", f"{here}:outer"}


def test_parts_of_given_stacks():
    stacks = Counter({("a.py:f", "b.py:g"): 2.0, ("a.py:f",): 1.0, ("c.py:h",): 4.0})
    assert profile_run.by_part(stacks, {"x": ["a.py:f"], "y": ["b.py:g", "d.py:k"]}) == {"x": 1.0, "y": 2.0}
    assert profile_run.by_function(stacks, {"a.py", "c.py"}) == {"a.py:f": 3.0, "c.py:h": 4.0}
