"""SAEBench's own numbers for a folder of inputs (see check.py), run inside its own environment.

    JAXTYPING_DISABLE=1 HF_HUB_OFFLINE=1 .venv-parity/bin/python reference.py INPUTS

It calls SAEBench's functions and writes what they give: `reference.json` and `reference.safetensors` into INPUTS.
JAXTYPING_DISABLE=1 since its type checks refuse its own probe sets under the beartype that pip resolves.
"""

import contextlib
import copy
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import sae_bench.evals.sparse_probing.main as main
import sae_bench.evals.sparse_probing.probe_training as probe_training
import sae_bench.sae_bench_utils.activation_collection as activation_collection
import sae_bench.sae_bench_utils.dataset_info as dataset_info
import sae_bench.sae_bench_utils.dataset_utils as dataset_utils
import torch
from pydantic import TypeAdapter
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput
from sae_lens import SAE
from safetensors.torch import load_file, save_file


def digest(value) -> str:
    """SHA-256 of a JSON value, as fipo.files.sha256_json computes it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def selected_texts(root: Path, train: int, test: int, seed: int) -> dict:
    """dataset -> split -> class -> digest of its texts, for the eight datasets under `root`."""
    load_dataset = dataset_utils.load_dataset

    def local(name, *arguments, **options):
        if name == "codeparrot/github-code":  # its loading script is not at hand; the files it reads are
            files = sorted(map(str, (root / name).rglob("*.parquet")))
            return load_dataset("parquet", data_files=files, split="train", streaming=True)
        return load_dataset(name, *arguments, **options)

    dataset_utils.load_dataset = local
    found = {}
    with contextlib.chdir(root):
        for name, classes in dataset_info.chosen_classes_per_dataset.items():
            splits = dataset_utils.get_multi_label_train_test_data(name, 2 * train, 2 * test, seed)
            found[name] = {
                split: {label: digest(texts) for label, texts in dataset_utils.filter_dataset(given, classes).items()}
                for split, given in zip(("train", "test"), splits, strict=True)
            }
    dataset_utils.load_dataset = load_dataset
    return found


def pooled(folder: Path, sae, special: dict) -> tuple[dict, dict]:
    """Mask of content tokens, and means over them of activations and codes, in float32 and in bfloat16."""
    given = load_file(folder / "tokens.safetensors")
    mask_BL = activation_collection.get_bos_pad_eos_mask(given["ids_BL"], SimpleNamespace(**special))
    tensors = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        acts = {"all": given["acts_BLD"].to(dtype) * mask_BL[:, :, None]}
        cast = copy.deepcopy(sae).to(dtype=dtype)  # casting there and back would cost its weights their precision
        tensors[f"llm_{name}"] = activation_collection.create_meaned_model_activations(acts)["all"]
        tensors[f"sae_{name}"] = activation_collection.get_sae_meaned_activations(acts, cast, 125)["all"]
    return {"mask": [int(row.sum()) for row in mask_BL], "mask_digest": digest(mask_BL.int().tolist())}, tensors


def probe_sets(cases: list[dict]) -> list[dict]:
    """Row numbers and labels of one-vs-rest sets, drawn one after another from a seed."""
    result = []
    for case in cases:
        starts = [sum(case["sizes"][:place]) for place in range(len(case["sizes"]))]
        numbers = {
            str(label): torch.arange(start, start + size, dtype=torch.float64)[:, None]
            for label, (start, size) in enumerate(zip(starts, case["sizes"], strict=True))
        }
        torch.manual_seed(case["seed"])
        drawn = [probe_training.prepare_probe_data(numbers, label) for label in numbers]
        rows = [acts[:, 0].long().tolist() for acts, _ in drawn]
        labels = [given.tolist() for _, given in drawn]
        result.append({**case, "rows": digest(rows), "labels": digest(labels), "first": [row[:5] for row in rows]})
    return result


def chosen(train: dict, test: dict, ks: list[int], seed: int) -> list[dict]:
    """For every class and k: the latents chosen, and the accuracy of scikit-learn's regression on them."""
    result = []
    for label in train:
        torch.manual_seed(seed)
        x_train, y_train = probe_training.prepare_probe_data(train, label)
        x_test, y_test = probe_training.prepare_probe_data(test, label)
        for k in ks:
            masked = probe_training.get_top_k_mean_diff_mask(x_train, y_train, k)
            _, accuracy = probe_training.train_sklearn_probe(
                probe_training.apply_topk_mask_reduce_dim(x_train, masked),
                y_train,
                probe_training.apply_topk_mask_reduce_dim(x_test, masked),
                y_test,
            )
            latents = (~masked).nonzero()[:, 0].tolist()
            result.append({"class": label, "k": k, "latents": latents, "accuracy": accuracy})
    return result


def whole_datasets(folder: Path, sae, job: dict, mode: str) -> dict:
    """run_eval_single_dataset on every dataset of the job in turn, from one seed: dataset -> metric -> class."""
    config = SparseProbingEvalConfig(model_name="none", random_seed=job["seed"], k_values=job["ks"])
    config.llm_batch_size, config.llm_dtype = 1, "float32"
    config.lower_vram_usage = mode == "cached_lower_vram"

    def activations(name, *_arguments):
        given = load_file(folder / f"{name}.safetensors")
        labels = job["datasets"][name]
        return tuple({label: given[f"{split}/{label}"] for label in labels} for split in ("train", "test"))

    model, found = SimpleNamespace(to=lambda _device: model), {}
    original, main.get_dataset_activations = main.get_dataset_activations, activations
    with tempfile.TemporaryDirectory() as artifacts:
        if mode != "fresh":
            for name in job["datasets"]:
                train, test = activations(name)
                acts = {"train": train, "test": test, "llm_results": {}}
                torch.save(acts, os.path.join(artifacts, f"{name}_activations.pt"))
        torch.manual_seed(job["seed"])
        for name in job["datasets"]:
            _, found[name] = main.run_eval_single_dataset(
                name, config, sae, model, 0, "blocks.0.hook_resid_post", "cpu", artifacts, False
            )
    main.get_dataset_activations = original
    return found


def sae_probes_suite(folder: Path, job: dict) -> dict:
    """sae-probes itself: its datasets, its split, and its scores on given codes."""
    from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization
    from sae_probes.utils_data import get_dataset_sizes, get_train_test_indices, get_yvals, read_numbered_dataset_df
    from sae_probes.utils_training import find_best_reg

    datasets = {
        name: digest([read_numbered_dataset_df(name)["prompt"].tolist(), get_yvals(name).tolist()])[:16]
        for name in get_dataset_sizes()
    }
    codes_NF, y = load_file(folder / "suite.safetensors")["codes_NF"], torch.tensor(job["suite"]["labels"])
    num_train = min(len(y) - 100, 1024)
    train, test = get_train_test_indices(y.numpy(), num_train, len(y) - num_train - 1, 0.5, 42)
    order = get_sorted_indices(codes_NF[train], y[train], mean_act_normalization)
    scores = {}
    for k in job["suite"]["ks"]:
        parts = codes_NF[train][:, order[:k]], y[train], codes_NF[test][:, order[:k]], y[test]
        metrics = find_best_reg(*parts, penalty="l1", seed=42).metrics
        scores[k] = {**asdict(metrics), "latents": order[:k].tolist()}
    return {"datasets": datasets, "train": train.tolist(), "test": test.tolist(), "scores": scores}


def absorption(folder: Path) -> dict:
    """What SAEBench calls absorbed of given codes: its calculator, whose model and SAE give what is in the file."""
    from sae_bench.evals.absorption.feature_absorption import (
        ABSORPTION_FRACTION_MAX_ABSORBING_LATENTS,
        ABSORPTION_FRACTION_PROBE_COS_THRESHOLD,
        ABSORPTION_PROBE_PROJECTION_PROPORTION_THRESHOLD,
        FULL_ABSORPTION_PROBE_COS_THRESHOLD,
    )
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator

    given = load_file(folder / "absorption.safetensors")
    model = SimpleNamespace(
        run_with_cache=lambda _, names_filter: (None, {names_filter[0]: given["acts_ND"][:, None]}),
        to_tokens=lambda _: [[0]],
    )
    sae = SimpleNamespace(encode=lambda _: given["codes_NF"], W_dec=given["dec_FD"], device="cpu")
    words = ["word"] * len(given["acts_ND"])
    calculator = FeatureAbsorptionCalculator(
        model=model,
        icl_word_list=[],
        word_token_pos=-1,
        batch_size=len(words),
        full_absorption_probe_cos_sim_threshold=FULL_ABSORPTION_PROBE_COS_THRESHOLD,
        absorption_fraction_probe_cos_sim_threshold=ABSORPTION_FRACTION_PROBE_COS_THRESHOLD,
        probe_projection_proportion_threshold=ABSORPTION_PROBE_PROJECTION_PROPORTION_THRESHOLD,
        absorption_fraction_max_absorbing_latents=ABSORPTION_FRACTION_MAX_ABSORBING_LATENTS,
    )
    found = calculator.calculate_absorption(sae, words, given["probe_D"], given["main_M"].tolist(), 0).word_results
    return {
        "full": [bool(one.is_full_absorption) for one in found],
        "fraction": [float(one.absorption_fraction) for one in found],
    }


def schema(folder: Path) -> dict:
    """Whether our record validates, and the order of keys in one that SAEBench's classes build of the same values."""
    text = (folder / "record.json").read_text()
    adapter = TypeAdapter(SparseProbingEvalOutput)
    adapter.validate_json(text)
    record = asdict(adapter.validate_python(json.loads(text)))
    return {
        "top": list(record),
        "eval_config": list(record["eval_config"]),
        "llm": list(record["eval_result_metrics"]["llm"]),
        "sae": list(record["eval_result_metrics"]["sae"]),
        "details": list(record["eval_result_details"][0]),
    }


def run(folder: Path) -> None:
    """All checks of the job that lies in `folder`."""
    job = json.loads((folder / "job.json").read_text())
    sae = SAE.load_from_disk(str(folder / "sae"))
    result = {"data": selected_texts(folder / "hub", job["train"], job["test"], job["seed"])}
    result["pooling"], tensors = pooled(folder, sae, job["special"])
    result["probe_sets"] = probe_sets(job["probe_sets"])
    for name, labels in job["datasets"].items():
        given = load_file(folder / f"{name}.safetensors")
        for ending, dtype in (("", torch.float32), (" bfloat16", torch.bfloat16)):
            splits = [{label: given[f"{split}/{label}"].to(dtype) for label in labels} for split in ("train", "test")]
            cast = copy.deepcopy(sae).to(dtype=dtype)
            codes = [activation_collection.get_sae_meaned_activations(split, cast, 125) for split in splits]
            channels = [activation_collection.create_meaned_model_activations(split) for split in splits]
            for who, (train, test) in (("llm", channels), ("sae", codes)):
                result[f"chosen/{name}/{who}{ending}"] = chosen(train, test, job["ks"], job["seed"])
                tensors[f"{name}/{who}{ending}"] = torch.cat([*train.values(), *test.values()])
    result["whole"] = {mode: whole_datasets(folder, sae, job, mode) for mode in job["modes"]}
    result["schema"] = schema(folder)
    if "suite" in job:
        result["suite"] = sae_probes_suite(folder, job)
        result["absorption"] = absorption(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "reference.safetensors")
    (folder / "reference.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve())
