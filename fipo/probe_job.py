"""Probing saved SAEs: folders -> one pass of the texts through the model -> a result file each, and tables.

The folders are those that fipo.saved finds.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fipo import page, report
from fipo.checkpoint import save_tensors
from fipo.config import Probing
from fipo.data.labelled import LabelledText, load_all
from fipo.data.lm import LanguageModel
from fipo.data.prepare import probe_chunks
from fipo.done import read_done, result_key
from fipo.evaluate import DatasetScores, Subject, load_subject, probe
from fipo.features import MOST_TOKENS, activities
from fipo.files import writable, write_json
from fipo.memory import enough_memory
from fipo.metrics import max_cosines
from fipo.provenance import hardware, provenance
from fipo.records import to_dict
from fipo.results import OUTCOMES_SUFFIX, PAGE_SUFFIX, RESULT_SUFFIX
from fipo.saebench import Setting, sparse_probing_record
from fipo.saved import Saved, file_names, find_saved, load_model
from fipo.summary import accuracies, extras, outcomes

TO_LOWER = "the number of SAEs given at once, --train or --test"


def run(folders: Sequence[Path], probing: Probing, seed: int, out: Path | None, **chosen: Any) -> None:
    """Probe, write `out`/NAME_eval_results.json with answers and page beside it, and print; `chosen`: model, dtype and
    context where they are to differ from what the SAEs say. What the same command has written before, as far as it
    came, is left as it is."""
    saved = find_saved(folders)
    files = file_names(saved)
    with writable(out, "--out"), enough_memory("probing", TO_LOWER):
        lm = load_model(saved, **chosen)
        data = load_all(probing, seed)
        subjects = {one.name: load_subject(one.folder, one.layer) for one in saved}
        asked = [to_dict(probing) | {"datasets": [one.fingerprint for one in data]}, seed]
        keys = {name: result_key(subject, lm, asked) for name, subject in subjects.items()}
        records = {} if out is None else _done(out, files, keys)
        missing = {name: subject for name, subject in subjects.items() if name not in records}
        scores = probe(lm, data, missing, probing, seed) if missing else {}
        origin = {**provenance(), "hardware": hardware(lm.device)}
        setting = Setting(
            probing=probing,
            seed=seed,
            model=lm.name,
            dtype=str(lm.dtype).removeprefix("torch."),
            context=lm.context,
            release="",
            training_tokens=None,
            commit=origin["git_revision"],
        )
        for one in saved:
            if one.name in missing:
                record = {**_record(one, setting, scores[one.name], data), "key": keys[one.name], **origin}
                records[one.name] = record
                if out is not None:
                    save_tensors(out / f"{files[one.name]}{OUTCOMES_SUFFIX}", outcomes(scores[one.name], data))
                    write_json(out / f"{files[one.name]}{RESULT_SUFFIX}", record)
        if out is not None:
            pages = {one.name: out / f"{files[one.name]}{PAGE_SUFFIX}" for one in saved}
            _write_pages([one for one in saved if not pages[one.name].exists()], pages, records, subjects, data, lm)
        for one in saved:  # once all is on disk: who reads may leave
            report.make_console().print(report.probing_table(one.name, records[one.name], {}, tasks=True))


def _done(out: Path, files: dict[str, str], keys: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Name -> result of every SAE whose result and answers are there; one without its latents is of before."""
    found = {name: read_done(out / f"{file}{RESULT_SUFFIX}", keys[name]) for name, file in files.items()}
    whole = {name for name, file in files.items() if (out / f"{file}{OUTCOMES_SUFFIX}").exists()}
    return {
        name: record
        for name, record in found.items()
        if record and "eval_result_chosen_latents" in record and name in whole
    }


def _record(
    one: Saved, setting: Setting, found: Sequence[DatasetScores], data: Sequence[LabelledText]
) -> dict[str, Any]:
    setting = setting._replace(release=f"fipo_{one.name}", training_tokens=_training_tokens(one.run))
    return {
        **sparse_probing_record(setting, accuracies(found), one.config),
        **extras(found, data, setting.probing),
        "sae": one.described,
    }


def _write_pages(
    saved: Sequence[Saved],
    pages: dict[str, Path],
    records: dict[str, dict[str, Any]],
    subjects: Mapping[str, Subject],
    data: Sequence[LabelledText],
    lm: LanguageModel,
) -> None:
    """The pages of these SAEs, of one pass over some texts of every dataset and class."""
    if not saved:
        return
    each = MOST_TOKENS // (len(data) * lm.context)
    texts = [text for one in data for text in some_texts(one, each)]
    saes = {one.name: (subjects[one.name].sae.to(lm.device), lm.layers.index(one.layer)) for one in saved}
    active = activities(saes, probe_chunks(texts, lm))
    for one in saved:
        dec_FD = subjects[one.name].sae.dec_FD
        measures = {
            "latents": f"{len(dec_FD):,}",
            "L0": f"{active[one.name].rate_F.sum().item():.1f}",
            "mean max cosine": f"{max_cosines(dec_FD).mean().item():.3f}",
        }
        record = records[one.name]
        told = page.Section(f"layer {one.layer}", measures, record, active[one.name], dec_FD)
        about = f"{lm.name}; git revision {record['git_revision']}"
        page.write(pages[one.name], one.name, about, "the labelled texts", [told], lm.pieces, None)


def some_texts(data: LabelledText, count: int) -> list[str]:
    """The first training texts of every class, one a class in turn: `count` of them, or one of each class."""
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*data.train.values()))
    return [text for text in in_turn if text is not None][: max(count, len(data.train))]


def _training_tokens(run: dict[str, Any]) -> int | None:
    return run.get("workload", {}).get("train_tokens")
