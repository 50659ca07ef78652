"""What a benchmark is given in vain: one line and exit code 2, before anything is measured; and what is kept."""

import json
import subprocess
import sys

import pytest

from benchmarks import (
    absorption,
    common,
    ground_truth,
    lsh,
    omega,
    reservoir,
    sparse_probing,
    torture_saelens,
    train_step,
)
from fipo import cli, provenance
from fipo.config import LSH
from fipo.errors import UserError

SMALL = ["--features", "64", "--steps", "2", "--k", "3", "--tokens", "500", "--methods", "batchtopk"]


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        (absorption, ["run_6", "--tokens", "0"], "--tokens is 0"),
        (absorption, ["run_6", "--json", "."], "--json . is a folder"),
        (reservoir, ["--batch", "0"], "--batch is 0"),
        (reservoir, ["--json", "/proc/none/x.json"], "cannot write to /proc/none"),
        (omega, ["--seeds", "0"], "--seeds is 0"),
        (omega, ["--wide", "257"], "--wide is 257"),
        (train_step, ["--shapes", "minilm,nope"], "--shapes nope is unknown"),
        (train_step, ["--rounds", "0"], "--rounds is 0"),
        (train_step, ["--rivals", "/none/python"], "--rivals /none/python is no program"),
        (torture_saelens, ["--saelens", "/none/python"], "--saelens /none/python is no program"),
        (torture_saelens, ["--runs", "0"], "--runs is 0"),
        (sparse_probing, ["--json", "x.json", "--python", "/none/python"], "--python /none/python is no program"),
        (ground_truth, ["--json", "x.json", "--seeds", "1", "1"], "--seeds is"),
        (ground_truth, ["--json", "/proc/none/x.json"], "cannot write to /proc/none"),
        (ground_truth, ["--json", "."], "--json . is a folder"),
        (sparse_probing, ["--json", "x.json", "--train", "1"], "--train is 1; expected at least 2"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_measured(module, arguments, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(UserError, match=said):
        module.main()


def test_a_user_s_error_is_one_line_and_code_2(capsys):
    def refused():
        raise UserError("no")

    assert common.command(refused) == 2 and capsys.readouterr().err == "error: no\n"
    assert common.command(lambda: None) == 0 and common.command(lambda: 1) == 1


def test_a_judge_that_fails_costs_no_measurement(monkeypatch, tmp_path):
    out = tmp_path / "result.json"
    arguments = ["--json", str(out), *SMALL, "--seeds", "1", "--judge", "false"]
    arguments += ["--save", str(tmp_path / "saes"), "--truth", str(tmp_path / "truth.safetensors")]
    monkeypatch.setattr(sys, "argv", ["ground_truth.py", *arguments])
    with pytest.raises(UserError, match="--judge false ended with 1"):
        ground_truth.main()
    assert [row["seed"] for row in json.loads(out.read_text())["rows"]] == [1]


@pytest.mark.parametrize("quick", ["--quick", "--qui"])
def test_quick_is_a_small_run_unless_told_otherwise(quick, monkeypatch, tmp_path):
    class Asked(Exception):
        pass

    def the_truth(features, *_of):
        raise Asked(features)

    monkeypatch.setattr(ground_truth, "the_truth", the_truth)
    for more, features in (([], 1024), (["--features", "512"], 512)):
        monkeypatch.setattr(sys, "argv", ["ground_truth.py", "--json", str(tmp_path / "x.json"), quick, *more])
        with pytest.raises(Asked, match=str(features)):
            ground_truth.main()


def test_the_rival_of_topk_is_heapq_at_its_fastest():
    row = reservoir._row("what", 10, {"heapq": 2.0, "heapq, keys drawn in Python": 1.0, "topk": 0.5})
    assert row["times faster"] == 2.0


def test_the_projection_is_measured_at_the_defaults():
    assert f"T={LSH().tables} S={LSH().bits_of(1024)}" in lsh.row(1024, 32)["shape"]


def test_a_changed_or_new_benchmark_makes_the_revision_dirty(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)

    for name in ("fipo/provenance.py", "benchmarks/one.py", "LOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-mx")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "fipo" / "provenance.py"))
    (tmp_path / "LOG.md").write_text("changed")
    assert len(provenance.git_revision()) == 40
    (tmp_path / "benchmarks" / "two.py").touch()
    assert provenance.git_revision().endswith("-dirty")
    (tmp_path / "benchmarks" / "two.py").unlink()
    (tmp_path / "benchmarks" / "one.py").write_text("changed")
    assert provenance.git_revision().endswith("-dirty")


def test_the_commit_is_not_that_of_a_repository_around_an_installed_package(tmp_path, monkeypatch):
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-mx"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    (tmp_path / "fipo").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "fipo" / "provenance.py"))
    assert provenance.git_revision() == "Unknown"


@pytest.mark.parametrize("missing", ["yaml", "fipo.data.gone"])
def test_fipo_without_its_extra_says_what_is_missing(missing, monkeypatch, capsys):
    def imports(_given):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(cli, "_compare", imports)
    if missing.startswith("fipo"):
        with pytest.raises(ModuleNotFoundError):
            cli.main(["compare", "run_1"])
        return
    assert cli.main(["compare", "run_1"]) == 2
    assert "yaml is not installed; `fipo compare` needs fipo-sae[run]" in capsys.readouterr().err
