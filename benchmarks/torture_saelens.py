"""The same kills for FIPO and for SAELens' own resume, in one table: what does each lose?

    python -m benchmarks.torture_saelens [--saelens PYTHON] [--runs N] [--seed N] [--json OUT]

Both train a small BatchTopK SAE on the same random GPT-NeoX and the same text, write as many checkpoints, and are
stopped at the same planned moments of training: SIGKILL, SIGTERM and SIGINT at any moment, SIGKILL between two changes
of the file system while a checkpoint is written. Then they are started again, SAELens from the newest checkpoint there
is (from the one before it where that fails to load, from nothing where there is none), and their final weights compared
with those of a run of the same seed that was never stopped. SAELens runs twice: as it comes, and without mixing and
with a buffer of one batch, so that no activation waits in memory. `--saelens` names the Python of an environment with
it (`make torture-saelens` builds one); without it FIPO runs alone. benchmarks/journal.py defines what is counted.
"""

import itertools
import json
import os
import random
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks import torture  # first: it sets the environment
from benchmarks.common import arguments, command, program, publish
from benchmarks.journal import ASKED, Attempt, Journal, account, distance, read_journal
from fipo import checkpoint, loop
from fipo.checkpoint import load_tensors
from fipo.provenance import versions

tiny = torture.tiny
SIZES = {
    **{"width": tiny.WIDTH, "layer": 1, "latents": 64, "k": 4, "context": 16, "buffer": 256},
    **{"batch": 32, "tokens": 1920, "learning_rate": 0.003, "checkpoints": 8},
}
STEPS = SIZES["tokens"] // SIZES["batch"]
HOWS = {"SIGKILL at any moment": 3, "SIGKILL while saving": 3, "SIGTERM": 2, "SIGINT": 1}
"""Ways to be stopped and how often each is drawn."""
STARTS = 12
"""Of one run, until it counts as one that does not finish."""


class Blow(NamedTuple):
    """A planned stop."""

    how: str
    share: float
    """When: of what is left of the training."""
    delay: float
    """Into the step, in steps."""


class Running(Protocol):
    """A process of a run."""

    pid: int

    def over(self, seconds: float) -> bool:
        """Wait at most so long; has it ended?"""
        ...

    def code(self) -> int | None:
        """Its exit code, once it has ended."""
        ...


class Trainer(Protocol):
    """One of those compared."""

    name: str
    version: str

    def folder(self, number: int) -> Path:
        """A fresh folder for a run."""
        ...

    def start(self, folder: Path, journal: Path, resume: Path | None, die_at: int) -> Running:
        """Start the run in `folder`, or go on with it."""
        ...

    def newest(self, folder: Path, refused: set[Path]) -> Path | None:
        """The checkpoint that has to be named to go on; None where none is, or none must be named."""
        ...

    def weights(self, folder: Path) -> Path:
        """The SAE that a finished run leaves."""
        ...

    def log(self, folder: Path) -> bytes | None:
        """Its training log without times; None where it keeps none."""
        ...


class Child:
    """A process of ours."""

    def __init__(self, pid: int) -> None:
        self.pid, self._code = pid, None

    def over(self, seconds: float) -> bool:
        """Wait at most so long; has it ended?"""
        until = time.monotonic() + seconds
        while self._code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self._code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= until:
                return False
            else:
                time.sleep(0.001)
        return True

    def code(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._code


class Fipo:
    """`experiment.py`, which finds its checkpoints itself."""

    name, version = "fipo", versions()["fipo-sae"]

    def __init__(self, root: Path, workload: Path) -> None:
        self.root, self.workload = root, workload

    def folder(self, number: int) -> Path:
        """A fresh folder with its config: a checkpoint every seven steps."""
        return torture.fresh(self.root, "run_6", number)

    def start(self, folder: Path, journal: Path, resume: Path | None, die_at: int) -> Running:
        """The same command every time."""
        return Child(torture.launch(folder, "run_6", self.workload, lambda: listen(Journal(journal, folder, die_at))))

    def newest(self, folder: Path, refused: set[Path]) -> Path | None:
        """Nothing has to be named."""
        return None

    def weights(self, folder: Path) -> Path:
        """In SAELens' format."""
        return folder / "run_6" / f"layer_{SIZES['layer']}" / "sae_weights.safetensors"

    def log(self, folder: Path) -> bytes | None:
        """Loss and all else by step."""
        return torture.timeless(folder / "run_6" / loop.LOG)


def listen(journal: Journal) -> None:
    """Have this process, a run of FIPO, tell its journal. A row is named by its bits."""
    build, step, save = loop.build_all, loop.train_step, checkpoint.save_checkpoint

    def built(*given: Any) -> Any:
        buffer, states = build(*given)
        state = states[SIZES["layer"]]
        moments = list(state.optimizer.state.values())
        journal.begin(state.step, counter=state.step, adam=int(moments[0]["step"]) if moments else 0)
        return buffer, states

    def stepped(state: Any, acts_BD: Any) -> Any:
        report = step(state, acts_BD)
        journal.stepped([row_D.numpy().tobytes().hex() for row_D in acts_BD])
        return report

    def saved(folder: Path, after: int, *given: Any) -> None:
        with journal.saving(after):
            save(folder, after, *given)

    loop.build_all, loop.train_step, checkpoint.save_checkpoint = built, stepped, saved


class Worker:
    """SAELens' environment: benchmarks/saelens_resume.py."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("saelens_resume.py")
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.version = self.line()

    def line(self) -> str:
        """The next answer."""
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().decode().strip()
        if not answer:
            raise SystemExit("error: SAELens' environment does not work; see above")
        return answer

    def waits(self, seconds: float) -> bool:
        """Is there an answer within so long?"""
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def order(self, order: dict[str, Any]) -> "Ordered":
        """Start a run."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return Ordered(self, int(self.line()))


class Ordered:
    """A process of the worker's."""

    def __init__(self, worker: Worker, pid: int) -> None:
        self.pid, self._worker, self._code = pid, worker, None

    def over(self, seconds: float) -> bool:
        """Wait at most so long; has it ended?"""
        if self._code is None and self._worker.waits(seconds):
            self._code = int(self._worker.line())
        return self._code is not None

    def code(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._code


class SAELens:
    """Its runner; every start has a folder of checkpoints of its own, and the one to go on from has to be named."""

    def __init__(self, root: Path, worker: Worker, shuffled: bool) -> None:
        self.root, self.worker, self.shuffled, self.version = root, worker, shuffled, worker.version
        self.name = "saelens" if shuffled else "saelens_unshuffled"

    def folder(self, number: int) -> Path:
        """A fresh folder."""
        folder = self.root / f"{self.name}_{number}"
        folder.mkdir()
        return folder

    def start(self, folder: Path, journal: Path, resume: Path | None, die_at: int) -> Running:
        """As its documentation says: the same config with `resume_from_checkpoint`."""
        order = {"folder": str(folder), "journal": str(journal), "die_at": die_at, "shuffled": self.shuffled}
        order |= {"resume": resume and str(resume), "sizes": SIZES}
        order |= {"model": str(self.root / "gpt_neox"), "contexts": str(self.root / "contexts.json")}
        return self.worker.order(order)

    def newest(self, folder: Path, refused: set[Path]) -> Path | None:
        """Of all starts' checkpoints, named by tokens, the one after the most, and the last written of those."""
        held = [path for path in folder.glob("checkpoints/*/*") if path not in refused]
        return max(held, key=lambda path: (int(path.name), path.stat().st_mtime_ns), default=None)

    def weights(self, folder: Path) -> Path:
        """Its SAE for inference."""
        return folder / "output" / "sae_weights.safetensors"

    def log(self, folder: Path) -> bytes | None:
        """It logs to W&B alone."""
        return None


class Outcome(NamedTuple):
    """One run with all its starts."""

    attempts: list[Attempt]
    weights: dict[str, Any] | None
    """None for a run that did not finish."""
    log: bytes | None


def prepare(root: Path) -> Path:
    """Model, text and labels on disk, and the text as token ids for SAELens; returns FIPO's workload.

    Each of SAELens' contexts begins with a token of its own, so that no two rows of activations are alike.
    """
    workload = root / "workload.yaml"
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        return workload
    text = tiny.sentences(500, seed=1)
    tiny.write_parquet(root / "text" / "train.parquet", {"text": text})
    model, labels = tiny.save_model(root / "gpt_neox", "gpt_neox"), [tiny.write_labelled(root / "topics")]
    changes = {name: SIZES[name] for name in ("latents", "k", "context", "learning_rate")}
    changes |= {"layers": [SIZES["layer"]], "batch_tokens": SIZES["batch"], "train_tokens": SIZES["tokens"]}
    values = tiny.workload_values(model, root / "text", labels, packed=True, cached=False, **changes)
    values["text"]["buffer_tokens"] = SIZES["buffer"]
    tiny.write_workload(workload, values)
    tokenizer = torture.AutoTokenizer.from_pretrained(model)
    ids = [token for line in text for token in [tokenizer.eos_token_id, *tokenizer(line)["input_ids"]]]
    size = SIZES["context"] - 1
    contexts = [
        [first, *ids[first * size : (first + 1) * size]] for first in range(min(len(tokenizer), len(ids) // size))
    ]
    (root / "contexts.json").write_text(json.dumps(contexts), encoding="utf-8")
    os._exit(0)


def plan(runs: int, chance: random.Random) -> list[list[Blow]]:
    """One to four stops a run, the same for all that are compared."""

    def blow() -> Blow:
        return Blow(chance.choices(list(HOWS), list(HOWS.values()))[0], chance.random(), chance.random())

    return [[blow() for _ in range(chance.randint(1, 4))] for _ in range(runs)]


def run(trainer: Trainer, number: int, blows: Sequence[Blow], like: Attempt | None) -> Outcome:
    """One run, stopped as planned and started until it ends. `like`: an uninterrupted one."""
    folder, attempts, refused = trainer.folder(number), list[Attempt](), set[Path]()
    left = list(blows)
    while len(attempts) < STARTS and not (attempts and attempts[-1].code == 0):
        resume = trainer.newest(folder, refused)
        journal = folder / f"journal_{len(attempts)}.jsonl"
        blow = left[0] if left else None
        held = max([0, *(step for attempt in attempts for step in attempt.saved)])
        running = trainer.start(folder, journal, resume, changes_until(blow, held, like))
        sent = strike(running, journal, blow, like)
        if not running.over(torture.PATIENCE):
            os.kill(running.pid, signal.SIGKILL)
            running.over(torture.PATIENCE)
        code = running.code()
        if blow and blow.how == "SIGKILL while saving" and code == -signal.SIGKILL:
            sent = blow.how
        attempts.append(read_journal(journal, sent, code))
        if attempts[-1].begin is None:
            if resume is None:
                raise SystemExit(f"error: {trainer.name} does not train; see {folder / 'said.txt'}")
            refused.add(resume)
        else:
            left = left[1:]
    weights = trainer.weights(folder)
    if attempts[-1].code != 0 or not weights.exists():
        return Outcome(attempts, None, None)
    return Outcome(attempts, load_tensors(weights), trainer.log(folder))


def changes_until(blow: Blow | None, held: int, like: Attempt | None) -> int:
    """Changes of the file system in checkpoints until the blow; -1 for one that does not fall there.

    `held`: the step of the last checkpoint there is; those that an uninterrupted run writes after it are still to come.
    """
    if blow is None or like is None or blow.how != "SIGKILL while saving":
        return -1
    to_come = sum(step > held for step in like.saved)
    return 1 + int(blow.share * like.changes * max(1, to_come) / len(like.saved))


def strike(running: Running, journal: Path, blow: Blow | None, like: Attempt | None) -> str | None:
    """Send the blow's signal where it is one from outside; returns how the run was stopped, None where it was not."""
    if blow is None or like is None or blow.how == "SIGKILL while saving":
        return None
    target = None
    while not running.over(0.001):
        told = journal.read_bytes() if journal.exists() else b""
        if target is None and b'"begin"' in told:
            begin = read_journal(journal).begin
            assert begin is not None
            target = int(blow.share * (STEPS - begin))
        if target is not None and told.count(b'"event": "step"') >= target:
            if running.over(blow.delay * like.seconds):
                return None
            os.kill(running.pid, getattr(signal, blow.how.split()[0]))
            return blow.how
    return None


def lost(outcomes: Sequence[Outcome], whole: Sequence[Outcome]) -> dict[str, Any]:
    """What a trainer has lost in all its runs, against its uninterrupted ones."""
    reference = whole[0]
    assert reference.weights is not None
    losses = [account(outcome.attempts, reference.attempts[-1]) for outcome in outcomes]
    attempts = [attempt for outcome in outcomes for attempt in outcome.attempts]
    finished = [outcome for outcome in outcomes if outcome.weights is not None]
    distances = [far(outcome, reference) for outcome in finished]
    logs = [outcome.log != reference.log for outcome in finished]
    found: dict[str, Any] = {
        "uninterrupted runs that differ from each other": sum(not same(one, reference) for one in whole),
        "runs": len(outcomes),
        "tokens of training in them": len(outcomes) * SIZES["tokens"],
        "kills": sum(attempt.stopped is not None for attempt in attempts),
        **{how: sum(attempt.stopped == how for attempt in attempts) for how in HOWS},
        "kills that fell into a checkpoint": sum(bool(attempt.stopped) and attempt.in_save for attempt in attempts),
        "runs with other final weights": sum(not same(outcome, reference) for outcome in finished),
        "largest relative distance of W_dec": max(distances, default=None),
        "mean relative distance of W_dec": statistics.fmean(distances) if distances else None,
        "runs with another log": None if reference.log is None else sum(logs),
    }
    for key, name in COUNTED.items():
        found[name] = sum(loss[key] for loss in losses)
    codes = {how: {str(attempt.code) for attempt in attempts if attempt.stopped == how} for how in ASKED}
    return found | {f"exit code after {how}": ", ".join(sorted(found)) or None for how, found in codes.items()}


COUNTED = {
    "unfinished": "runs that did not finish",
    "tokens_lost": "tokens never trained on",
    "tokens_twice": "tokens trained on once more",
    "steps_again": "steps done again",
    "steps_again_asked": "of these after SIGTERM and SIGINT",
    "unsaved_stops": "SIGTERM and SIGINT that lost steps",
    "unloadable": "checkpoints that do not load",
    "checkpoints_lost": "starts before a complete checkpoint",
    "superfluous": "superfluous checkpoints",
    "counter_off": "starts with a wrong count of steps",
    "optimizer_off": "starts without the optimizer's state",
}


def same(one: Outcome, other: Outcome) -> bool:
    """Are all final weights equal, to the bit?"""
    assert one.weights is not None and other.weights is not None
    return one.weights.keys() == other.weights.keys() and all(
        one.weights[name].equal(other.weights[name]) for name in one.weights
    )


def far(one: Outcome, other: Outcome) -> float:
    """Relative distance of the decoders."""
    assert one.weights is not None and other.weights is not None
    return distance(one.weights["W_dec"], other.weights["W_dec"])


def main() -> int:
    """Kill, compare, publish."""
    given = arguments(__doc__, saelens="", runs=10, seed=0)
    if given.saelens:
        program(given.saelens, "--saelens", "`make torture-saelens` builds an environment with it")
    root = Path(tempfile.mkdtemp(prefix="fipo_torture_"))
    trainers: list[Trainer] = [Fipo(root, prepare(root))]
    if given.saelens:
        worker = Worker(given.saelens)
        trainers += [SAELens(root, worker, True), SAELens(root, worker, False)]
    numbers, blows = itertools.count(), plan(given.runs, random.Random(given.seed))
    losses: dict[str, dict[str, Any]] = {}
    for trainer in trainers:
        whole = [run(trainer, next(numbers), (), None) for _ in range(2)]
        outcomes = []
        for planned in blows:
            outcomes.append(run(trainer, next(numbers), planned, whole[0].attempts[-1]))
            sys.stderr.write(f"{trainer.name}: {len(outcomes)} of {len(blows)} runs\n")
        losses[trainer.name] = {"version": trainer.version, **lost(outcomes, whole)}
    rows = [{"what": what, **{name: found[what] for name, found in losses.items()}} for what in losses["fipo"]]
    publish("torture_saelens", rows, ratios(losses), given.json)
    if not (losses["fipo"][COUNTED["unfinished"]] or losses["fipo"]["runs with other final weights"]):
        shutil.rmtree(root)
        return 0
    return 1


def ratios(losses: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The rows that judge, the rival's with its name before them. `lost`: runs without an end, checkpoints not used."""
    judged = {
        "kills": "kills",
        "different": "runs with other final weights",
        "relative_distance": "largest relative distance of W_dec",
        **COUNTED,
    }
    found = {}
    for trainer, numbers in losses.items():
        before = "" if trainer == "fipo" else f"{trainer}_"
        found |= {before + key: numbers[name] for key, name in judged.items() if numbers[name] is not None}
        found[f"{before}lost"] = found[f"{before}unfinished"] + found[f"{before}checkpoints_lost"]
    return found


if __name__ == "__main__":
    sys.exit(command(main))
