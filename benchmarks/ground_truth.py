"""Which method recovers the features of a known truth? All train in the one trainer, on the same stream of tokens.

    python -m benchmarks.ground_truth --json OUT.json [--methods fipo matryoshka] [--seeds 1 2 3] [--features 4096]

    python -m benchmarks.ground_truth --json OUT.json --merge SEED_1.json SEED_2.json ...

All train by the same schedules (`fipo.schedules`: k falls to its budget from twice as many, by which Matryoshka gains
as well). The truth is SynthSAEBench's in our own generator (`fipo.synthetic`), a quarter as many latents as features.
Truth, data and SAE have streams of chance of their own, and every method of a seed sees the same tokens. Prints one
table, mean ± standard deviation over the seeds, and writes {"name", "hardware", "versions", "rows", "ratios"}. `--judge
PYTHON`, of an environment with sae-lens, adds what SAELens' own evaluation says of the same SAEs on the same tokens.
`--merge` puts the rows of earlier results together, so that seeds can be trained at different times.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command, program, ready
from fipo.checkpoint import load_tensors, save_tensors
from fipo.config import LSH, Importance, Levels, Penalty, Probing, RunConfig, Text, Workload
from fipo.data.prepare import statistics as mean_and_scale
from fipo.errors import UserError
from fipo.export import save_sae
from fipo.files import read_json, write_json
from fipo.graphs import Beside
from fipo.provenance import hardware, provenance
from fipo.randomness import generator_for
from fipo.records import require
from fipo.recovery import Recovery, recovery
from fipo.state import TrainState, build_state
from fipo.synthetic import SyntheticModel, Truth, build
from fipo.train import train_step

Row = dict[str, Any]
JUDGED = {"mcc": "mcc", "explained_variance": "explained_variance"} | {
    name: f"classification.{name_there}"
    for name, name_there in {"f1": "f1_score", "precision": "precision", "recall": "recall"}.items()
}
"""Our measures, and where SAELens' evaluation has them."""

BATCH = 1024
"""Tokens of a step, where nothing else is said."""
DRAWN_AT_ONCE = 16_384
"""Tokens that a GPU draws in one go, where a batch has fewer: drawing is bound by its start."""
ALIKE = (0.0, 0.0, 0.0)
"""No latent is favoured."""
MATRYOSHKA = Levels(
    order="fixed",
    shares=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
    drawn=False,
    short_power=1.0,
    favour=ALIKE,
    stop_gradient=0.0,
    robust=0.0,
    decoder_only=0.0,
)
SIX = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Levels of which the first is not as small."""
PARTS: dict[str, Any] = {"importance": Importance(), "lsh": LSH(), "penalty": Penalty()}

METHODS: dict[str, dict[str, Any]] = {
    "relu": {"architecture": "relu", "sparsity": 0.012},
    "topk": {"architecture": "topk"},
    "jumprelu": {"architecture": "jumprelu", "sparsity": 0.015},
    "batchtopk": {},
    "frozen": {"frozen_decoder": True},
    "ortsae": {"penalty": Penalty(kind="ortsae", weight=0.1, every=1)},
    "omega": PARTS,
    "matryoshka": {"levels": MATRYOSHKA},
    "prefixes": {
        "importance": Importance(decay=0.95, norm="l2"),
        "levels": replace(MATRYOSHKA, order="importance", shares=Levels().shares, drawn=True),
    },
    "favour": {"importance": Importance(), "levels": Levels(shares=(1.0,), robust=0.0, decoder_only=0.0)},
    "favour_matryoshka": {"importance": Importance(), "levels": replace(MATRYOSHKA, favour=Levels().favour)},
    "six": PARTS | {"levels": Levels(shares=SIX)},
    "unsettled": PARTS | {"levels": Levels(shares=SIX, decoder_only=0.0)},
    "unfavoured": PARTS | {"levels": Levels(favour=ALIKE)},
    "levels": {"importance": Importance(), "levels": Levels()},
    "fipo": PARTS | {"levels": Levels()},
}
"""What each differs in from BatchTopK. `prefixes` are Nabeshima's (2024): drawn, of latents sorted by an EMA of their
squared norms; there each is drawn by itself, here one draw moves all. `favour` alone, with Matryoshka, and ours without
it; `six` is ours with six levels, `unsettled` that without the last phase. `sparsity` is λ_s, chosen for an L0 near 6
on the model of 1,024 features."""

SETTINGS = ("features", "width", "steps", "batch", "rate", "tokens")
SHOWN = ("mcc", "f1", "precision", "recall", "explained_variance", "absorption", "orphaned", "composition")
SHOWN += ("uniqueness", "mean_max_cosine", "dead_share", "l0", "ms_per_step")


def config_of(
    method: dict[str, Any], latents: int, k: int, steps: int, rate: float, seed: int, batch: int = BATCH
) -> RunConfig:
    """The run of a method."""
    method = dict(method)
    workload = Workload(
        name="synthetic",
        model="none",
        layers=(0,),
        text=Text(source="none", tokens=1, held_out_tokens=2, packed=True),
        probing=Probing(datasets=("none",), ks=(1,)),
        latents=latents,
        k=k,
        sparsity_penalty=method.pop("sparsity", 0.0),
        learning_rate=rate,
        batch_tokens=batch,
        train_tokens=batch * steps,
        dead_tokens=200_000,
    )
    defaults = {"run": "run_x", "seed": seed, "architecture": "batchtopk", "aux_weight": 0.03125, "workload": workload}
    return RunConfig(**(defaults | method))


def train(
    configs: Sequence[RunConfig], truth: SyntheticModel, device: str = "cpu"
) -> list[tuple[TrainState, float | None]]:
    """Train the runs of one seed in step, on the same tokens; gives every state with its seconds of training. On a GPU
    they train beside one another, and none has a time of its own."""
    seed, workload = configs[0].seed, configs[0].workload
    first_BD = truth.sample(50_000, generator_for(seed, "statistics", device=device)).acts_BD
    mean_LD, scale_L = mean_and_scale(first_BD[:, None])
    states = [build_state(config, 0, mean_LD[0], scale_L[0].item(), device) for config in configs]
    lanes, seconds = [Beside(torch.device(device)) for _ in states], [0.0] * len(states)
    generator, batch = generator_for(seed, "data", device=device), workload.batch_tokens
    drawn = batch if device == "cpu" else batch * max(1, DRAWN_AT_ONCE // batch)
    for sample in truth.batches(workload.train_tokens, drawn, generator):
        for acts_BD in sample.acts_BD.split(batch):
            for place, (state, lane) in enumerate(zip(states, lanes, strict=True)):
                started = time.process_time()
                lane.fork()
                with lane.work():
                    train_step(state, acts_BD)
                seconds[place] += time.process_time() - started
            for lane in lanes:
                lane.join()
    return list(zip(states, seconds if device == "cpu" else [None] * len(states), strict=True))


def evaluate(state: TrainState, truth: SyntheticModel, tokens: int, device: str = "cpu") -> Recovery:
    """Recovery on held-out tokens, the same for every seed."""
    samples = list(truth.batches(tokens, 2000, generator_for(0, "held out", device=device)))
    return recovery(state.sae, samples, truth.features_GD, truth.parent_G)


def run(names: Sequence[str], seed: int, truth: SyntheticModel, given: argparse.Namespace) -> Iterator[Row]:
    """The rows of one seed, at every k where there is such a budget; all train in step."""
    latents = len(truth.mean_G) // 4
    pairs = {
        (name, k): config_of(METHODS[name], latents, k, given.steps, given.rate, seed, given.batch)
        for k in given.k
        for name in names
    }
    pairs = {(name, k): config for (name, k), config in pairs.items() if config.budgeted or k == given.k[0]}
    trained = train(list(pairs.values()), truth, given.device)
    for (name, k), (state, seconds) in zip(pairs, trained, strict=True):
        if given.save:
            beside = {"importance_F": state.importance.values()}
            folder = given.save / f"{name}_k{k}_seed{seed}"
            save_sae(folder, state.sae, model="none", layer=0, context=1, dataset="synthetic", beside=beside)
        scores = evaluate(state, truth, given.tokens, given.device)._asdict()
        scores = {key: None if math.isnan(value) else value for key, value in scores.items()}
        time_of_its_own = None if seconds is None else 1000 * seconds / given.steps
        yield {"method": name, "seed": seed, "k": k, **scores, "ms_per_step": time_of_its_own}


def judged(rows: list[Row], python: str, saved: Path, truth: Path, tokens: int) -> None:
    """Put beside every row what SAELens' own evaluation, run by `python`, says of its saved SAE."""
    root = Path(__file__).parent
    folders = [str(saved / f"{row['method']}_k{row['k']}_seed{row['seed']}") for row in rows]
    judge = [python, str(root / "saelens_reference.py"), "judge", *folders]
    judge += ["--truth", str(truth), "--tokens", str(tokens)]
    environment = {**os.environ, "PYTHONPATH": str(root.parent)}
    done = subprocess.run(judge, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"--judge {python} ended with {done.returncode}; what it said stands above")
    for row, folder in zip(rows, folders, strict=True):
        verdict = json.loads(done.stdout)[folder]
        for name, path in JUDGED.items():
            value: Any = verdict
            for key in path.split("."):
                value = value[key]
            row[f"saelens_{name}"] = value


def table(rows: list[Row]) -> str:
    """Mean ± standard deviation over the seeds, one line for each method and k, by method."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["k"]), []).append(row)
    lines = [f"| method | k | seeds | {' | '.join(name.replace('_', ' ') for name in SHOWN)} |"]
    lines.append("|---" * (3 + len(SHOWN)) + "|")
    methods = list(dict.fromkeys(name for name, _ in groups))
    for (name, k), group in sorted(groups.items(), key=lambda one: (methods.index(one[0][0]), one[0][1])):
        cells = []
        for key in SHOWN:
            values = [row[key] for row in group if row.get(key) is not None]  # earlier results have fewer
            if not values:
                cells.append("-")
                continue
            digits = 1 if key in ("l0", "ms_per_step") else 3
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
        lines.append(f"| {name} | {k} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(rows: list[Row], ours: str = "fipo") -> dict[str, float]:
    """How far ours is ahead of each rival, over all k: differences of F1, MCC and explained variance, each also in
    standard errors of the difference over seeds; absorption and composition as a share of the rival's."""
    found: dict[str, float] = {}

    def values(method: str, key: str) -> list[float]:
        """One value a seed."""
        by_seed: dict[int, list[float]] = {}
        for row in rows:
            if row["method"] == method and row[key] is not None:
                by_seed.setdefault(row["seed"], []).append(row[key])
        return [statistics.fmean(of) for of in by_seed.values()]

    rivals = {row["method"] for row in rows} & {"batchtopk", "ortsae", "matryoshka"}
    for rival in sorted(rivals) if values(ours, "f1") else []:
        for key in ("f1", "mcc", "explained_variance"):
            own, other = values(ours, key), values(rival, key)
            ahead = found[f"{key}_ahead_of_{rival}"] = statistics.fmean(own) - statistics.fmean(other)
            if len(own) > 1 and len(other) > 1:
                error = (statistics.variance(own) / len(own) + statistics.variance(other) / len(other)) ** 0.5
                if error > 0:
                    found[f"{key}_ahead_of_{rival}_in_standard_errors"] = ahead / error
        for key in ("absorption", "composition"):
            own, other = values(ours, key), values(rival, key)
            if own and sum(other) > 0:
                found[f"{key}_share_of_{rival}"] = statistics.fmean(own) / statistics.fmean(other)
    gaps = [abs(row[name] - row[f"saelens_{name}"]) for row in rows for name in JUDGED if f"saelens_{name}" in row]
    return found | ({"largest_gap_to_saelens_evaluation": max(gaps)} if gaps else {})


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """Rows of several results as one result; settings must be the same, and no row may come twice. Of results from
    several machines times are left out."""
    results = [read_json(file) for file in files]
    rows: dict[tuple[Any, ...], Row] = {}
    for file, result in zip(files, results, strict=True):
        whole = isinstance(result, dict) and {"settings", "git_revision", "rows", "hardware"} <= result.keys()
        whole = whole and isinstance(result["settings"], dict)
        require(whole, "--merge", str(file), "a result of benchmarks/ground_truth.py")
        result["settings"] = {"batch": BATCH} | result["settings"]  # earlier ones had no other and did not say so
        same = result["settings"] == results[0]["settings"]
        require(same, f"settings of {file}", result["settings"], f"those of {files[0]}")
        for row in result["rows"]:
            key = (row["method"], row["k"], row["seed"])
            require(key not in rows, f"row of {file}", key, "one that no earlier file has")
            rows[key] = row
    revisions = sorted({result["git_revision"] for result in results})
    same = all(result.get("versions") == results[0].get("versions") for result in results)
    require(same, "versions", [result.get("versions") for result in results], "the same of all results")
    machine = results[0]["hardware"]
    if any(result["hardware"] != machine for result in results):
        machine = machine | {"cpu": "; ".join(sorted({result["hardware"]["cpu"] for result in results}))}
        rows = {key: row | {"ms_per_step": None} for key, row in rows.items()}
    return {**results[0], "hardware": machine, "git_revision": ", ".join(revisions), "rows": list(rows.values())}


def the_truth(features: int, width: int, saved: Path | None) -> SyntheticModel:
    """The truth of this size: loaded, or built (and saved where a path is given)."""
    if saved and saved.is_file():
        truth = SyntheticModel(**load_tensors(saved))
        found = tuple(truth.features_GD.shape)
        require(found == (features, width), "--features and --width", (features, width), f"the {found} of {saved}")
        return truth
    truth = build(Truth(features=features, width=width), generator_for(0, "truth"))
    if saved:
        save_tensors(saved, truth.state_dict())
    return truth


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Recovery of known features, by method.")
    parser.add_argument("--json", type=Path, required=True, help="result file")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256, help="D of the activations")
    parser.add_argument("--k", nargs="+", type=int, default=[8, 12, 16, 20], help="active latents a token")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=BATCH, help="tokens of a step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens to evaluate on")
    parser.add_argument("--truth", type=Path, help="where the truth is kept between calls")
    parser.add_argument("--save", type=Path, help="folder for the trained SAEs, in SAELens' format")
    parser.add_argument("--judge", metavar="PYTHON", help="of an environment with sae-lens; needs --save and --truth")
    parser.add_argument(
        "--merge", nargs="+", type=Path, metavar="RESULT", help="results to put together; trains nothing"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="1,024 features at k 6, 2,000 steps, one seed")
    given = parser.parse_args()
    if given.quick:
        parser.set_defaults(features=1024, k=[6], steps=2000, seeds=[1])
        given = parser.parse_args()
    if given.judge and not (given.save and given.truth):
        parser.error("--judge needs --save and --truth, from which SAELens reads")
    if given.judge:
        program(given.judge, "--judge", "give the Python of an environment with sae-lens")
    for name in ("methods", "seeds", "k"):  # a row twice would count as a seed more
        values = getattr(given, name)
        require(len(set(values)) == len(values), f"--{name}", values, "each once")
    require(given.tokens > 1, "--tokens", given.tokens, "at least 2 tokens to evaluate on")
    ready(given.json)
    if given.merge:
        result = merged(given.merge)
        if given.judge:
            judged(result["rows"], given.judge, given.save, given.truth, given.tokens)
        publish(given.json, result)
        return
    truth = the_truth(given.features, given.width, given.truth).to(given.device)
    rows: list[Row] = []
    settings = {name: getattr(given, name) for name in SETTINGS}
    result = {"name": "ground_truth", "settings": settings, "hardware": hardware(given.device), **provenance()}
    for seed in given.seeds:
        for row in run(given.methods, seed, truth, given):
            rows.append(row)
            sys.stderr.write(json.dumps(row) + "\n")
        write(given.json, {**result, "rows": rows})  # what is cut off, or judged in vain, leaves the seeds before
    if given.judge:
        judged(rows, given.judge, given.save, given.truth, given.tokens)
    publish(given.json, {**result, "rows": rows})


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the result with its ratios."""
    write_json(path, {**result, "ratios": ratios(result["rows"])})


def publish(path: Path, result: dict[str, Any]) -> None:
    """The same, and print its table."""
    write(path, result)
    sys.stdout.write(table(result["rows"]) + "\n")


if __name__ == "__main__":
    sys.exit(command(main))
