"""The suite of sae-probes on saved SAEs: folders -> last-token activations -> a result file each, and a table.

Beside the latents of every SAE stand the model's channels and the latents of a random SAE of about the same L0, chosen
and fitted in the same way.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fipo import controls, report
from fipo.config import LEAST_CONTEXT
from fipo.data.lm import LanguageModel
from fipo.done import read_done, result_key
from fipo.evaluate import check_fits, load_subject
from fipo.files import writable, write_json
from fipo.memory import enough_memory
from fipo.pooling import keep, read_kept
from fipo.progress import progress
from fipo.provenance import hardware, provenance
from fipo.randomness import generator_for
from fipo.results import SUITE_METRICS, SUITE_RESULT_SUFFIX
from fipo.sae import SAE
from fipo.sae_probes_suite import SuiteDataset, last_token_activations, longest_row, probe_scores, suite_datasets
from fipo.saved import Saved, file_names, find_saved, load_model
from fipo.suite_table import Scores, mean_and_error, mean_score

SAMPLE_DATASETS = 8
"""The first datasets, on whose last tokens the L0 of an SAE is found for its random control."""
TO_LOWER = "the number of SAEs given at once, or name fewer --datasets"


def run(
    folders: Sequence[Path],
    names: Sequence[str],
    ks: Sequence[int],
    seed: int,
    out: Path | None,
    model: str | None = None,
    dtype: str | None = None,
) -> None:
    """Probe, print, and write `out`/NAME_sae_probes_results.json; `names`: some of the datasets, or none for all; model
    and dtype where they are to differ from what the SAEs say. What the same command has written before, as far as it
    came, is printed and left as it is."""
    saved = find_saved(folders)
    files = {name: f"{file}{SUITE_RESULT_SUFFIX}" for name, file in file_names(saved).items()}
    datasets = list(suite_datasets(names))
    with writable(out, "--out"), enough_memory("probing", TO_LOWER):
        lm = load_model(saved, model=model, dtype=dtype, context=LEAST_CONTEXT)  # rows are of a length of their own
        subjects = {one.name: load_subject(one.folder, one.layer) for one in saved}
        for name, subject in subjects.items():
            check_fits(name, subject, lm, ks)
        asked = [[tuple(data) for data in datasets], list(ks), seed]
        keys = {name: result_key(subject, lm, asked) for name, subject in subjects.items()}
        done = {name: read_done(out / file, keys[name]) for name, file in files.items() if out is not None}
        records = {name: record for name, record in done.items() if record is not None}
        missing = [one for one in saved if one.name not in records]
        acts = _all_activations(datasets, lm) if missing else []
        origin = {**provenance(), "hardware": hardware(lm.device)}
        with progress("probing", len(missing) * len(datasets), "datasets") as advance:
            for one in missing:
                place = lm.layers.index(one.layer)
                layer_acts = [acts_NLD[:, place] for acts_NLD in acts]
                results = _results(one, subjects[one.name].sae, datasets, layer_acts, ks, seed, advance)
                record = {**_record(one, results, ks, seed, lm), "key": keys[one.name], **origin}
                records[one.name] = record
                if out is not None:
                    write_json(out / files[one.name], record)
        for one in saved:  # once all is on disk: who reads may leave
            report.make_console().print(_table(one.name, records[one.name]["results"], ks))


def _all_activations(datasets: Sequence[SuiteDataset], lm: LanguageModel) -> list[Tensor]:
    """Last-token activations [N, L, D] of every dataset, from the cache where it has them."""
    found = []
    with progress("last tokens", sum(len(data.texts) for data in datasets), "texts") as advance:
        for data in datasets:
            key = ["last tokens", lm.model_hash, lm.tokenizer_hash, list(lm.layers), str(lm.dtype), data.texts]
            acts_NLD = read_kept(key)
            if acts_NLD is None:
                acts_NLD = last_token_activations(data.texts, lm)
                keep(key, acts_NLD)
            found.append(acts_NLD)
            advance(len(data.texts), data.name)
    return found


def _results(
    one: Saved,
    sae: SAE,
    datasets: Sequence[SuiteDataset],
    acts: Sequence[Tensor],
    ks: Sequence[int],
    seed: int,
    advance: Callable[[float, str], None],
) -> Scores:
    """Of an SAE on every dataset, whose last-token activations [N, D] are given."""
    control, results = _control(sae, torch.cat(list(acts[:SAMPLE_DATASETS])), seed, one), {}
    for data, acts_ND in zip(datasets, acts, strict=True):
        results[data.name] = _probe(data, acts_ND, sae, control, ks, seed)
        advance(1, f"{data.name} {one.name}")
    return results


def _control(sae: SAE, sample_BD: Tensor, seed: int, one: Saved) -> SAE:
    l0 = controls.nearby_l0(controls.code_l0(sae, sample_BD))
    return controls.random_sae(sae.latents, l0, sample_BD, generator_for(seed, "random control", one.layer))


@torch.no_grad()
def _probe(
    data: SuiteDataset, acts_ND: Tensor, sae: SAE, control: SAE, ks: Sequence[int], seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    features = {"sae": sae.encode(acts_ND), "llm": acts_ND, "random": control.encode(acts_ND)}
    return {
        who: {str(k): score._asdict() for k, score in probe_scores(values_NF, data.labels, ks, seed).items()}
        for who, values_NF in features.items()
    }


def _record(one: Saved, results: Scores, ks: Sequence[int], seed: int, lm: LanguageModel) -> dict[str, Any]:
    means = {
        who: {str(k): {metric: mean_score(results, who, k, metric) for metric in SUITE_METRICS} for k in ks}
        for who in ("sae", "llm", "random")
    }
    return {
        "suite": "sae-probes",
        "setting": "normal",
        "random_seed": seed,
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "context": longest_row(lm),
        "sae": one.described,
        "datasets": len(results),
        "mean": means,
        "margin_over_random": {str(k): {metric: _margin(results, k, metric) for metric in SUITE_METRICS} for k in ks},
        "results": results,
    }


def _margin(results: Scores, k: int, metric: str) -> dict[str, float | None]:
    """Mean difference from the random SAE over the datasets, and its standard error."""
    values = [scores["sae"][str(k)][metric] - scores["random"][str(k)][metric] for scores in results.values()]
    difference, error = mean_and_error(values)
    return {"difference": difference, "standard_error": error}


def _table(title: str, results: Scores, ks: Sequence[int]) -> Any:
    from rich.table import Table

    heading = f"{title}: mean over {len(results)} datasets of sae-probes, SAE | LLM | random"
    table = Table(title=heading, title_justify="left")
    table.add_column("metric")
    for k in ks:
        table.add_column(f"k={k}", justify="right")
    for metric in SUITE_METRICS:
        cells = (
            " | ".join(f"{mean_score(results, who, k, metric):.3f}" for who in ("sae", "llm", "random")) for k in ks
        )
        table.add_row(metric, *cells)
    table.add_section()
    for metric in SUITE_METRICS:
        table.add_row(f"{metric} over random", *(report.margin_text(_margin(results, k, metric)) for k in ks))
    return table
