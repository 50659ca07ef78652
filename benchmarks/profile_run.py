"""Where does a cold run spend its time?

    python -m benchmarks.profile_run --json OUT.json [--run run_6] [--workload minilm]

Runs the experiment once, with an empty cache, while a second thread looks every few milliseconds where the first one
is (cProfile would slow small functions down, and so find them slower than they are). A moment belongs to the innermost
function that is named here, hence to one part alone. What is wanted of a run is the language model's forward pass, the
products of the SAE and the probing fits: `ratios.wanted_share` is their share of the whole.
"""

import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

from benchmarks.common import arguments, command, publish
from fipo import job, runs

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
EVERY = 0.005
"""Seconds between two looks."""
BACKWARD = "graph.py:_engine_run_backward"
"""The backward pass but for our own functions in it: of dense codes its products, of sparse ones what is left."""
WANTED = {
    "LM forward": ["lm.py:activations"],
    "SAE: encoder product": ["sae.py:pre_codes", "sparse.py:affine"],
    "SAE: sparse products (decode, levels, gradients, Ω)": [
        *("sparse.py:sum_rows", "sparse.py:row_products", "loss.py:nested_error"),
    ],
    "probing: product of the screen": ["screen.py:_left"],
    "probing: selection and fits": ["probing.py:sparse_probes", "probing.py:full_accuracies"],
}
DENSE = {"SAE: dense decode": ["decoding.py:decode"], "SAE: dense backward": [BACKWARD]}
SPARSE = {"step: rest of the backward pass": [BACKWARD]}
OTHER = {
    "step: search of the largest": ["search.py:largest_of_batch", "search.py:largest_of_rows"],
    "step: pairs sorted by latent and by level": ["sparse.py:grouped"],
    "step: levels, without Numba": ["reconstruction.py:passes"],
    "step: candidate pairs": ["train.py:refresh_pairs"],
    "step: reservoir and revival": ["reservoir.py:offer", "train.py:revive_dead"],
    "step: gradient norm and optimiser": ["update.py:update"],
    "step: importance": ["importance.py:collect", "importance.py:commit", "importance.py:values"],
    "step: weights in bfloat16": ["sparse.py:working", "sparse.py:working_times"],
    "step: everything else": ["train.py:train_step"],
    "log and measures": ["log.py:log_line", "log.py:append_log", "job.py:measure"],
    "shuffle buffer": ["buffer.py:next_batch"],
    "checkpoints": ["loop.py:save"],
    "activations on disk: checked, written, read": ["harvest.py:_check_finite", "store.py:_harvest", "store.py:read"],
    "training texts read and told apart": ["sae_probes.py:_training_texts"],
    "tokenising": ["lm.py:token_rows", "lm.py:packed_rows"],
    "probing: codes of a text summed": ["pooling.py:pool"],
    "probing: thresholds and places of codes": ["screen.py:__call__", "controls.py:codes"],
    "probing: everything else": ["evaluate.py:probe"],
    "set-up: model, texts, imports": ["lm.py:__init__", "labelled.py:load_all"],
    "page": ["job.py:show"],
    "picture and tables": ["report.py:draw", "job.py:finish"],
}


def sampled(work: Callable[[], object], every: float) -> Counter[tuple[str, ...]]:
    """Seconds of this thread in every stack of functions, `file:function` from the outermost on, while it works."""
    ours, done = threading.get_ident(), threading.Event()
    stacks: Counter[tuple[str, ...]] = Counter()
    labels: dict[CodeType, str] = {}

    def look() -> None:
        before = time.perf_counter()
        while not done.wait(every):
            stack = stack_of(sys._current_frames()[ours], labels)
            now = time.perf_counter()
            stacks[stack] += now - before
            before = now

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        work()
    finally:
        done.set()
        looking.join()
    return stacks


def stack_of(frame: FrameType | None, labels: dict[CodeType, str]) -> tuple[str, ...]:
    """The functions that a frame is in, from the outermost on; `labels` holds those named before."""
    names = []
    while frame is not None:
        code = frame.f_code
        if code not in labels:
            labels[code] = f"{Path(code.co_filename).name}:{code.co_name}"
        names.append(labels[code])
        frame = frame.f_back
    return tuple(reversed(names))


def by_part(stacks: Counter[tuple[str, ...]], parts: dict[str, list[str]]) -> Counter[str]:
    """Seconds of every part: of a stack the part of the innermost function that has one."""
    part_of = {name: part for part, names in parts.items() for name in names}
    seconds: Counter[str] = Counter()
    for stack, spent in stacks.items():
        part = next((part_of[name] for name in reversed(stack) if name in part_of), None)
        if part is not None:
            seconds[part] += spent
    return seconds


def by_function(stacks: Counter[tuple[str, ...]], files: set[str]) -> Counter[str]:
    """Seconds of every function in these files, each moment given to the innermost of them."""
    seconds: Counter[str] = Counter()
    for stack, spent in stacks.items():
        inner = next((name for name in reversed(stack) if name.partition(":")[0] in files), None)
        if inner is not None:
            seconds[inner] += spent
    return seconds


def main() -> None:
    """Run, add up and publish."""
    given = arguments(__doc__, run="run_6", workload="minilm")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ |= {"FIPO_CACHE": f"{temporary}/cache", "FIPO_WORKLOAD": given.workload}
        out_dir = Path(temporary) / given.run
        dense = not runs.resolve(out_dir, EXPERIMENTS).budgeted
        started = time.perf_counter()
        stacks = sampled(lambda: job.run(out_dir, EXPERIMENTS), EVERY)
        whole = time.perf_counter() - started
    wanted, other = WANTED | (DENSE if dense else {}), OTHER | ({} if dense else SPARSE)
    seconds = by_part(stacks, wanted | other)
    rows = [
        {"part": part, "seconds": seconds[part], "share": seconds[part] / whole, "wanted": part in wanted}
        for part in wanted | other
    ]
    rest = whole - seconds.total()
    rows.append({"part": "everything else", "seconds": rest, "share": rest / whole, "wanted": False})
    rows.append({"part": "all", "seconds": whole, "share": 1.0, "wanted": None})
    ours = {path.name for path in Path(job.__file__).parent.rglob("*.py")}
    rows += [
        {"function, with what it calls of others": name, "seconds": spent, "share": spent / whole}
        for name, spent in by_function(stacks, ours).most_common(20)
    ]
    share = sum(seconds[part] for part in wanted) / whole
    settings = {"run": given.run, "workload": given.workload, "seconds between looks": EVERY}
    publish("profile_run", rows, {"wanted_share": share}, given.json, settings)


if __name__ == "__main__":
    sys.exit(command(main))
