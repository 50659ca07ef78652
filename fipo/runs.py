"""From the name of a run folder to its config.

Three layers, later ones win key by key: `experiments/base.yaml`, the run's own file (`run_3.yaml` for a folder whose
last name is `run_3`), and a `config.yaml` already in the folder. The workload comes from `FIPO_WORKLOAD` (default
`minilm`) unless the folder's config names it; its fields can be overridden under `workload:`. A section set to null is
off. The config as resolved is what the run folder keeps, and a resumed run reads only that.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from fipo.config import RunConfig, Workload
from fipo.errors import UserError
from fipo.records import from_dict, require, to_dict
from fipo.workloads import find_workload
from fipo.yamlfile import read_yaml, write_yaml

REQUIRED = {field.name for field in dataclasses.fields(Workload) if field.default is dataclasses.MISSING}
"""What a workload cannot do without."""


def resolve(out_dir: Path, experiments: Path) -> RunConfig:
    """The config of the run in `out_dir`; `experiments` is the folder of the run files."""
    own = out_dir / "config.yaml"
    given = read_yaml(own) if own.exists() else {}
    run = str(given.get("run", out_dir.resolve().name))
    file = experiments / f"{run}.yaml"
    known = sorted(path.stem for path in experiments.glob("run_*.yaml"))
    if run not in known:  # a name, and no path to somewhere else
        raise UserError(
            f"run {run!r} is unknown; the folder's last name must be one of {', '.join(known)}, or its config.yaml "
            "must name one under `run:`"
        )
    values = merge(merge(read_yaml(experiments / "base.yaml"), read_yaml(file)), given)
    overrides = values.pop("workload", {})
    require(
        overrides not in (None, ""),
        "workload",
        overrides,
        "a name, or a mapping of keys to values; leave it out for the default",
    )
    if not isinstance(overrides, dict):
        overrides = {"name": overrides}
    name = str(overrides.get("name") or os.environ.get("FIPO_WORKLOAD") or "minilm")
    whole = overrides.keys() >= REQUIRED  # as saved: it may come from a file now gone
    values |= {"run": run, "workload": overrides if whole else merge(to_dict(find_workload(name)), overrides)}
    return from_dict(RunConfig, values)


def save(config: RunConfig, out_dir: Path) -> None:
    """Write the resolved config where `resolve` finds it again."""
    write_yaml(out_dir / "config.yaml", to_dict(config))


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`; mappings merge key by key, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
