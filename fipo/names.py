"""What to call the runs that are compared, so that two of one name that differ are not taken for seeds of one another.

A run's name says which experiment it is; its config.yaml may have changed anything. Of what differs among the runs of a
name, a run's own values are added to its name, such as `run_8, penalty.kind ortsae` beside `run_8, penalty off`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from fipo.config import BUDGETED

R = TypeVar("R", bound=tuple)

NOT_COMPARED = {"run", "seed", "workload.layers", "log_every", "checkpoint_every", "checkpoint_share"}
NOT_COMPARED |= {"workload.probing"}
"""What a row of the table or its suite says already, or what does not touch the result."""
SPARSITY = {"workload.k", "workload.sparsity_penalty"}
"""What a sweep of sparsity varies."""
SHOWN = 2
"""Values added to a name, at most, while these are enough."""
KINDS = {"sae": "SAE", "llm": "LLM", "pca": "PCA", "random": "random"}
"""What is probed, and its short name in tables, in the order of a cell."""
MEASURES = {
    "FVU": ("held_out_fvu", "{:.3f}"),
    "L0": ("held_out_l0", "{:.1f}"),
    "dead": ("dead_share", "{:.2%}"),
    "mean max cosine": ("mean_max_cosine", "{:.3f}"),
}
"""What is measured of an SAE beside probing, by its name in tables: the record's key, and how its number is written."""
CONTROLS = {"llm": "channels of the model", "pca": "principal components", "random": "random SAE"}
"""What SAEs are measured against, and how tables and pictures name it."""
MEASURED_WITH = {
    **{"model_name": "model", "llm_dtype": "dtype", "context_length": "context"},
    **{"probe_train_set_size": "training texts", "probe_test_set_size": "test texts"},
}
"""Keys of SAEBench's `eval_config` without which scores mean something else, and how names tell them."""
PROTOCOL = ("rng", "pooling")
"""The same of our own `eval_result_protocol`."""
UNKNOWN = "unknown"


class Suite(NamedTuple):
    """On what SAEs are scored, and how: only scores of one suite are set side by side."""

    workload: str
    datasets: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    """(key, value) of all in `MEASURED_WITH` and `PROTOCOL`."""


def suite_of(record: Mapping[str, Any], probing: Mapping[str, Any]) -> Suite:
    """The suite of a probing result with its `workload`. `probing`: that part of the run's config, which says what a
    result from before `eval_result_protocol` does not."""
    asked = record["eval_config"]
    protocol = {**probing, **record.get("eval_result_protocol", {})}
    settings = [(name, str(asked.get(key, UNKNOWN))) for key, name in MEASURED_WITH.items()]
    settings += [(name, str(protocol.get(name, UNKNOWN))) for name in PROTOCOL]
    return Suite(record["workload"], tuple(asked["dataset_names"]), tuple(settings))


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every value of a config under its whole key, as text; a part that is off is `off`."""
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in NOT_COMPARED:
            continue
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        else:
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


def told_apart(runs: Sequence[str], configs: Sequence[Mapping[str, str]]) -> list[str]:
    """The names of runs, with what the flat configs of one name differ in beside sparsity."""
    added = {
        run: iter(additions([config for of, config in zip(runs, configs, strict=True) if of == run], without=SPARSITY))
        for run in set(runs)
    }
    return [f"{run}, {more}" if (more := next(added[run])) else run for run in runs]


def with_sparsity(runs: Sequence[str], settings: Sequence[str]) -> list[str]:
    """The names of runs, with the setting of sparsity where those of one name have several."""
    found: dict[str, set[str]] = {}
    for run, setting in zip(runs, settings, strict=True):
        found.setdefault(run, set()).update({setting} - {""})
    several = {run for run, of in found.items() if len(of) > 1}
    return [f"{run}, {one}" if run in several and one else run for run, one in zip(runs, settings, strict=True)]


def renamed(results: Sequence[R], names: Sequence[str]) -> list[R]:
    """The results, named tuples with a field `run`, by these names."""
    return [result._replace(run=name) for result, name in zip(results, names, strict=True)]


def bases(runs: Sequence[str], settings: Sequence[str]) -> dict[str, str]:
    """Name `with_sparsity` -> the one that it is set against: the first run at the same setting where there is that,
    else the first of all, which alone is set against none."""
    names = with_sparsity(runs, settings)
    of_first = {one: name for run, one, name in zip(runs, settings, names, strict=True) if run == runs[0] and one}
    found = {}
    for setting, name in zip(settings, names, strict=True):
        base = of_first.get(setting, names[0])
        if name != names[0]:
            found.setdefault(name, names[0] if base == name else base)
    return found


def seeds_told(which: Iterable[tuple[str, int | None]]) -> str:
    """Of every run, as they come, its seeds in their order, once each; `-` for an SAE that does not tell its own."""
    seeds: dict[str, set[int | None]] = {}
    for run, seed in which:
        seeds.setdefault(run, set()).add(seed)
    told = {
        run: ("-" if one is None else str(one) for one in sorted(of, key=lambda one: one or 0))
        for run, of in seeds.items()
    }
    return "; ".join(f"{run}: {', '.join(of)}" for run, of in told.items())


def one_of(run: str, seed: int | None, layer: int) -> str:
    """An SAE, in an error."""
    return f"{run}{'' if seed is None else f', seed {seed}'}, layer {layer}"


def sparsity_of(config: Mapping[str, str]) -> str:
    """What a flat config sets the sparsity by: `k 32`, or `λ 0.01`; empty where it does not say."""
    if "architecture" not in config:
        return ""
    sign, key = ("k", "workload.k") if config["architecture"] in BUDGETED else ("λ", "workload.sparsity_penalty")
    return f"{sign} {config[key]}" if key in config else ""


def suite_names(suites: Iterable[Suite]) -> dict[Suite, str]:
    """Name of each suite: its workload and, where those of a workload differ, its datasets and settings."""
    different: dict[str, list[Suite]] = {}
    for suite in dict.fromkeys(suites):
        different.setdefault(suite.workload, []).append(suite)
    names = {}
    for workload, of in different.items():
        others = len({suite.datasets for suite in of}) > 1
        settings = additions([dict(suite.settings) for suite in of], without=set())
        for suite, added in zip(of, settings, strict=True):
            datasets = f": {', '.join(suite.datasets)}" if others else ""
            names[suite] = f"{workload}{datasets}" + (f"; {added}" if added else "")
    return names
