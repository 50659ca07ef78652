"""The page: whole, safe, and true to its sources."""

import re
from html.parser import HTMLParser

import pytest
import torch
from toys import seeded

from fipo import page
from fipo.features import Activity
from fipo.page import EVENLY, IMPORTANT, others

HOSTILE = "<script>alert('&')</script>"
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Tags must close in order; keeps links, ids, tags and text."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids, self.tags, self.text = [], [], [], set(), []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.add(tag)
        self.links += [values["href"]] if "href" in values else []
        self.ids += [values["id"]] if "id" in values else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(file):
    reader = Reader()
    reader.feed(file.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


def activity(latents=60, tokens=200):
    """Latent n is active on tokens n, n + 1, ... with the code n + 1; the last ten never. Rows of ten tokens."""
    active = latents - 10
    counts = torch.tensor([tokens - n for n in range(active)] + [0] * 10)
    return Activity(
        torch.repeat_interleave(torch.arange(1.0, latents + 1), counts),
        torch.cat([torch.arange(n, tokens) for n in range(active)]),
        torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        torch.arange(tokens) // 10,
        torch.arange(tokens),
    )


def info(chosen, dataset="topics"):
    ks = [1, 5]
    means = {f"{who}_top_{k}_test_accuracy": 0.5 + k / 50 for who in ("sae", "llm", "pca", "random") for k in ks}
    of = {name: value for name, value in means.items() if name.startswith(("sae", "llm"))}
    return {
        **{"dict_size": 60, "held_out_l0": 3.25, "held_out_fvu": 0.1234, "dead_share": 0.05, "mean_max_cosine": 0.3},
        "eval_config": {"k_values": ks, "dataset_names": [dataset]},
        "eval_result_metrics": {who: {n: v for n, v in of.items() if n.startswith(who)} for who in ("llm", "sae")},
        "eval_result_details": [{"dataset_name": f"{dataset}_results", **of}],
        "eval_result_unstructured": {f"{dataset}_results": {n: dict.fromkeys(chosen, v) for n, v in of.items()}},
        "eval_result_controls": {
            "mean": {n: v for n, v in means.items() if n.startswith(("pca", "random"))},
            "margin_over_random": {
                "top_1": {"difference": 0.0123, "standard_error": 0.004},
                "top_5": {"difference": -0.02, "standard_error": None},
            },
        },
        "eval_result_chosen_latents": {
            dataset: {
                label: {"latents": latents, "mean_differences": [0.5 - place for place in range(len(latents))]}
                for label, latents in chosen.items()
            }
        },
    }


def write(tmp_path, chosen, layers=(1, 3), pieces=lambda ids: [f" {HOSTILE}{n}\n" for n in ids], dataset="topics"):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"not really a picture")
    dec_FD = torch.randn(60, 8, generator=seeded())
    made = [page.Layer(layer, info(chosen, dataset), activity(), dec_FD) for layer in layers]
    page.write(tmp_path / "page.html", f"a title {HOSTILE}", "where from", made, pieces, picture)
    return read(tmp_path / "page.html")


def test_every_link_leads_somewhere_and_every_probed_latent_is_there(tmp_path):
    chosen = {"sport": [49, 7, 55, 3, 2, 1], "money": [7, 30]}
    reader = write(tmp_path, chosen)
    assert len(set(reader.ids)) == len(reader.ids)
    assert {link.removeprefix("#") for link in reader.links} <= set(reader.ids)
    for layer in (1, 3):
        assert {f"layer-{layer}-{latent}" for latent in (49, 7, 55, 3, 2, 30)} <= set(reader.ids)
    text = "".join(reader.text)
    assert "topics: sport (no. 2, less active); topics: money (no. 1)" in text
    assert "no. 5" in text and "no. 6" not in text, "five of a probe"
    assert "not active on these tokens" in text, "latent 55"
    assert "+0.012 ± 0.004" in text and "-0.020\n" in text and "3.2" in text and "0.123" in text


def test_latents_stand_in_two_groups_by_importance(tmp_path):
    reader = write(tmp_path, {"sport": [3, 20], "money": [7]}, layers=(0,))
    shown = [int(one.rsplit("-", 1)[1]) for one in reader.ids if re.fullmatch(r"layer-0-\d+", one)]
    mean_F = activity().mean_F
    assert set(shown[:3]) == {3, 7, 20} and set(shown[3:]) == set(others(mean_F)) - {3, 7, 20}
    for group in (shown[:3], shown[3:]):
        assert mean_F[group].tolist() == sorted(mean_F[group].tolist(), reverse=True)


def test_nothing_of_the_text_becomes_a_tag(tmp_path):
    reader = write(tmp_path, {HOSTILE: [1]}, dataset=f"a/{HOSTILE}")
    assert "script" not in reader.tags
    text = "".join(reader.text)
    assert f"a title {HOSTILE}" in text and f" {HOSTILE}7↵" in text and f"a/{HOSTILE}" in text


def test_needs_no_other_file(tmp_path):
    write(tmp_path, {"sport": [1]})
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "://" not in content and 'src="data:image/png;base64,bm90' in content


@pytest.mark.parametrize("latents", [1, 10, 600])
def test_others_are_the_most_important_and_some_of_all_that_are_active(latents):
    mean_F = torch.rand(latents, generator=seeded())
    mean_F[latents // 2 :] *= mean_F[latents // 2 :] > 0.9
    rank_F = mean_F.argsort(descending=True)
    active = int((mean_F > 0).sum())
    found = others(mean_F)
    count = min(IMPORTANT, latents)
    assert found[:count] == rank_F[:count].tolist()
    places = rank_F.argsort()[found[count:]].tolist()
    assert len(places) == EVENLY and places[0] == 0 and places[-1] == max(0, active - 1)
    assert max(b - a for a, b in zip(places, places[1:], strict=False)) <= active / (EVENLY - 1) + 1
