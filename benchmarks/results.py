"""The page of all benchmarks, from their result files and nothing else.

    python -m benchmarks.results docs/results/*.json > benchmarks/RESULTS.md      (or: make results)

For each file: name, hardware, git revision, versions, the ratios (what is claimed) and the tables of rows.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import shown, tables
from fipo.errors import UserError
from fipo.files import read_json

HEAD = """# Results of the benchmarks

Made by `make results` from the JSON files in `docs/results`; not written by hand. How each is measured says the script
of its name in `benchmarks/`.
"""
KEYS = ("name", "hardware", "versions", "git_revision", "rows", "ratios")


def section(path: Path) -> str:
    """One benchmark in Markdown."""
    result = read_json(path)
    missing = [key for key in KEYS if not isinstance(result, dict) or key not in result]
    if missing:
        raise UserError(f"{path} is no result of a benchmark: it has no {', '.join(missing)}")
    lines = [f"## {result['name']}", "", f"- hardware: {machine(result['hardware'])}"]
    lines.append(f"- revision: {result['git_revision']}")
    lines.append(f"- versions: {', '.join(f'{name} {version}' for name, version in result['versions'].items())}")
    lines += [f"- {key}: {shown(value)}" for key, value in result.items() if key not in KEYS and key != "settings"]
    for key, value in result.get("settings", {}).items():
        lines.append(f"- {key}: {shown(value)}")
    ratios = [{"ratio": key, "value": value} for key, value in result["ratios"].items()]
    return "\n".join([*lines, "", *([tables(ratios), ""] if ratios else []), tables(result["rows"])])


def machine(hardware: dict[str, Any]) -> str:
    """Processor, cores and threads, and the GPU where there is one."""
    threads = f"{hardware['threads']} thread{'s' if hardware['threads'] != 1 else ''}"
    gpu = f", {hardware['gpu']}" if hardware.get("gpu") else ""
    return f"{hardware['cpu']}, {hardware['cores']} cores, {threads}{gpu}"


def page(paths: Sequence[Path]) -> str:
    """All benchmarks, by name."""
    if not paths:
        raise UserError("no result file is given")
    return "\n".join([HEAD, "\n\n".join(section(path) for path in sorted(paths, key=lambda path: path.name)), ""])


def main() -> int:
    """Print the page, or say in one line what is wrong."""
    try:
        sys.stdout.write(page([Path(name) for name in sys.argv[1:]]))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
