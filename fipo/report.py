"""From a run folder's files to the record, the picture and the table. Reads files only; trains nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fipo.config import RunConfig
from fipo.data.labelled import LabelledText
from fipo.errors import UserError
from fipo.evaluate import DatasetScores
from fipo.files import read_json, replacing
from fipo.log import read_log
from fipo.names import KINDS, MEASURES
from fipo.progress import say
from fipo.results import FINAL, read_result
from fipo.saebench import Setting, dataset_metrics, metric_name, overall_metrics, sparse_probing_record
from fipo.summary import accuracies, extras

OUTCOMES = "probing_outcomes.safetensors"
DECADES = 10
"""Largest over smallest value from which a logarithmic axis has ticks at 1, 2 and 5 of every decade."""
WIDEST = 400
"""Columns of a table in a file or a pipe; beyond them cells are broken into lines."""


def probing_record(
    config: RunConfig,
    layer: int,
    scores: Sequence[DatasetScores],
    data: Sequence[LabelledText],
    sae_config: dict[str, Any],
    commit: str,
) -> dict[str, Any]:
    """SAEBench's result of one layer of a run, and our additions to it."""
    workload = config.workload
    setting = Setting(
        probing=workload.probing,
        seed=config.seed,
        model=workload.model,
        dtype=workload.dtype,
        context=workload.context,
        release=f"fipo_{config.run}_layer_{layer}",
        training_tokens=workload.steps * workload.batch_tokens,
        commit=commit,
    )
    record = sparse_probing_record(setting, accuracies(scores), sae_config)
    return {**record, **extras(scores, data, workload.probing)}


def layer_info(
    config: RunConfig, layer: int, last_line: dict[str, Any], measures: dict[str, float], record: dict[str, Any]
) -> dict[str, Any]:
    """The record of one layer: SAEBench's result together with the plan's own keys and the held-out measures."""
    workload = config.workload
    return {
        "training_steps": last_line["step"],
        "final_loss": last_line["loss"],
        "layer": layer,
        "dict_size": workload.latents,
        "architecture": config.architecture,
        "k": workload.k if config.budgeted else None,
        "learning_rate": workload.learning_rate,
        "sparsity_penalty": workload.sparsity_penalty,
        **measures,
        **record,
    }


def check_is_result(config: RunConfig, layers: dict[int, dict[str, Any]]) -> None:
    """A run that trained nothing, or whose probes all guess, is an error."""
    for layer, info in layers.items():
        if info["training_steps"] < config.workload.steps:
            raise UserError(f"layer {layer} trained {info['training_steps']} of {config.workload.steps} steps")
        values = [
            accuracy
            for metrics in info["eval_result_unstructured"].values()
            for name, by_class in metrics.items()
            if name.startswith("sae_top_")
            for accuracy in by_class.values()
        ]
        if all(value == 0.5 for value in values):
            raise UserError(
                f"layer {layer}: every probe of the SAE scores exactly 0.5, so its latents say nothing: all are dead, "
                "or a thousand times too small; lower workload.sparsity_penalty or train longer"
            )


def draw(log: Path, path: Path, title: str) -> None:
    """Loss, L0, FVU, dead latents and the histogram of max cosines over training, one colour a layer, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(log)
    layers = sorted({line["layer"] for line in lines})
    by_layer = {layer: [line for line in lines if line["layer"] == layer] for layer in layers}
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    panels = (("loss", "loss", "log"), ("l0", "L0, active latents a token", "log"), ("fvu", "FVU", "linear"))
    panels += (("dead_share", "dead latents, share", "linear"), ("mean_max_cosine", "mean max cosine", "linear"))
    for axis, (key, label, scale) in zip(axes.flat, panels, strict=False):
        for layer in layers:
            tokens = [line["tokens"] / 1e6 for line in by_layer[layer]]
            values, alone = [line[key] for line in by_layer[layer]], len(tokens) == 1
            axis.plot(tokens, values, marker="o" if alone else None, label=f"layer {layer}")
        axis.set(title=label, xlabel="million tokens", yscale=scale)
        axis.grid(alpha=0.3)
        if scale == "log":
            _plain_ticks(axis.yaxis, [line[key] for line in lines])
        if key == "dead_share":
            axis.set_ylim(bottom=0)
    axes.flat[0].legend()
    last = by_layer[layers[-1]]
    counts = [line["max_cosine_histogram"] for line in last]
    begin, end = last[0]["tokens"] / 1e6, last[-1]["tokens"] / 1e6
    axis = axes.flat[5]
    image = axis.imshow(
        list(zip(*counts, strict=True)),
        origin="lower",
        aspect="auto",
        extent=(begin if begin < end else 0, end, 0, 1),
    )
    axis.set(title=f"max cosine of a latent, layer {layers[-1]}", xlabel="million tokens", ylabel="cosine")
    for axis in axes.flat:
        axis.locator_params(axis="x", nbins=5)
    figure.colorbar(image, ax=axis, label="latents, of at most 1,024")
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """A handful of ticks with plain numbers on a logarithmic axis; `values` are those on it."""
    from matplotlib import ticker

    positive = [value for value in values if value > 0]
    wide = len(positive) > 0 and max(positive) > DECADES * min(positive)
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if wide else ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def print_results(out_dir: Path) -> None:
    """Dataset by k for every layer: SAE latents, the model's channels, its principal components and a random SAE; and,
    where their folders are beside this one, the latents of the run's baseline: run_0, or for BatchTopK run_8 and the
    frozen decoder of run_7."""
    info = read_json(out_dir / FINAL)
    baselines = ("run_8", "run_7") if info["architecture"] == "batchtopk" else ("run_0",)
    others = {run: _beside(out_dir, run, info["eval_config"]["dataset_names"]) for run in baselines}
    console = make_console()
    for layer, record in info["layers"].items():
        old = {run: other["layers"][layer] for run, other in others.items() if other and layer in other["layers"]}
        console.print(probing_table(f"layer {layer}", record, old))
        console.print(
            f"layer {layer}: {_summary(record)}" + "".join(f"   ({r}: {_summary(o)})" for r, o in old.items())
        )


def make_console() -> Any:
    """Where tables are printed: the terminal at its width, anything else as wide as the table is."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704 (Rich calls this where it has caught one): the command knows what to do

    console = Quiet()
    return console if console.is_terminal else Quiet(width=WIDEST)


def _beside(out_dir: Path, run: str, datasets: list[str]) -> dict[str, Any] | None:
    """The record of another run beside this folder, where there is a whole one on the same datasets."""
    file = out_dir.parent / run / FINAL
    if out_dir.name == run or not file.exists():
        return None
    try:
        other = read_result(file.parent)
        if not all("eval_result_controls" in record for record in other["layers"].values()):
            raise UserError(f"{file} has no controls")
    except UserError as error:
        say(f"warning: the table does without {run}: {error}")
        return None
    return other if other["eval_config"]["dataset_names"] == datasets else None


def probing_table(title: str, record: dict[str, Any], others: dict[str, dict[str, Any]], tasks: bool = False) -> Any:
    """Test accuracy of the k best features: SAE | channels | principal components | random SAE (| the SAEs of other
    records), by dataset and, with `tasks`, by class; below the means, where splits were drawn several times the spread
    of the means, and the margin over the random SAE with its standard error."""
    from rich.table import Table

    ks = record["eval_config"]["k_values"]
    names = [*KINDS.values(), *others]
    table = Table(title=f"{title}: test accuracy of the k best, {' | '.join(names)}", title_justify="left")
    table.add_column("dataset")
    for k in ks:
        table.add_column(f"k={k}", justify="right")
    for row in _rows(record, tasks):
        others_rows = [_find_row(_rows(other, tasks), row["name"]) for other in others.values()]
        table.add_row(row["name"], *(_cell(row, k, others_rows) for k in ks))
    margins = record["eval_result_controls"]["margin_over_random"]
    table.add_section()
    table.add_row("over random", *(margin_text(margins[f"top_{k}"]) for k in ks))
    return table


def _cell(row: dict[str, Any], k: int, others: list[dict[str, Any]]) -> str:
    values = [row.get(metric_name(who, k)) for who in KINDS]
    values += [other.get(metric_name("sae", k)) for other in others]
    return " | ".join("-" if value is None else f"{value:.3f}" for value in values)


def margin_text(margin: dict[str, float | None]) -> str:
    """A difference and its standard error, where there is one."""
    error = margin["standard_error"]
    return f"{margin['difference']:+.3f}" + ("" if error is None else f" ± {error:.3f}")


def _rows(record: dict[str, Any], tasks: bool) -> list[dict[str, Any]]:
    """Values by metric for every dataset (and class), their means and the spread of those, each with its name."""
    controls = record["eval_result_controls"]
    rows = []
    for dataset, metrics in dataset_metrics(record).items():
        rows.append({"name": dataset, **metrics, **controls["datasets"][dataset]})
        by_metric = record["eval_result_unstructured"][metrics["dataset_name"]] if tasks else {}
        classes = next(iter(by_metric.values()), {})
        rows += [{"name": f"  {label}", **{m: values[label] for m, values in by_metric.items()}} for label in classes]
    rows.append({"name": "mean", **overall_metrics(record), **controls["mean"]})
    spreads = record.get("eval_result_statistics", {}).get("repeats", {}).get("suite", {})
    draws = max((spread["draws"] for spread in spreads.values()), default=1)
    if draws > 1:
        sds = {metric: spread["standard_deviation"] for metric, spread in spreads.items()}
        rows.append({"name": f"sd over {draws} draws", **sds})
    return rows


def _find_row(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next((row for row in rows if row["name"] == name), {})


def measures(record: dict[str, Any]) -> dict[str, str]:
    """Name in tables -> number, of all that was measured of a layer."""
    return {title: form.format(record[key]) for title, (key, form) in MEASURES.items()}


def _summary(record: dict[str, Any]) -> str:
    return ", ".join(f"{title} {number}" for title, number in measures(record).items())
