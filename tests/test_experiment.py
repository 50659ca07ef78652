"""`python experiment.py` as the user starts it: exit codes, one line of error, nothing left behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parent.parent


def start(*arguments, cache, **environment):
    """Run the script as a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "experiment.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"FIPO_CACHE": str(cache), "OMP_NUM_THREADS": "1"} | environment,
    )


def assert_refused(result, *words):
    """Exit code 2, one line that says why, and no traceback."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and result.stdout == "", result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def workload(tmp_path_factory, model_folder, text_folder, labelled_folders):
    values = tiny.workload_values(model_folder("bert"), text_folder, labelled_folders[:1])
    return str(tiny.write_workload(tmp_path_factory.mktemp("workload") / "tiny.yaml", values))


def test_a_whole_run_and_then_a_refusal(tmp_path, workload, own_cache):
    out_dir = tmp_path / "run_2"
    result = start(f"--out_dir={out_dir}", cache=own_cache, FIPO_WORKLOAD=workload)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    assert "topics" in result.stdout and "mean max cosine" in result.stdout and "training: done" in result.stderr
    before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    assert (out_dir / "final_info.json").is_file() and len(before) >= 12
    again = start(f"--out_dir={out_dir}", cache=own_cache, FIPO_WORKLOAD=workload)
    assert_refused(again, "run_2 holds a finished run, which is never overwritten", "name another folder or remove it")
    assert {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")} == before


def test_unknown_run(tmp_path, own_cache):
    assert_refused(start(f"--out_dir={tmp_path / 'run_99'}", cache=own_cache), "run 'run_99' is unknown", "run_0")
    assert list(tmp_path.iterdir()) == []


def test_unknown_workload(tmp_path, own_cache):
    result = start(f"--out_dir={tmp_path / 'run_0'}", cache=own_cache, FIPO_WORKLOAD="gpt9")
    assert_refused(result, "workload 'gpt9' is unknown", "FIPO_WORKLOAD takes minilm")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written(tmp_path, workload, own_cache):
    """Below a regular file nobody can write, not even root."""
    (tmp_path / "file").write_text("content")
    result = start(f"--out_dir={tmp_path / 'file' / 'run_0'}", cache=own_cache, FIPO_WORKLOAD=workload)
    assert_refused(result, "cannot write to", "file/run_0", "choose another --out_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "content" and list(own_cache.iterdir()) == []


def test_hub_out_of_reach(tmp_path, own_cache):
    """The built-in pythia-70m with HF_HUB_OFFLINE=1."""
    result = start(
        f"--out_dir={tmp_path / 'run_0'}", cache=own_cache, FIPO_WORKLOAD="pythia-70m", HF_HOME=str(own_cache)
    )
    assert_refused(result, "model EleutherAI/pythia-70m-deduped cannot be fetched: the hub is out of reach")
    assert list(tmp_path.iterdir()) == []


def test_missing_out_dir(own_cache):
    result = start(cache=own_cache)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and "the following arguments are required: --out_dir" in errors[0]


def test_no_other_argument(own_cache):
    result = start("--help", cache=own_cache)
    assert result.returncode == 0 and "--out_dir" in result.stdout and "FIPO_WORKLOAD" in result.stdout
    assert set(re.findall(r"--\w+", result.stdout)) == {"--help", "--out_dir"}
