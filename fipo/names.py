"""What to call the runs that are compared, so that two of one name that differ are not taken for seeds of one another.

A run's name says which experiment it is; its config.yaml may have changed anything. Of what differs among the runs of a
name, a run's own values are added to its name, such as `run_8, penalty.kind ortsae` beside `run_8, penalty off`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Suite = tuple[str, tuple[str, ...]]
"""A workload and the datasets it was scored on."""
NOT_COMPARED = {"run", "seed", "workload.layers", "log_every", "checkpoint_every", "checkpoint_share"}
"""What a row of the table says already, or what does not touch the result."""
SPARSITY = {"workload.k", "workload.sparsity_penalty"}
"""What a sweep of sparsity varies."""
SHOWN = 2
"""Values added to a name, at most, while these are enough."""


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every value of a config under its whole key, as text; a part that is off is `off`."""
    found: dict[str, str] = {}
    for key, value in config.items():
        name = prefix + key
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        elif name not in NOT_COMPARED:
            found[name] = "off" if value is None else str(value)
    return found


def additions(configs: Sequence[Mapping[str, str]], without: set[str]) -> list[str]:
    """For every flat config of one name, what to add to the name; where nothing differs, nothing. Keys in `without` are
    told elsewhere. An empty config says nothing: it gets no addition and makes nothing differ."""
    keys = list(dict.fromkeys(key for config in configs for key in config if key not in without))
    differing = [key for key in keys if len({config.get(key) for config in configs if config}) > 1]
    differing.sort(key=lambda key: key.startswith("workload."))
    own = [[f"{key} {config[key]}" for key in differing if key in config] for config in configs]
    short = [", ".join(values[:SHOWN]) for values in own]
    enough = len(set(short)) == len({tuple(values) for values in own})
    return short if enough else [", ".join(values) for values in own]


def suite_names(suites: Iterable[Suite]) -> dict[Suite, str]:
    """Name of each workload with its datasets: the workload, and the datasets where those of a workload differ."""
    different = dict.fromkeys(suites)
    workloads = [workload for workload, _ in different]
    return {one: one[0] if workloads.count(one[0]) == 1 else f"{one[0]}: {', '.join(one[1])}" for one in different}
