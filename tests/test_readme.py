"""README.md: what it names is there, and what it shows runs."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch
import toys

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_commands_files_and_runs_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, re.MULTILINE)) <= targets
    for name in re.findall(r"-m benchmarks\.([a-z_]+)", TEXT):
        assert (ROOT / "benchmarks" / f"{name}.py").is_file(), name
    for path in re.findall(r"`((?:fipo|docs|benchmarks|experiments)/[\w./]*)`", TEXT):
        assert (ROOT / path.replace("run_i", "run_0")).exists(), path
    runs = re.findall(r"^\| `(run_\d)` \|", TEXT, re.MULTILINE)
    assert runs == sorted(path.stem for path in (ROOT / "experiments").glob("run_*.yaml"))


@pytest.mark.parametrize("method", ["FIPO", "Matryoshka", "OrtSAE", "BatchTopK"])
def test_the_first_table_is_that_of_the_result_file(method):
    rows = json.loads((ROOT / "docs" / "results" / "ground_truth.json").read_text())["rows"]
    mine = [row for row in rows if row["method"] == method.lower() and row["k"] == 16]
    assert sorted(row["seed"] for row in mine) == [1, 2, 3]
    shown = re.search(rf"^\| {method}(?: \(`run_6`\))? \| (.*) \|$", TEXT, re.MULTILINE)[1].split(" | ")
    for cell, name in zip(shown, ("f1", "mcc", "explained_variance", "absorption"), strict=True):
        assert cell == f"{statistics.mean(row[name] for row in mine):.3f}".removeprefix("0"), name


def test_training_on_activations_of_ones_own(tmp_path, monkeypatch):
    """The second Python example, on fewer tokens; the first then reads what it saved."""
    monkeypatch.chdir(tmp_path)
    loading, training = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    given = {"activations": torch.cat(toys.planted(20, width=32))}
    exec(training.replace("400_000", "8_000"), given)
    assert given["state"].step == given["workload"].steps > 3
    exec(loading.replace("run_6/layer_3", "my_sae"), given)
    assert given["codes"].shape == (len(given["activations"]), 1024)
    assert (given["codes"] > 0).sum(1).double().mean() == pytest.approx(16, rel=0.5)
