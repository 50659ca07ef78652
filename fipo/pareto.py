"""The Pareto picture: explained variance against what the latents are worth, over a sweep of sparsity.

One panel a score: F1 of known features (from a result file of `benchmarks/ground_truth.py`), top-1 of sparse probing of
a layer (from runs). In a panel one line a method, through the means over seeds at each setting of sparsity, with a band
of one standard deviation of the score; thin lines for what the SAEs are measured against. Up and to the right is
better.
"""

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fipo.errors import UserError
from fipo.files import read_json, replacing

FORMATS = (".png", ".pdf", ".svg")
COLUMNS = 4
MARKERS = "os^D"
"""Ten methods have the first, in ten colours, the next ten the second."""
REFERENCE_STYLES = ("--", "-.", ":")
CAPTION = (
    "Points: means over seeds, at the setting of sparsity that is written beside them.\n"
    "Bands: the score's mean ± one standard deviation over seeds."
)


class Point(NamedTuple):
    """One SAE."""

    panel: str
    """What its score is."""
    method: str
    """What the line is named after."""
    setting: str
    """Of sparsity, such as `k 32`; the seeds of one setting make one point of the line."""
    explained_variance: float
    score: float
    references: tuple[tuple[str, float], ...] = ()
    """(name, score) of what it is measured against on the same texts, such as the model's channels."""


def ground_truth_points(file: Path) -> list[Point]:
    """F1 of every row of a result file of `benchmarks/ground_truth.py`."""
    record = read_json(file)
    try:
        panel = f"F1 of {record['settings']['features']:,} known features"
        return [
            Point(panel, str(row["method"]), f"k {row['k']}", float(row["explained_variance"]), float(row["f1"]))
            for row in record["rows"]
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is no result of benchmarks/ground_truth.py: {error!r}; leave it out") from error


def line(points: Sequence[Point]) -> list[tuple[str, float, float, float]]:
    """(setting, mean explained variance, mean score, standard deviation of the score) of every setting, by explained
    variance."""
    settings: dict[str, list[Point]] = {}
    for point in points:
        settings.setdefault(point.setting, []).append(point)
    means = []
    for setting, of in settings.items():
        scores = [point.score for point in of]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        means.append((setting, statistics.fmean(p.explained_variance for p in of), statistics.fmean(scores), spread))
    return sorted(means, key=lambda mean: mean[1:])


def references(points: Sequence[Point]) -> dict[str, float]:
    """Mean score of everything that the SAEs of a panel are measured against."""
    found: dict[str, list[float]] = {}
    for point in points:
        for title, score in point.references:
            found.setdefault(title, []).append(score)
    return {title: statistics.fmean(scores) for title, scores in found.items()}


def in_order(panels: Iterable[str]) -> list[str]:
    """Each once, numbers in their names counted: layer 5 before layer 12."""
    return sorted(set(panels), key=lambda panel: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", panel)])


def picture_format(path: Path) -> str:
    """What the name asks for; a `UserError` where it is none that is drawn."""
    if path.suffix not in FORMATS:
        raise UserError(f"--picture is {path}; expected a name in {', '.join(FORMATS)}")
    return path.suffix.removeprefix(".")


def draw_pareto(points: Sequence[Point], path: Path) -> None:
    """All panels side by side, in the format that the file's name asks for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    form, panels = picture_format(path), in_order(point.panel for point in points)
    methods = sorted({point.method for point in points})
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5 * columns + 2, 4.5 * rows), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, panel, [point for point in points if point.panel == panel], methods)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    ordered = [*methods, *sorted(handles.keys() - set(methods))]
    figure.legend([handles[label] for label in ordered], ordered, loc="outside right upper", fontsize="small")
    figure.supxlabel(CAPTION, fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=form, dpi=110)
    pyplot.close(figure)


def _draw_panel(axis: Any, panel: str, points: Sequence[Point], methods: Sequence[str]) -> None:
    """Points and band of every method, named by its place among all of them, and what they are measured against."""
    for (title, score), style in zip(references(points).items(), REFERENCE_STYLES, strict=False):
        axis.axhline(score, color="0.4", linewidth=0.9, linestyle=style, label=title)
    for number, method in enumerate(methods):
        of = line([point for point in points if point.method == method])
        if not of:
            continue
        settings, x, y, spread = (list(values) for values in zip(*of, strict=True))
        color, low_high = f"C{number}", [[a + sign * b for a, b in zip(y, spread, strict=True)] for sign in (-1, 1)]
        axis.plot(x, y, marker=MARKERS[number // 10 % len(MARKERS)], markersize=5, label=method, color=color)
        if len(of) > 1:
            axis.fill_between(x, *low_high, color=color, alpha=0.2, linewidth=0)
        else:
            axis.errorbar(x, y, yerr=spread, color=color, capsize=3)
        for setting, *place in zip(settings, x, y, strict=True):
            offset = {"xytext": (3, 4), "textcoords": "offset points"}
            axis.annotate(setting, place, **offset, fontsize=7, color=color)
    score, _, where = panel.partition(", ")
    axis.set(title=where or panel, xlabel="explained variance", ylabel=score)
    axis.locator_params(axis="x", nbins=5)
    axis.margins(0.08)
    axis.grid(alpha=0.3)
