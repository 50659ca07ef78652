"""Probing saved SAEs: folders -> one pass of the texts through the model -> a result file each, and tables.

The folders are those that fipo.saved finds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fipo import report
from fipo.checkpoint import save_tensors
from fipo.config import Probing
from fipo.data.labelled import load_all
from fipo.errors import UserError
from fipo.evaluate import load_subject, probe
from fipo.files import writable, write_json
from fipo.memory import enough_memory
from fipo.provenance import hardware, provenance
from fipo.results import OUTCOMES_SUFFIX, RESULT_SUFFIX
from fipo.saebench import Setting, sparse_probing_record
from fipo.saved import Saved, file_names, find_saved, load_model
from fipo.summary import accuracies, extras, outcomes

TO_LOWER = "the number of SAEs given at once, --train or --test"


def run(folders: Sequence[Path], probing: Probing, seed: int, out: Path | None, **chosen: Any) -> None:
    """Probe, print, and write `out`/NAME_eval_results.json; `chosen`: model, dtype and context where they are to differ
    from what the SAEs say."""
    saved = find_saved(folders)
    files = file_names(saved)
    with writable(out, "--out"), enough_memory("probing", TO_LOWER):
        for file in files.values() if out is not None else ():
            if (out / f"{file}{RESULT_SUFFIX}").exists():
                raise UserError(f"{out} already holds a result of {file}; name another --out, or remove it")
        _run(saved, files, probing, seed, out, chosen)


def _run(
    saved: Sequence[Saved], files: dict[str, str], probing: Probing, seed: int, out: Path | None, chosen: dict[str, Any]
) -> None:
    lm = load_model(saved, **chosen)
    data = load_all(probing, seed)
    subjects = {one.name: load_subject(one.folder, one.layer) for one in saved}
    scores = probe(lm, data, subjects, probing, seed)
    origin = {**provenance(), "hardware": hardware(lm.device)}
    console = report.make_console()
    for one in saved:
        setting = Setting(
            probing=probing,
            seed=seed,
            model=lm.name,
            dtype=str(lm.dtype).removeprefix("torch."),
            context=lm.context,
            release=f"fipo_{one.name}",
            training_tokens=_training_tokens(one.run),
            commit=origin["git_revision"],
        )
        found = scores[one.name]
        record = {
            **sparse_probing_record(setting, accuracies(found), one.config),
            **extras(found, data),
            "sae": {"name": one.name, "layer": one.layer, "run": one.run.get("run"), "seed": one.run.get("seed")},
            **origin,
        }
        console.print(report.probing_table(one.name, record, {}, tasks=True))
        if out is not None:
            save_tensors(out / f"{files[one.name]}{OUTCOMES_SUFFIX}", outcomes(found))
            write_json(out / f"{files[one.name]}{RESULT_SUFFIX}", record)


def _training_tokens(run: dict[str, Any]) -> int | None:
    return run.get("workload", {}).get("train_tokens")
