"""A page to look at: scores of SAEs, the latents that probes took for each concept, and what those respond to.

One HTML file that needs nothing beside it. This is the only module that imports jinja2.
"""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fipo.data.lm import BROKEN
from fipo.features import Activity, Example
from fipo.files import replacing
from fipo.metrics import nearest
from fipo.names import CONTROLS
from fipo.report import margin_text
from fipo.saebench import dataset_metrics, metric_name, overall_metrics

TEMPLATE = Path(__file__).with_name("page.html")
OF_A_PROBE = 5
"""Latents shown of every probe."""
IMPORTANT, EVENLY = 24, 24
"""Other latents shown: the most important ones, and some evenly spaced over the ranks of all that are active."""

HIDDEN = (*range(32), *range(127, 160), *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF)
VISIBLE = dict.fromkeys(HIDDEN, "\u2423") | dict.fromkeys(map(ord, "\n\r"), "\u21b5")
"""What is shown in place of characters that would break a line, or that nobody sees."""

Pieces = Callable[[Sequence[int]], list[str]]
"""Token ids -> what each adds to the text."""


class Section(NamedTuple):
    """What the page tells of one SAE."""

    name: str
    measures: dict[str, str]
    """Name -> value, in words."""
    record: dict[str, Any]
    """Its probing result."""
    activity: Activity
    dec_FD: Tensor


def write(
    file: Path, title: str, about: str, text: str, saes: Sequence[Section], pieces: Pieces, picture: Path | None
) -> None:
    """Make the page; `about`: a line on where all comes from, `text`: what the examples are of, `picture`: a PNG."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        about=about,
        controls=CONTROLS,
        text=text,
        saes=[_told(one, pieces) for one in saes],
        picture=None if picture is None else base64.b64encode(picture.read_bytes()).decode(),
    )
    with replacing(file) as temporary:
        temporary.write_text(page, encoding="utf-8")


def others(mean_F: Tensor) -> list[int]:
    """Latents that are shown whatever the probes took, given the importance of all; none that is never active."""
    order_N = mean_F.argsort(descending=True, stable=True)[: int((mean_F > 0).sum())]
    evenly = torch.linspace(0, len(order_N) - 1, EVENLY).round().long() if len(order_N) else []
    return [*order_N[:IMPORTANT].tolist(), *order_N[evenly].tolist()]


def _told(one: Section, pieces: Pieces) -> dict[str, Any]:
    tasks, mean_F = _tasks(one.record), one.activity.mean_F
    probed = {latent for task in tasks for latent, _ in task["latents"]}
    latents = _latents(one, mean_F, probed.union(others(mean_F)), tasks, pieces)
    return {
        "name": one.name,
        "measures": one.measures,
        "scores": _scores(one.record),
        "replayed": one.record["eval_result_protocol"]["rng"] == "saebench",
        "tasks": tasks,
        "tokens": one.activity.tokens,
        "groups": {
            "Latents that the probes took": [latent for latent in latents if latent["tasks"]],
            "Other latents": [latent for latent in latents if not latent["tasks"]],
        },
    }


def _scores(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean accuracy by k: latents, the controls, and the margin over the random SAE."""
    means = {**overall_metrics(record), **record["eval_result_controls"]["mean"]}
    margins = record["eval_result_controls"]["margin_over_random"]
    return [
        {
            "k": k,
            "sae": means[metric_name("sae", k)],
            "controls": [means[metric_name(who, k)] for who in CONTROLS],
            "margin": margin_text(margins[f"top_{k}"]),
        }
        for k in record["eval_config"]["k_values"]
    ]


def _tasks(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every class of every dataset with the accuracy of its probes and the first latents they take."""
    ks = record["eval_config"]["k_values"]
    tasks = []
    for dataset in dataset_metrics(record):
        accuracies = record["eval_result_unstructured"][f"{dataset}_results"]
        for label, chosen in record["eval_result_chosen_latents"][dataset].items():
            pairs = list(zip(chosen["latents"], chosen["mean_differences"], strict=True))[:OF_A_PROBE]
            by_k = [(k, accuracies[metric_name("sae", k)][label]) for k in sorted({min(ks), max(ks)})]
            tasks.append({"dataset": dataset, "label": label, "accuracies": by_k, "latents": pairs})
    return tasks


def _latents(
    one: Section, mean_F: Tensor, wanted: set[int], tasks: list[dict[str, Any]], pieces: Pieces
) -> list[dict[str, Any]]:
    """All that is told of the wanted latents, by importance."""
    rate_F = one.activity.rate_F
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
                    {"name": f"{task['dataset']}: {task['label']}", "place": place + 1, "more": difference >= 0}
                    for task in tasks
                    for place, (chosen, difference) in enumerate(task["latents"])
                    if chosen == latent
                ],
                "examples": [_example(example, examples[0].largest, pieces) for example in examples],
            }
        )
    return described


def _example(example: Example, largest: float, pieces: Pieces) -> dict[str, Any]:
    """Its text as pieces, each with how dark it is: its code as a share of the latent's largest. Of a character that
    several tokens make together that is the largest of theirs."""
    told, share = [], 0.0
    for text, code in zip(pieces(example.tokens), example.codes, strict=True):
        share = max(share, code / largest)
        if text:
            told.append((text.translate(VISIBLE), share))
            share = 0.0
    if share:
        told.append((BROKEN, share))
    return {"largest": example.largest, "pieces": told}
