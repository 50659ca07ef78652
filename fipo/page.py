"""The page of a run: its scores, which latents the probes took for which concept, and what those latents respond to.

One HTML file that needs nothing beside it. This is the only module that imports jinja2.
"""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fipo.features import Activity, Example, nearest
from fipo.files import replacing
from fipo.names import CONTROLS
from fipo.saebench import dataset_metrics, metric_name, overall_metrics

TEMPLATE = Path(__file__).with_name("page.html")
OF_A_PROBE = 5
"""Latents shown of every probe."""
IMPORTANT, EVENLY = 24, 24
"""Other latents shown: the most important ones, and some evenly spaced over the ranks of all that are active."""

Pieces = Callable[[Sequence[int]], list[str]]
"""Token ids -> what each adds to the text."""


class Layer(NamedTuple):
    """What the page tells of one SAE."""

    layer: int
    info: dict[str, Any]
    """Its probing result with the held-out measures (fipo.report.layer_info)."""
    activity: Activity
    dec_FD: Tensor


def write(file: Path, title: str, about: str, layers: Sequence[Layer], pieces: Pieces, picture: Path) -> None:
    """Make the page; `about`: a line on where the run comes from, `picture`: a PNG to show."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        about=about,
        controls=CONTROLS,
        layers=[_layer(one, pieces) for one in layers],
        picture=base64.b64encode(picture.read_bytes()).decode(),
    )
    with replacing(file) as temporary:
        temporary.write_text(page, encoding="utf-8")


def others(mean_F: Tensor) -> list[int]:
    """Latents that are shown whatever the probes took, given the importance of all."""
    rank_F = mean_F.argsort(descending=True, stable=True)
    active = int((mean_F > 0).sum())
    evenly = torch.linspace(0, max(0, active - 1), EVENLY).round().long()
    return [*rank_F[:IMPORTANT].tolist(), *rank_F[evenly].tolist()]


def _layer(one: Layer, pieces: Pieces) -> dict[str, Any]:
    tasks = _tasks(one.info)
    probed = {latent for task in tasks for latent, _ in task["latents"]}
    latents = _latents(one, probed.union(others(one.activity.mean_F)), tasks, pieces)
    return {
        "layer": one.layer,
        "info": one.info,
        "scores": _scores(one.info),
        "tasks": tasks,
        "tokens": one.activity.tokens,
        "groups": {
            "Latents that the probes took": [latent for latent in latents if latent["tasks"]],
            "Other latents": [latent for latent in latents if not latent["tasks"]],
        },
    }


def _scores(info: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean accuracy by k: latents, the controls, and the margin over the random SAE."""
    means = {**overall_metrics(info), **info["eval_result_controls"]["mean"]}
    margins = info["eval_result_controls"]["margin_over_random"]
    return [
        {
            "k": k,
            "sae": means[metric_name("sae", k)],
            "controls": [means[metric_name(who, k)] for who in CONTROLS],
            "margin": margins[f"top_{k}"],
        }
        for k in info["eval_config"]["k_values"]
    ]


def _tasks(info: dict[str, Any]) -> list[dict[str, Any]]:
    """Every class of every dataset with the accuracy of its probes and the first latents they take."""
    ks = info["eval_config"]["k_values"]
    tasks = []
    for dataset in dataset_metrics(info):
        accuracies = info["eval_result_unstructured"][f"{dataset}_results"]
        for label, chosen in info["eval_result_chosen_latents"][dataset].items():
            pairs = list(zip(chosen["latents"], chosen["mean_differences"], strict=True))[:OF_A_PROBE]
            by_k = [(k, accuracies[metric_name("sae", k)][label]) for k in (ks[0], ks[-1])]
            tasks.append({"dataset": dataset, "label": label, "accuracies": by_k, "latents": pairs})
    return tasks


def _latents(one: Layer, wanted: set[int], tasks: list[dict[str, Any]], pieces: Pieces) -> list[dict[str, Any]]:
    """All that is told of the wanted latents, by importance."""
    rate_F, mean_F = one.activity.rate_F, one.activity.mean_F
    order_F = mean_F.argsort(descending=True, stable=True)
    rank_F = order_F.argsort()
    latents = [latent for latent in order_F.tolist() if latent in wanted]
    described = []
    for latent, near, cosine in zip(latents, *nearest(one.dec_FD, latents), strict=True):
        examples = one.activity.examples(latent)
        described.append(
            {
                "number": latent,
                "rank": int(rank_F[latent]) + 1,
                "importance": float(mean_F[latent]),
                "rate": float(rate_F[latent]),
                "near": near,
                "near_shown": near in wanted,
                "cosine": cosine,
                "tasks": [
                    {"name": f"{task['dataset']}: {task['label']}", "place": place + 1, "more": difference > 0}
                    for task in tasks
                    for place, (chosen, difference) in enumerate(task["latents"])
                    if chosen == latent
                ],
                "examples": [_example(example, examples[0].largest, pieces) for example in examples],
            }
        )
    return described


def _example(example: Example, largest: float, pieces: Pieces) -> dict[str, Any]:
    """Its text as pieces, each with how dark it is: its code as a share of the latent's largest."""
    texts = [text.replace("\n", "↵") for text in pieces(example.tokens)]
    return {
        "largest": example.largest,
        "pieces": list(zip(texts, [code / largest for code in example.codes], strict=True)),
    }
