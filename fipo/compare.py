"""Several finished runs side by side, as a Markdown table made from their result files alone.

    python -m fipo.compare results/seed_*/run_* > docs/results/minilm.md

Runs of one name, workload and layer are seeds of one another: the table gives mean ± standard deviation over them.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from fipo.errors import EXIT_CODE, UserError
from fipo.files import read_json
from fipo.report import FINAL
from fipo.saebench import overall_metrics

COLUMNS = {
    "FVU": ("held_out_fvu", "{:.3f}"),
    "L0": ("held_out_l0", "{:.1f}"),
    "dead": ("dead_share", "{:.2%}"),
    "mean max cosine": ("mean_max_cosine", "{:.3f}"),
    "SAE top-1": ("sae_top_1_test_accuracy", "{:.3f}"),
    "LLM top-1": ("llm_top_1_test_accuracy", "{:.3f}"),
    "SAE top-5": ("sae_top_5_test_accuracy", "{:.3f}"),
    "LLM top-5": ("llm_top_5_test_accuracy", "{:.3f}"),
}


def table(folders: list[Path]) -> str:
    """The Markdown table of the runs in `folders`; every one must be finished."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    seeds: dict[str, set[int]] = {}
    origins: set[str] = set()
    for folder in folders:
        file = folder / FINAL
        if not file.is_file():
            raise UserError(f"{folder} holds no {FINAL}: it is no finished run; leave it out or finish it")
        info = read_json(file)
        seeds.setdefault(info["run"], set()).add(info["seed"])
        origins.add(f"git {info['git_revision'][:12]}, torch {info['versions']['torch']}, {info['hardware']['cpu']}")
        for layer, record in info["layers"].items():
            groups.setdefault((info["workload"], info["run"], layer), []).append(record)
    lines = [f"| workload | run | layer | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    for (workload, run, layer), records in sorted(groups.items()):
        cells = [_cell(records, key, form) for key, form in COLUMNS.values()]
        lines.append(f"| {workload} | {run} | {layer} | {' | '.join(cells)} |")
    names = "; ".join(f"{run}: {', '.join(map(str, sorted(of)))}" for run, of in sorted(seeds.items()))
    notes = f"\nMean ± standard deviation over seeds ({names}). Made by `python -m fipo.compare` from result files of:"
    return "\n".join([*lines, notes, *(f"- {origin}" for origin in sorted(origins))]) + "\n"


def _cell(records: list[dict[str, Any]], key: str, form: str) -> str:
    values = [{**record, **overall_metrics(record)}[key] for record in records]
    if None in values:
        return "-"
    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + spread


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Finished runs side by side, as Markdown.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    try:
        sys.stdout.write(table(parser.parse_args().folders))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
