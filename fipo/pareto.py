"""The Pareto picture: explained variance against what the latents are worth, over a sweep of sparsity.

One panel a score: F1 of known features (from a result file of `benchmarks/ground_truth.py`), top-1 of sparse probing of
a layer (from runs). In a panel one line a method, through the means over seeds at each setting of sparsity, with a band
of one standard deviation of the score. Up and to the right is better.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fipo.errors import UserError
from fipo.files import read_json, replacing


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


def ground_truth_points(file: Path) -> list[Point]:
    """F1 of every row of a result file of `benchmarks/ground_truth.py`."""
    record = read_json(file)
    try:
        panel = f"F1 of {record['settings']['features']:,} known features"
        return [
            Point(panel, str(row["method"]), f"k {row['k']}", float(row["explained_variance"]), float(row["f1"]))
            for row in record["rows"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is no result of benchmarks/ground_truth.py: {error!r}; leave it out") from error


def line(points: Sequence[Point]) -> list[tuple[float, float, float]]:
    """(mean explained variance, mean score, standard deviation of the score) of every setting, by explained
    variance."""
    settings: dict[str, list[Point]] = {}
    for point in points:
        settings.setdefault(point.setting, []).append(point)
    means = []
    for of in settings.values():
        scores = [point.score for point in of]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        means.append((statistics.fmean(p.explained_variance for p in of), statistics.fmean(scores), spread))
    return sorted(means)


def draw_pareto(points: Sequence[Point], path: Path) -> None:
    """All panels side by side, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(point.panel for point in points))
    methods = sorted({point.method for point in points})
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5 * len(panels), 4.5), constrained_layout=True, squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for number, method in enumerate(methods):
            of = line([point for point in points if (point.panel, point.method) == (panel, method)])
            if not of:
                continue
            x, y, spread = (list(values) for values in zip(*of, strict=True))
            axis.plot(x, y, marker="o", label=method, color=f"C{number}")
            low, high = ([a + sign * b for a, b in zip(y, spread, strict=True)] for sign in (-1, 1))
            if len(of) > 1:
                axis.fill_between(x, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
            else:
                axis.errorbar(x, y, yerr=spread, color=f"C{number}", capsize=3)
        axis.set(title=panel, xlabel="explained variance")
        axis.grid(alpha=0.3)
        axis.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
