"""benchmarks/results.py and the tables of benchmarks/common.py: a page comes from result files, and whole."""

import json
from pathlib import Path

import pytest

from benchmarks import common, results
from fipo.errors import UserError

ROOT = Path(__file__).parent.parent
MADE_UP = {
    "name": "juggling",
    "hardware": {"cpu": "Abacus", "cores": 2, "threads": 1, "gpu": "Steam 9"},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "git_revision": "abc-dirty",
    "settings": {"kind": "prediction"},
    "rows": [{"ball": "red", "ms": 1234.5678, "n": None}, {"ball": "a|b", "ms": 0.00012345}, {"hat": 3, "ms": 12}],
    "ratios": {"red_vs_blue": 5.4321},
}


@pytest.fixture
def write(tmp_path):
    def written(file, **changes):
        path = tmp_path / f"{file}.json"
        path.write_text(json.dumps(MADE_UP | changes))
        return path

    return written


def test_a_section_shows_all_that_the_file_says(write):
    text = results.section(write("juggling"))
    assert text.startswith("## juggling\n")
    assert "- hardware: Abacus, 2 cores, 1 thread, Steam 9\n" in text
    assert "- revision: abc-dirty\n- versions: python 3.11.7, torch 2.13.0\n- kind: prediction\n" in text
    assert "| red_vs_blue | 5.432 |" in text
    assert "| ball | ms | n |\n|---|---|---|\n| red | 1,235 | - |\n| a\\|b | 0.0001234 | - |\n" in text
    assert text.endswith("\n\n| hat | ms |\n|---|---|\n| 3 | 12 |"), "other rows have a table of their own"


def test_files_come_in_the_order_of_their_names(write):
    text = results.page([write("z", name="last"), write("a", name="first")])
    assert text.startswith("# Results") and text.index("## first") < text.index("## last")


def test_a_file_of_another_kind_is_refused(tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.json"
    other.write_text('{"name": "x", "rows": []}')
    with pytest.raises(UserError, match="other.json is no result of a benchmark: it has no hardware, versions"):
        results.section(other)
    monkeypatch.setattr("sys.argv", ["results", str(other)])
    assert results.main() == 2 and capsys.readouterr().err.startswith("error: ")
    with pytest.raises(UserError, match="no result file"):
        results.page([])


def test_what_is_published_can_be_shown(tmp_path, capsys):
    common.publish("made up", [{"a": 1, "b": 2.5}], {"ratio": 2.0}, tmp_path / "x.json", {"kind": "toy"})
    assert "kind: toy" in capsys.readouterr().out
    text = results.section(tmp_path / "x.json")
    assert "## made up" in text and "- kind: toy" in text and "| 1 | 2.5 |" in text


def test_the_page_in_the_repository_is_that_of_its_files():
    """After a new result file: `make results`."""
    files = sorted((ROOT / "docs" / "results").glob("*.json"))
    assert (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8") == results.page(files)
