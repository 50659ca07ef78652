"""benchmarks.profile_run: the parts of a run add up, and each is a function that a run calls."""

import json
import sys

import pytest
import tiny

from benchmarks import profile_run

UNUSED = {"activations.py:largest", "loop.py:save", "tokenization_utils_base.py:__call__"}
"""Other architectures' and longer runs' functions, and those of tokenisers of other kinds."""


@pytest.fixture
def result(tmp_path, model_folder, text_folder, labelled_folders, monkeypatch):
    values = tiny.workload_values(model_folder("bert"), text_folder, labelled_folders[:1])
    workload = tiny.write_workload(tmp_path / "tiny.yaml", values)
    for name in ("FIPO_CACHE", "FIPO_WORKLOAD"):
        monkeypatch.setenv(name, "restored afterwards")
    monkeypatch.setattr(
        sys, "argv", ["profile_run", "--workload", str(workload), "--json", str(tmp_path / "result.json")]
    )
    profile_run.main()
    return json.loads((tmp_path / "result.json").read_text())


def test_the_parts_add_up_to_the_whole(result):
    *parts, rest, whole = result["rows"]
    assert rest["seconds"] >= 0, "two of the functions call each other"
    assert sum(row["seconds"] for row in parts) + rest["seconds"] == pytest.approx(whole["seconds"])
    wanted = sum(row["share"] for row in parts if row["wanted"])
    assert result["ratios"]["wanted_share"] == pytest.approx(wanted) and 0 < wanted < 1


def test_every_part_names_functions_that_a_run_calls(result):
    silent = [row["part"] for row in result["rows"][:-2] if row["seconds"] == 0]
    expected = [
        part
        for part, names in (profile_run.WANTED | profile_run.OTHER).items()
        if set(names) <= UNUSED | {"screen.py:_left"}
    ]
    assert set(silent) <= set(expected)
