"""benchmarks/journal.py: what interrupted runs have lost, on made-up histories; and FIPO's own column of the table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.journal import Attempt, account, distance, read_journal, trained

NOTHING = dict.fromkeys(
    (
        *("tokens_lost", "tokens_twice", "steps_again", "steps_again_asked", "unsaved_stops", "checkpoints_lost"),
        *("unloadable", "superfluous", "counter_off", "optimizer_off", "unfinished"),
    ),
    0,
)


def attempt(begin, rows, saved=(), stopped=None, code=0, **changes):
    """A start after `begin` steps; `rows`: one letter a row, two a step."""
    steps = [list(rows[place : place + 2]) for place in range(0, len(rows), 2)]
    made = Attempt(begin, begin, begin, steps, list(saved), False, 0, 0.0, stopped, code)
    return made._replace(**changes)


WHOLE = attempt(0, "abcdefgh", [2])


@pytest.mark.parametrize(
    ("attempts", "losses"),
    [
        ([WHOLE], {}),
        ([attempt(0, "abcdef", [2], "SIGKILL", -9), attempt(2, "efgh")], {"steps_again": 1}),
        ([attempt(0, "abcd", [2], "SIGTERM", 143), attempt(2, "efgh")], {}),
        ([attempt(0, "abcdef", [2, 3], "SIGTERM", 143), attempt(3, "gh")], {}),  # it was asked to save
        ([attempt(0, "abcdef", [2, 3], "SIGKILL", -9), attempt(3, "gh")], {"superfluous": 1}),
        (
            [attempt(0, "abcdef", [2], "SIGINT", 1), attempt(2, "efgh")],
            {"steps_again": 1, "steps_again_asked": 1, "unsaved_stops": 1},
        ),
        ([attempt(0, "abcd", [2], "SIGKILL", -9), attempt(2, "ijgh")], {"tokens_lost": 2}),
        ([attempt(0, "abcd", [2], "SIGKILL", -9), attempt(2, "cdgh")], {"tokens_lost": 2, "tokens_twice": 2}),
        (
            [attempt(0, "abcd", [2], "SIGKILL", -9), attempt(0, "abcdefgh", [2])],
            {"steps_again": 2, "checkpoints_lost": 1},
        ),
        (
            [attempt(0, "abcdef", [2], "SIGKILL", -9), attempt(None, "", code=1), attempt(2, "efgh")],
            {"steps_again": 1, "unloadable": 1},
        ),
        ([attempt(0, "abcd", [2], "SIGKILL", -9), attempt(2, "efgh", counter=1)], {"counter_off": 1}),
        ([attempt(0, "abcd", [2], "SIGKILL", -9), attempt(2, "efgh", adam=0)], {"optimizer_off": 1}),
        ([attempt(0, "abcdefgh", [2], code=1)], {"unfinished": 1}),
        ([attempt(0, "abcdef", [2])], {"unfinished": 1, "tokens_lost": 2}),
    ],
)
def test_what_is_lost_is_counted(attempts, losses):
    assert account(attempts, WHOLE) == NOTHING | losses


def test_a_start_forgets_the_steps_after_its_own():
    starts = [attempt(0, "abcdef"), attempt(None, ""), attempt(1, "ij"), attempt(2, "kl")]
    assert trained(starts) == [["a", "b"], ["i", "j"], ["k", "l"]]
    with pytest.raises(AssertionError):
        trained([attempt(0, "ab"), attempt(2, "cd")])


def test_what_was_told_is_read_again(tmp_path):
    program = (
        "import sys; from pathlib import Path; from benchmarks.journal import Journal\n"
        "folder = Path(sys.argv[1]); journal = Journal(folder / 'journal', folder, int(sys.argv[2]))\n"
        "(folder / 'not_saving').mkdir(exist_ok=True)\n"
        "journal.begin(5, counter=4, adam=5); journal.stepped(['a', 'b'])\n"
        "with journal.saving(6): (folder / sys.argv[3]).mkdir(); (folder / 'file').write_text('whole')\n"
        "journal.stepped(['c', 'd'])\n"
    )

    def told(die_at, name):
        (tmp_path / "journal").unlink(missing_ok=True)
        command = [sys.executable, "-c", program, str(tmp_path), str(die_at), name]
        code = subprocess.run(command, cwd=Path(__file__).parent.parent, check=False, timeout=60).returncode
        return read_journal(tmp_path / "journal", "SIGKILL", code)

    whole = told(-1, "one")
    assert whole[:7] == (5, 4, 5, [["a", "b"], ["c", "d"]], [6], False, 2) and whole.code == 0 and whole.reached == 7
    assert whole.seconds > 0
    (tmp_path / "file").unlink()
    killed = told(2, "two")
    assert killed[:7] == (5, 4, 5, [["a", "b"]], [], True, 0) and killed.code == -9
    assert (tmp_path / "two").exists() and not (tmp_path / "file").exists()
    with open(tmp_path / "journal", "a", encoding="utf-8") as torn:
        torn.write('{"event": "saved", "st')
    assert read_journal(tmp_path / "journal").saved == []
    assert read_journal(tmp_path / "none").begin is None


def test_a_failed_checkpoint_does_not_count(tmp_path):
    program = (
        "import sys; from pathlib import Path; from benchmarks.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), Path(sys.argv[1]).parent)\n"
        "with journal.saving(6): raise OSError\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "journal")]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False, timeout=60
    )
    assert "OSError" in done.stderr and read_journal(tmp_path / "journal").saved == []


def test_distance_is_relative():
    matrix_FD = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert distance(matrix_FD, matrix_FD) == 0
    assert distance(matrix_FD * 1.1, matrix_FD) == pytest.approx(0.1)


def test_our_column_of_the_table(tmp_path):
    out = tmp_path / "numbers.json"
    command = [sys.executable, "-m", "benchmarks.torture_saelens", "--runs", "1", "--json", str(out)]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["ratios"]
    again = found.pop("steps_again")
    assert found.pop("kills") > 0 and again >= 0
    assert set(found.values()) == {0} and {"different", "lost", "tokens_lost", "relative_distance"} <= found.keys()
