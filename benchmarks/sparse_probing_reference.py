"""SAEBench's half of sparse_probing.py, run inside its own environment: `python sparse_probing_reference.py FOLDER`.

It calls SAEBench's `run_eval_single_dataset` with an empty cache; in place of running the language model it is handed
the token activations, in memory. Phases are timed by wrapping SAEBench's functions.
"""

import importlib.metadata
import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import sae_bench.evals.sparse_probing.main as main
import torch
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_lens import SAE
from safetensors.torch import load_file

SECONDS = {"encode and pool": 0.0, "full probes": 0.0, "top-k probes": 0.0}


def timed(function, phase):
    """The function, its time added to a phase."""

    def wrapped(*arguments, **options):
        start = time.monotonic()
        result = function(*arguments, **options)
        name = phase(options) if callable(phase) else phase
        SECONDS[name] += time.monotonic() - start
        return result

    return wrapped


def token_activations(job):
    """split -> class -> activations [texts, context, D], zero where there is no content token."""
    files = sorted(Path(job["store"]).glob("*.safetensors"))
    width = load_file(files[0])["acts_NLD"].shape[-1]
    texts = job["classes"] * (job["train"] + job["test"])
    acts_BLD, used_B = torch.zeros(texts, job["context"], width), torch.ones(texts, dtype=torch.int64)
    for file in files:
        shard = load_file(file)
        owners, counts = shard["text_N"].unique_consecutive(return_counts=True)
        rows = zip(owners.tolist(), shard["acts_NLD"][:, 0].split(counts.tolist()), strict=True)
        for owner, acts_ND in rows:
            acts_BLD[owner, used_B[owner] : used_B[owner] + len(acts_ND)] = acts_ND
            used_B[owner] += len(acts_ND)
    classes = job["classes"]
    parts = acts_BLD.split([job["train"]] * classes + [job["test"]] * classes)
    names = [str(label) for label in range(classes)]
    return dict(zip(names, parts[:classes], strict=True)), dict(zip(names, parts[classes:], strict=True))


def run(folder: Path) -> None:
    """Time, memory and accuracies of one dataset."""
    job = json.loads((folder / "job.json").read_text())
    sae = SAE.load_from_disk(str(folder / "sae"))
    config = SparseProbingEvalConfig(model_name="none", random_seed=job["seed"], k_values=job["ks"])
    config.llm_batch_size, config.llm_dtype = 1, "float32"
    given = token_activations(job)
    main.get_dataset_activations = lambda *_arguments: given
    activations, training = main.activation_collection, main.probe_training
    for name in ("create_meaned_model_activations", "get_sae_meaned_activations"):
        setattr(activations, name, timed(getattr(activations, name), "encode and pool"))
    training.train_probe_on_activations = timed(
        training.train_probe_on_activations,
        lambda options: "full probes" if options["select_top_k"] is None else "top-k probes",
    )
    torch.manual_seed(job["seed"])
    start = time.monotonic()
    _, accuracies = main.run_eval_single_dataset(
        "dataset", config, sae, SimpleNamespace(), 0, "blocks.0.hook_resid_post", "cpu", str(folder / "none"), False
    )
    SECONDS["total"] = time.monotonic() - start
    result = {
        "seconds": SECONDS,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "accuracies": accuracies,
        "versions": {name: importlib.metadata.version(name) for name in ("sae-bench", "torch", "scikit-learn")},
    }
    (folder / "sae_bench.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve())
