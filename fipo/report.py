"""From a run folder's files to the record, the picture and the table. Reads files only; trains nothing."""

from pathlib import Path
from typing import Any

from fipo.config import RunConfig
from fipo.errors import UserError
from fipo.files import read_json, replacing
from fipo.log import read_log
from fipo.provenance import git_revision
from fipo.saebench import metric_name, overall_metrics, sparse_probing_record

FINAL = "final_info.json"


def layer_info(
    config: RunConfig,
    layer: int,
    last_line: dict[str, Any],
    measures: dict[str, float],
    accuracies: dict[str, dict[str, dict[str, float]]],
    sae_config: dict[str, Any],
) -> dict[str, Any]:
    """The record of one layer: SAEBench's result together with the plan's own keys and the held-out measures."""
    workload = config.workload
    return {
        "training_steps": last_line["step"],
        "final_loss": last_line["loss"],
        "layer": layer,
        "dict_size": workload.latents,
        "learning_rate": workload.learning_rate,
        "sparsity_penalty": workload.sparsity_penalty,
        **measures,
        **sparse_probing_record(config, accuracies, sae_config, git_revision()),
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
            axis.plot(tokens, [line[key] for line in by_layer[layer]], label=f"layer {layer}")
        axis.set(title=label, xlabel="million tokens", yscale=scale)
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    last = by_layer[layers[-1]]
    counts = [line["max_cosine_histogram"] for line in last]
    axis = axes.flat[5]
    image = axis.imshow(
        list(zip(*counts, strict=True)),
        origin="lower",
        aspect="auto",
        extent=(last[0]["tokens"] / 1e6, last[-1]["tokens"] / 1e6, 0, 1),
    )
    axis.set(title=f"max cosine of a latent, layer {layers[-1]}", xlabel="million tokens", ylabel="cosine")
    figure.colorbar(image, ax=axis, label="latents")
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def print_results(out_dir: Path) -> None:
    """Dataset by k for every layer: SAE latents beside the model's channels, and beside run_0 where that folder is."""
    from rich.console import Console

    info = read_json(out_dir / FINAL)
    baseline = _baseline(out_dir, info["eval_config"]["dataset_names"])
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for layer, record in info["layers"].items():
        old = baseline["layers"].get(layer) if baseline else None
        console.print(_layer_table(layer, record, old, info["eval_config"]["k_values"]))
        console.print(f"layer {layer}: {_summary(record)}" + (f"   (run_0: {_summary(old)})" if old else ""))


def _baseline(out_dir: Path, datasets: list[str]) -> dict[str, Any] | None:
    """The record of run_0 beside this folder, where there is one on the same datasets."""
    file = out_dir.parent / "run_0" / FINAL
    if out_dir.name == "run_0" or not file.exists():
        return None
    baseline = read_json(file)
    return baseline if baseline["eval_config"]["dataset_names"] == datasets else None


def _layer_table(layer: str, record: dict[str, Any], old: dict[str, Any] | None, ks: list[int]) -> Any:
    from rich.table import Table

    what = "SAE latents | model channels" + (" | run_0's latents" if old else "")
    table = Table(title=f"layer {layer}: test accuracy of the k best, {what}", title_justify="left")
    table.add_column("dataset")
    for k in ks:
        table.add_column(f"k={k}", justify="right")
    rows, old_rows = _rows(record), _rows(old) if old else []
    for index, row in enumerate(rows):
        cells = []
        for k in ks:
            values = [row[metric_name("sae", k)], row[metric_name("llm", k)]]
            values += [old_rows[index][metric_name("sae", k)]] if old_rows else []
            cells.append(" | ".join("-" if value is None else f"{value:.3f}" for value in values))
        table.add_row(row["dataset_name"].removesuffix("_results"), *cells)
    return table


def _rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [*record["eval_result_details"], {"dataset_name": "mean", **overall_metrics(record)}]


def _summary(record: dict[str, Any]) -> str:
    return (
        f"FVU {record['held_out_fvu']:.3f}, L0 {record['held_out_l0']:.1f}, dead {record['dead_share']:.2%}, "
        f"mean max cosine {record['mean_max_cosine']:.3f}"
    )
