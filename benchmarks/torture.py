"""A small real run, killed at random moments and started again, and one whose disk fails: what is lost?

    python benchmarks/torture.py --json OUT [--kills N] [--faults N] [--seed N] [--only run_3]

The whole command runs (harvest, training, checkpoints, probing, report) on tiny random models, in a process of its own
that is killed with SIGKILL at a random moment of a phase or between any two changes of the file system, or asked to
stop with SIGTERM and SIGINT, several times over. Then it is left to finish, and every file it leaves, the activations
in its cache as well, must equal those of a run never interrupted, to the byte; only time stamps, durations and ids may
differ. Faults are writes that fail when they are flushed: disk full, I/O error, a file cut short with or without an
error. `different`: runs that end in other bytes. `lost`: runs that do not end, that begin again before a checkpoint
that was complete, or that leave anything but one clear line.
"""

import argparse
import errno
import itertools
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import datasets  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import pyarrow.parquet  # noqa: E402, F401
import rich.console  # noqa: E402, F401
import rich.table  # noqa: E402, F401
import tiny  # noqa: E402
import yaml  # noqa: E402
from transformers import AutoModel, AutoTokenizer, BertModel, GPTNeoXModel  # noqa: E402, F401

import experiment  # noqa: E402
from benchmarks.common import command, publish, ready  # noqa: E402
from benchmarks.journal import WATCHED  # noqa: E402
from fipo import checkpoint, job, loop  # noqa: E402
from fipo.data import shards  # noqa: E402
from fipo.data.store import UNFINISHED  # noqa: E402
from fipo.errors import UserError  # noqa: E402

PHASES = ("set-up", "harvest", "training", "checkpointing", "probing", "reporting")
TIMES = {
    *("eval_id", "datetime_epoch_millis", "tokens_per_second", "set_up", "harvest", "training", "probing", "page"),
    *("peak_memory_gib", "harvested"),
}
"""Keys of JSON files that name times, durations, ids or what depends on them."""
PATIENCE = 900.0
KINDS = ("disk full", "I/O error", "short write", "short write, not told")


class Board:
    """What a run tells about itself, in memory that survives it."""

    FIELDS = ("phase", "step", "first", "saved", "changes", "flushes")

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8 * len(self.FIELDS))

    def __getattr__(self, name: str) -> int:
        return struct.unpack_from("q", self._shared, 8 * self.FIELDS.index(name))[0]

    def put(self, **values: int) -> None:
        """Set fields."""
        for name, value in values.items():
            struct.pack_into("q", self._shared, 8 * self.FIELDS.index(name), value)


class Victim(NamedTuple):
    """A kind of run, and what an uninterrupted one is like."""

    run: str
    workload: Path
    reference: dict[str, bytes]
    seconds: dict[str, float]
    """In each phase."""
    changes: int
    """Of the file system."""
    flushed: list[str]
    """Names of the files flushed to the disk, in order."""


Fault = Callable[[int, str], None]
"""Called before each flush with the open file and its name."""


def start(board: Board, folder: Path, run: str, workload: Path, *, die_at: int = -1, fault: Fault | None = None) -> int:
    """The command, watched; returns its process. `die_at`: changes of the file system until SIGKILL."""
    board.put(phase=0, step=0, first=-1, changes=0, flushes=0)
    return launch(folder, run, workload, lambda: watch(board, str(folder), die_at, fault))


def launch(folder: Path, run: str, workload: Path, first: Callable[[], None]) -> int:
    """The command in a process of its own, which calls `first` before; returns its number."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        with open(folder / "said.txt", "a", encoding="utf-8") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        os.environ |= {"FIPO_CACHE": str(folder / "cache"), "FIPO_WORKLOAD": str(workload)}
        first()
        sys.argv = ["experiment.py", f"--out_dir={folder / run}"]
        code = experiment.main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def watch(board: Board, folder: str, die_at: int, fault: Fault | None) -> None:
    """Have the run tell its phase, steps and changes; kill it or fail its writes where that is wanted."""

    def changed(event: str, given: tuple[Any, ...]) -> None:
        if event not in WATCHED or not str(given[0]).startswith(folder):
            return
        if event == "open" and not (isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        board.put(changes=board.changes + 1)
        if board.changes == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def during(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def told(*given: Any, **named: Any) -> Any:
            before = board.phase
            board.put(phase=PHASES.index(phase))
            result = function(*given, **named)
            board.put(phase=before)
            return result

        return told

    def train_step(state: Any, acts_BD: Any, step: Callable[..., Any] = loop.train_step) -> Any:
        if board.first < 0:
            board.put(first=state.step)
        result = step(state, acts_BD)
        board.put(step=state.step)
        return result

    def save(place: Path, step: int, *given: Any, write: Callable[..., Any] = checkpoint.save_checkpoint) -> None:
        write(place, step, *given)
        board.put(saved=step)

    def fsync(opened: int, flush: Callable[[int], None] = os.fsync) -> None:
        name = os.readlink(f"/proc/self/fd/{opened}")
        board.put(flushes=board.flushes + 1)
        if fault is not None:
            fault(opened, name)
        flush(opened)

    shards.SHARD_TOKENS = 50  # several a harvest, so that one that is killed has some to go on with
    loop.train_step, os.fsync = train_step, fsync
    checkpoint.save_checkpoint = during("checkpointing", save)
    job.training_activations = during("harvest", job.training_activations)
    job.train_all = during("training", job.train_all)
    job.probe = during("probing", job.probe)
    job.report.draw = during("reporting", job.report.draw)
    job.show = during("reporting", job.show)
    job.finish = during("reporting", job.finish)
    sys.addaudithook(changed)


def wait(child: int, board: Board, spent: dict[str, float] | None = None) -> int | None:
    """Exit code, negative for a signal; None for a run that does not end. Counts the seconds of each phase."""
    started = last = time.monotonic()
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if spent is not None:
            phase = PHASES[board.phase]
            spent[phase] = spent.get(phase, 0.0) + now - last
        if now - started > PATIENCE:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        last = now
        time.sleep(0.0005)


def prepare(root: Path, only: str | None) -> list[tuple[str, Path]]:
    """Models, text, labels and two workloads on disk: one from a cache, one straight from the model."""
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        made = [("run_3", root / "stored.yaml"), ("run_6", root / "live.yaml")]
        return [pair for pair in made if only in (None, pair[0])]
    tiny.write_parquet(root / "text" / "train.parquet", {"text": tiny.sentences(150, seed=1)})
    labels = [tiny.write_labelled(root / "topics")]
    for name, architecture, changes in (
        ("stored", "bert", {}),
        ("live", "gpt_neox", {"packed": True, "cached": False, "train_tokens": 1920}),
    ):
        model = tiny.save_model(root / architecture, architecture)
        tiny.write_workload(root / f"{name}.yaml", tiny.workload_values(model, root / "text", labels, **changes))
    os._exit(0)


def fresh(root: Path, run: str, number: int) -> Path:
    """A folder for a run of its own, with a cache of its own."""
    folder = root / f"trial_{number}"
    (folder / run).mkdir(parents=True)
    often = {"log_every": 3, "checkpoint_every": 7, "checkpoint_share": 1e9}
    (folder / run / "config.yaml").write_text(yaml.safe_dump(often), encoding="utf-8")
    return folder


def leftovers(folder: Path) -> dict[str, bytes]:
    """All files of run and cache by name, without what names times."""
    return {
        str(path.relative_to(folder)): timeless(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "said.txt"
    }


def timeless(path: Path) -> bytes:
    """Bytes of a file; of JSON without the values that name times."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in TIMES}
        return [strip(item) for item in value] if isinstance(value, list) else value

    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        return "\n".join(json.dumps(strip(json.loads(line))) for line in lines).encode()
    return content


def reference(root: Path, run: str, workload: Path, number: int) -> Victim:
    """One run without interruption."""
    board, folder, spent = Board(), fresh(root, run, number), {}
    names = folder / "flushed.txt"

    def note(_opened: int, name: str) -> None:
        with open(names, "a", encoding="utf-8") as noted:
            noted.write(name + "\n")

    code = wait(start(board, folder, run, workload, fault=note), board, spent)
    if code != 0:
        raise SystemExit(f"the uninterrupted run ended with {code}: {(folder / 'said.txt').read_text()}")
    flushed = names.read_text(encoding="utf-8").splitlines()
    names.unlink()
    return Victim(run, workload, leftovers(folder), spent, board.changes, flushed)


class Trial:
    """One run that is hindered, started again as often as it takes, and compared."""

    def __init__(self, root: Path, victim: Victim, number: int) -> None:
        self.victim, self.board, self.folder = victim, Board(), fresh(root, victim.run, number)
        self.lost: list[str] = []

    def attempt(self, **hindrance: Any) -> int:
        """Start the command; the number of its process."""
        return start(self.board, self.folder, self.victim.run, self.victim.workload, **hindrance)

    def check_start(self, saved: int) -> None:
        """The attempt before had saved the state after step `saved`."""
        if 0 <= self.board.first < saved:
            self.lost.append(f"began again at step {self.board.first} though step {saved} was saved")

    def finish(self) -> bool:
        """Start the command a last time; did all end in the same bytes? What is lost is noted."""
        saved = self.board.saved
        if not (self.folder / self.victim.run / "final_info.json").exists():
            code = wait(self.attempt(), self.board)
            self.check_start(saved)
            if code != 0:
                self.lost.append(f"ended with {code}")
        elif wait(self.attempt(), self.board) != 2:  # a finished run is refused, and tidied up
            self.lost.append("a finished run was not refused")
        said = (self.folder / "said.txt").read_text(encoding="utf-8", errors="replace")
        lines = ["", *said.splitlines()]
        for before, line in itertools.pairwise(lines):  # a destructor that meets a half-made object is no concern
            if line.startswith("Traceback") and not before.startswith("Exception ignored in"):
                self.lost.append(f"traceback: {lines[-1]}")
        found, expected = leftovers(self.folder), self.victim.reference
        names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if names:
            sys.stderr.write(f"{self.folder} differs in {', '.join(names)}\n")
        for line in self.lost:
            sys.stderr.write(f"{self.folder}: {line}\n")
        if not names and not self.lost:
            shutil.rmtree(self.folder)
        return not names


def interrupt(trial: Trial, chance: random.Random) -> tuple[str, str] | None:
    """Start the command and stop it somewhere; (phase, how), or None when it was done before."""
    victim, board = trial.victim, trial.board
    if (trial.folder / victim.run / "final_info.json").exists():
        return None
    saved, how = board.saved, chance.choices(("between changes", "SIGKILL", "SIGTERM", "SIGINT"), (4, 3, 2, 1))[0]
    if how == "between changes":
        code = wait(trial.attempt(die_at=chance.randint(1, victim.changes)), board)
    else:
        target = chance.randrange(1, len(PHASES))
        delay = chance.uniform(0, victim.seconds.get(PHASES[target], 0.0))
        code = strike(trial.attempt(), board, target, delay, getattr(signal, how))
    phase = PHASES[board.phase]
    trial.check_start(saved)
    if code == 0:
        return None
    if how in ("SIGTERM", "SIGINT"):
        number = getattr(signal, how)
        if code not in (128 + number, -number):
            trial.lost.append(f"{how} in {phase}: exit code {code}")
        if code == 128 + number and phase in ("training", "checkpointing") and board.saved < board.step:
            trial.lost.append(f"{how} in {phase}: step {board.step} done, step {board.saved} saved")
    elif code != -signal.SIGKILL:
        trial.lost.append(f"SIGKILL in {phase}: exit code {code}")
    return phase, how


def strike(child: int, board: Board, target: int, delay: float, number: int) -> int | None:
    """Send the signal some time after the phase has begun, or when it is past; the exit code."""
    started = time.monotonic()
    while board.phase < target and time.monotonic() - started < PATIENCE:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return wait(child, board)
        time.sleep(0.0002)
    time.sleep(delay)
    if not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        os.kill(child, number)
    return wait(child, board)


def failing(kind: str, number: int) -> Fault:
    """The flush of that number fails, or the file is cut short, which is told or is not."""
    count, on_disk = itertools.count(1), {}

    def fault(_opened: int, name: str) -> None:
        size = os.stat(name).st_size
        if next(count) != number:
            on_disk[name] = size
            return
        if kind in ("short write", "short write, not told"):
            kept = on_disk.get(name, 0)  # of a file that grows, what was flushed before stays
            os.truncate(name, kept + (size - kept) // 2)
        if kind != "short write, not told":
            code = errno.ENOSPC if kind == "disk full" else errno.EIO
            raise OSError(code, os.strerror(code))

    return fault


def fault_plan(victims: list[Victim], count: int, chance: random.Random) -> list[tuple[Victim, str, int, str]]:
    """(victim, kind, number of the flush, what is written): every kind of file with every kind of fault in turn."""
    by_file: dict[str, list[tuple[Victim, str, int, str]]] = {}
    for victim in victims:
        places: dict[str, list[int]] = {}
        for number, name in enumerate(victim.flushed, 1):
            places.setdefault(what_is(name), []).append(number)
        for what, kind in itertools.product(places, KINDS):
            folder, silent = what.endswith("/"), kind.endswith("not told")
            if (folder and kind.startswith("short")) or (silent and what not in ("shard", "state.safetensors")):
                continue  # nobody can know of it until it is read
            by_file.setdefault(what, []).append((victim, kind, chance.choice(places[what]), what))
    for points in by_file.values():
        chance.shuffle(points)
    in_turn = itertools.zip_longest(*by_file.values())
    return [point for points in in_turn for point in points if point is not None][:count]


def what_is(name: str) -> str:
    """Kind of a file by its name."""
    path = Path(name)
    if path.name.startswith("shard_"):
        return "shard"
    if path.name.endswith(UNFINISHED):
        return "store/"
    if path.suffix == ".tmp":  # .NAME.PROCESS.tmp
        inner = re.sub("^[0-9a-f]{32}", "pooled", path.name[1:].rsplit(".", 2)[0])
        return inner if "." in inner else "checkpoint/"
    return path.name if path.suffix else "folder/"


def main() -> int:
    """Kill, fail, compare, write the numbers."""
    parser = argparse.ArgumentParser(description="Kill a small run at random moments; is anything lost?")
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("run_3", "run_6"), help="one kind of run in place of two")
    arguments = parser.parse_args()
    if min(arguments.kills, arguments.faults) < 0 or arguments.kills + arguments.faults < 1:
        raise UserError(f"--kills and --faults are {arguments.kills} and {arguments.faults}; expected some of either")
    ready(arguments.json)
    chance = random.Random(arguments.seed)
    root = Path(tempfile.mkdtemp(prefix="fipo_torture_"))
    numbers = itertools.count()
    victims = [reference(root, run, workload, next(numbers)) for run, workload in prepare(root, arguments.only)]
    kills: dict[tuple[str, str], int] = {}
    lost = different = runs = 0
    while sum(kills.values()) < arguments.kills:
        trial = Trial(root, victims[runs % len(victims)], next(numbers))
        for _ in range(min(chance.randint(1, 5), arguments.kills - sum(kills.values()))):
            if (hit := interrupt(trial, chance)) is None:
                break
            kills[hit] = kills.get(hit, 0) + 1
        different += not trial.finish()
        lost, runs = lost + len(trial.lost), runs + 1
        sys.stderr.write(f"{sum(kills.values())} kills, {runs} runs, {different} different, {lost} lost\n")
    faults = []
    for victim, kind, number, what in fault_plan(victims, arguments.faults, chance):
        trial = Trial(root, victim, next(numbers))
        code = wait(trial.attempt(fault=failing(kind, number)), trial.board)
        goes_on = what in ("state.safetensors", "checkpoint.json", "checkpoint/")
        if code not in ((0, 2) if goes_on or what == "folder/" else (2,)):
            trial.lost.append(f"{kind} at {what}: exit code {code}")
        if kind.endswith("not told") and goes_on:
            trial.board.put(saved=0)  # it believed it had saved
        different += not trial.finish()
        lost += len(trial.lost)
        faults.append({"fault": kind, "at": what, "run": victim.run, "exit_code": code, "lost": len(trial.lost)})
        sys.stderr.write(f"{len(faults)} faults, {different} different, {lost} lost\n")
    rows = [{"phase": phase, "how": how, "kills": count} for (phase, how), count in sorted(kills.items())]
    rows += faults
    ratios = {"kills": sum(kills.values()), "different": different, "lost": lost, "write_faults": len(faults)}
    publish("torture", rows, ratios, arguments.json)
    if not different and not lost:
        shutil.rmtree(root)
    return 1 if different or lost else 0


if __name__ == "__main__":
    sys.exit(command(main))
