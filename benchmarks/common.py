"""What every benchmark shares: interleaved timing, one table on screen, one JSON file."""

import argparse
import itertools
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fipo.errors import EXIT_CODE, UserError
from fipo.files import writable, write_json
from fipo.provenance import hardware, provenance


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """`--json OUT`, where a file can be written, and an option for each default, of its type: whole numbers of zero or
    more where the default is a flag's or a seed's (0 or 1), else positive ones."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here")
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="%(default)s")
    given = parser.parse_args()
    for name, default in defaults.items():
        least = int(isinstance(default, int) and default > 1)
        if isinstance(default, int) and getattr(given, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(given, name)}; expected at least {least}")
    ready(given.json)
    return given


def ready(path: Path | None) -> None:
    """See that the result can be written, before hours go into it."""
    if path is not None:
        if path.is_dir():
            raise UserError(f"--json {path} is a folder; name a file")
        with writable(path.parent, "--json"):
            pass


def program(python: str, option: str, hint: str) -> None:
    """See that another environment's Python is there, before anything is measured."""
    if shutil.which(python) is None:
        raise UserError(f"{option} {python} is no program; {hint}")


def command(main: Callable[[], int | None]) -> int:
    """The exit code of a benchmark: what a user can put right is told in one line."""
    try:
        return main() or 0
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_CODE
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130


def as_found() -> dict[str, str]:
    """The environment without what `import fipo` put into it: a rival runs as its users run it."""
    ours = ("THP_MEM_ALLOC_ENABLE", "GOMP_SPINCOUNT")
    return {name: value for name, value in os.environ.items() if name not in ours}


def interleaved(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each job; the jobs take turns, so that what disturbs the machine disturbs all of them."""
    for job in work.values():
        job()
    if torch.cuda.is_available():  # what warmed up is not to be waited for on the clock
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, job in work.items():
            started = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown; a new table begins where a row's first column has another name."""
    lines: list[str] = []
    for _, group in itertools.groupby(rows, lambda row: next(iter(row))):
        group = list(group)
        columns = list(dict.fromkeys(key for row in group for key in row))
        lines += ["", f"| {' | '.join(columns)} |", f"{'|---' * len(columns)}|"]
        lines += [f"| {' | '.join(shown(row.get(column)) for column in columns)} |" for row in group]
    return "\n".join(lines[1:])


def publish(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float],
    path: Path | None,
    settings: Mapping[str, Any] | None = None,
    *,
    so_far: bool = False,
) -> None:
    """Print the rows as Markdown tables with the ratios below; write them with hardware and versions to `path`.

    `settings`: what a reader must know of how the numbers came about. `so_far`: more will come, and the file alone is
    written, so that a benchmark that is cut off leaves what it measured.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not so_far:
        print(f"{name} on {hardware(device)}\n")
        print("".join(f"{key}: {shown(value)}\n" for key, value in (settings or {}).items()))
        print(tables(rows))
        print("\n" + "\n".join(f"{key}: {value:.3g}" for key, value in ratios.items()))
    if path is not None:
        origin = provenance()
        write_json(
            path,
            {
                "name": name,
                "hardware": hardware(device),
                "versions": origin["versions"],
                "git_revision": origin["git_revision"],
                **({"settings": dict(settings)} if settings else {}),
                "rows": [dict(row) for row in rows],
                "ratios": dict(ratios),
            },
        )


def shown(value: Any) -> str:
    """A cell of a table: four significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
