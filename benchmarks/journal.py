"""What a run tells while it trains, and what a series of interrupted runs has lost against one never interrupted.

A journal is a file of JSON lines that outlives the process: where training began, the rows of every step, every
checkpoint. A row is named by what it is (its bits, or the tokens that it comes from), so that a row met twice is known
again. Runs in the environment of either side: standard library and torch alone.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

WATCHED = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"}
"""Events of Python's audit hooks that change the file system."""
ASKED = ("SIGTERM", "SIGINT")


class Journal:
    """Tells; and kills its process at a wanted change of the file system during a checkpoint."""

    def __init__(self, path: Path, folder: Path, die_at: int = -1) -> None:
        """`die_at`: changes in `folder` while saving until SIGKILL."""
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._folder, self._die_at = str(folder), die_at
        self._saving, self._changes = False, 0
        os.nice(5)  # whoever stops the process comes first, on a single core too, so its moment is not the process's
        sys.addaudithook(self._changed)

    def _changed(self, event: str, given: tuple[Any, ...]) -> None:
        if not self._saving or event not in WATCHED or not str(given[0]).startswith(self._folder):
            return
        if event == "open" and not (isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        self._changes += 1
        if self._changes == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(self, event: str, **values: Any) -> None:
        """Add a line."""
        line = json.dumps({"event": event, "at": time.monotonic(), **values})
        os.write(self._file, line.encode() + b"\n")

    def begin(self, step: int, counter: int, adam: int) -> None:
        """Training goes on after `step` steps, of which the run counts `counter` and its optimizer `adam`."""
        self.tell("begin", step=step, counter=counter, adam=adam)

    def stepped(self, rows: Sequence[str]) -> None:
        """One step is done, on these rows."""
        self.tell("step", rows=list(rows))

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """A checkpoint of the state after `step`; it counts when the block is left in good order."""
        self._saving, before = True, self._changes
        self.tell("saving", step=step)
        try:
            yield
        finally:
            self._saving = False
        self.tell("saved", step=step, changes=self._changes - before)


class Attempt(NamedTuple):
    """One start of a run, from its journal, and how it ended."""

    begin: int | None
    """Steps done before; None where it never came to train."""
    counter: int | None
    """The run's own count of steps then."""
    adam: int | None
    """Adam's count of steps then."""
    rows: list[list[str]]
    """Of each step."""
    saved: list[int]
    """Steps of which a checkpoint was completed."""
    in_save: bool
    """Did it end while a checkpoint was written?"""
    changes: int
    """Of the file system, while saving."""
    seconds: float
    """A step."""
    stopped: str | None = None
    """By which signal."""
    code: int | None = None
    """Exit code, negative for a signal that killed; None for a process that did not end."""

    @property
    def reached(self) -> int:
        """Steps done at the end."""
        return (self.begin or 0) + len(self.rows)


def read_journal(path: Path, stopped: str | None = None, code: int | None = None) -> Attempt:
    """What a process told; a last line that is not whole is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    told = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    begin = next((event for event in told if event["event"] == "begin"), {})
    steps = [event for event in told if event["event"] == "step"]
    saves = [event for event in told if event["event"] == "saved"]
    return Attempt(
        begin=begin.get("step"),
        counter=begin.get("counter"),
        adam=begin.get("adam"),
        rows=[event["rows"] for event in steps],
        saved=[event["step"] for event in saves],
        in_save=bool(told) and told[-1]["event"] == "saving",
        changes=sum(event["changes"] for event in saves),
        seconds=(steps[-1]["at"] - begin["at"]) / len(steps) if begin and steps else 0.0,
        stopped=stopped,
        code=code,
    )


def trained(attempts: Sequence[Attempt]) -> list[list[str]]:
    """Rows of the steps that the final weights have seen: each start forgets the steps after the one it begins at."""
    rows: list[list[str]] = []
    for attempt in attempts:
        if attempt.begin is not None:
            assert attempt.begin <= len(rows), "nobody can go on after a step that was not done"
            rows = rows[: attempt.begin] + attempt.rows
    return rows


def account(attempts: Sequence[Attempt], reference: Attempt) -> dict[str, int]:
    """What one run has lost, in numbers that are 0 where nothing is.

    `tokens_lost`: rows that the uninterrupted run has trained on and this one not; `tokens_twice`: rows trained on
    more often than there. `steps_again`: steps that had to be done again, `steps_again_asked` those after a SIGTERM or
    Ctrl-C. `unsaved_stops`: SIGTERM and Ctrl-C that lost steps. `checkpoints_lost`: starts before a complete
    checkpoint. `unloadable`: starts that failed on a checkpoint. `superfluous`: checkpoints that the uninterrupted run
    does not write and no signal asked for. `counter_off`, `optimizer_off`: starts at which the run's own count of
    steps, or Adam's, is not the number of steps done.
    """
    here, there = Counter(sum(trained(attempts), [])), Counter(sum(reference.rows, []))
    found = dict.fromkeys(
        ("steps_again", "steps_again_asked", "unsaved_stops", "checkpoints_lost", "unloadable", "superfluous"), 0
    )
    found |= {
        "tokens_lost": (there - here).total(),
        "tokens_twice": sum(max(0, count - there[row]) for row, count in here.items() if there[row]),
        "counter_off": sum(attempt.begin != attempt.counter for attempt in attempts),
        "optimizer_off": sum(attempt.begin != attempt.adam for attempt in attempts),
        "unfinished": int(len(trained(attempts)) != len(reference.rows) or attempts[-1].code != 0),
    }
    before: Attempt | None = None
    held = 0
    for attempt in attempts:
        asked_for = attempt.saved[-1:] if attempt.stopped in ASKED else []
        found["superfluous"] += len(set(attempt.saved) - set(reference.saved) - set(asked_for))
        if attempt.begin is None:
            found["unloadable"] += 1
            continue
        if before is not None:
            again = max(0, before.reached - attempt.begin)
            asked = before.stopped in ASKED
            found["steps_again"] += again
            found["steps_again_asked"] += again * asked
            found["unsaved_stops"] += asked and again > 0
        found["checkpoints_lost"] += attempt.begin < held
        held, before = max([attempt.begin, *attempt.saved]), attempt
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative distance of two matrices [F, D]."""
    return ((found - expected).norm() / expected.norm()).item()
