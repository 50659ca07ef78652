"""The page: whole, safe, and true to its sources."""

import re
from html.parser import HTMLParser

import pytest
import torch
from toys import seeded

from fipo import page
from fipo.features import Activity, Example
from fipo.page import EVENLY, IMPORTANT, others

HOSTILE = "<script>alert('&')</script>"
KS, RNG = [1, 5], "fipo"
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


def record(chosen, dataset="topics"):
    ks = KS
    means = {f"{who}_top_{k}_test_accuracy": 0.5 + k / 50 for who in ("sae", "llm", "pca", "random") for k in ks}
    of = {name: value for name, value in means.items() if name.startswith(("sae", "llm"))}
    return {
        "eval_result_protocol": {"rng": RNG},
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
                label: {"latents": latents, "mean_differences": [0.5 - place / 2 for place in range(len(latents))]}
                for label, latents in chosen.items()
            }
        },
    }


def write(tmp_path, chosen, count=2, pieces=lambda ids: [f" {HOSTILE}{n}\n" for n in ids], dataset="topics"):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"not really a picture")
    dec_FD = torch.randn(60, 8, generator=seeded())
    told = {"L0": "3.2", "FVU": "0.123"}
    made = [page.Section(f"{HOSTILE} {n}", told, record(chosen, dataset), activity(), dec_FD) for n in range(count)]
    page.write(tmp_path / "page.html", f"a title {HOSTILE}", "where from", "some text", made, pieces, picture)
    return read(tmp_path / "page.html")


def test_every_link_leads_somewhere_and_every_probed_latent_is_there(tmp_path):
    chosen = {"sport": [49, 7, 55, 3, 2, 1], "money": [7, 30]}
    reader = write(tmp_path, chosen)
    assert len(set(reader.ids)) == len(reader.ids)
    assert {link.removeprefix("#") for link in reader.links} <= set(reader.ids)
    for number in (1, 2):
        assert {f"sae-{number}-{latent}" for latent in (49, 7, 55, 3, 2, 30)} <= set(reader.ids)
    text = "".join(reader.text)
    assert "topics: sport (no. 2); topics: money (no. 1)" in text
    assert "no. 5" in text and "no. 6" not in text, "five of a probe"
    assert "not active on these tokens" in text, "latent 55"
    assert "+0.012 ± 0.004" in text and "-0.020\n" in text and "3.2" in text and "0.123" in text


def test_latents_stand_in_two_groups_by_importance(tmp_path):
    reader = write(tmp_path, {"sport": [3, 20], "money": [7]}, count=1)
    shown = [int(one.rsplit("-", 1)[1]) for one in reader.ids if re.fullmatch(r"sae-1-\d+", one)]
    mean_F = activity().mean_F
    assert set(shown[:3]) == {3, 7, 20} and set(shown[3:]) == set(others(mean_F)) - {3, 7, 20}
    for group in (shown[:3], shown[3:]):
        assert mean_F[group].tolist() == sorted(mean_F[group].tolist(), reverse=True)


def test_what_is_said_of_a_latent(tmp_path):
    """Rank and importance by brute force; the neighbour is a link where it is shown."""
    write(tmp_path, {"sport": [3, 20]}, count=1)
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    mean_F = activity().mean_F
    articles = re.findall(r'<article id="sae-1-(\d+)">(.*?)</article>', content, flags=re.DOTALL)
    shown, links = {number for number, _ in articles}, 0
    for number, article in articles:
        rank, importance = re.search(r"rank ([\d,]+), importance ([\d.e+-]+),", article).groups()
        assert int(rank) == 1 + int((mean_F > mean_F[int(number)]).sum())
        assert float(importance) == pytest.approx(float(mean_F[int(number)]), rel=0.01)
        link, near = re.search(r'nearest: (<a href="#sae-1-\d+">)?(\d+)', article).groups()
        assert bool(link) == (near in shown)
        links += bool(link)
    assert 0 < links < len(articles)


def test_nothing_of_the_text_becomes_a_tag(tmp_path):
    reader = write(tmp_path, {HOSTILE: [1]}, dataset=f"a/{HOSTILE}")
    assert "script" not in reader.tags
    text = "".join(reader.text)
    assert (
        f"a title {HOSTILE}" in text and f"{HOSTILE} 1" in text and f" {HOSTILE}7↵" in text and f"a/{HOSTILE}" in text
    )


def test_needs_no_other_file(tmp_path):
    write(tmp_path, {"sport": [1]})
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "://" not in content and 'src="data:image/png;base64,bm90' in content


def test_a_character_of_several_tokens_is_as_dark_as_the_darkest():
    """And one that is not whole at the end of an example is shown as such."""
    example = Example([2.0, 0.0, 0.0, 1.0], [5, 6, 7, 8])
    told = page._example(example, 4.0, lambda _: ["", "", "\u65e5", ""])
    assert told == {"largest": 2.0, "pieces": [("\u65e5", 0.5), ("\ufffd", 0.25)]}
    dark = page._example(example, 2.0, lambda _: ["a", "b", "", "c"])["pieces"]
    assert dark == [("a", 1.0), ("b", 0.0), ("c", 0.5)]


def test_what_would_break_a_line_is_visible(tmp_path):
    write(tmp_path, {"a\0b": [1]}, pieces=lambda ids: ["a\r\n\u2028\0\tb"] * len(ids))
    text = "".join(read(tmp_path / "page.html").text)
    assert "a\u21b5\u21b5\u2423\u2423\u2423b" in text


@pytest.mark.parametrize(("ks", "columns"), [([5, 1], ["k=1", "k=5"]), ([5], ["k=5"]), ([1, 5], ["k=1", "k=5"])])
def test_the_fewest_and_the_most_latents_are_shown(tmp_path, monkeypatch, ks, columns):
    monkeypatch.setattr("test_page.KS", ks)
    text = "".join(write(tmp_path, {"sport": [1]}, count=1).text)
    assert re.findall(r"k=\d+", text) == columns


def test_a_latent_that_is_as_active_elsewhere_is_called_the_same_everywhere(tmp_path):
    reader = write(tmp_path, {"sport": [1, 2, 3, 4, 5]}, count=1)
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    minus = re.findall(r">&minus;(\d+)</a>", content)
    less = re.findall(r"sport \(no. (\d), less active\)", "".join(reader.text))
    assert minus == ["3", "4", "5"] and sorted(less) == ["3", "4", "5"], "differences .5, 0, -.5, -1, -1.5"


def test_replayed_accuracies_are_said_to_be_other_ones(tmp_path, monkeypatch):
    assert "SAEBench's own draws" not in "".join(write(tmp_path, {"sport": [1]}).text)
    monkeypatch.setattr("test_page.RNG", "saebench")
    assert "SAEBench's own draws" in "".join(write(tmp_path, {"sport": [1]}).text)


def test_a_single_latent_has_no_neighbour(tmp_path):
    alone = page.Section("one", {}, record({"sport": [0]}), activity(11), torch.ones(1, 8))
    page.write(tmp_path / "page.html", "t", "a", "x", [alone], lambda ids: ["."] * len(ids), None)
    assert "nearest" not in "".join(read(tmp_path / "page.html").text)


@pytest.mark.parametrize("latents", [2, 10, 600])
def test_others_are_the_most_important_and_some_of_all_that_are_active(latents):
    mean_F = torch.rand(latents, generator=seeded())
    mean_F[latents // 2 :] *= mean_F[latents // 2 :] > 0.9
    rank_F = mean_F.argsort(descending=True)
    active = int((mean_F > 0).sum())
    found = others(mean_F)
    count = min(IMPORTANT, active)
    assert found[:count] == rank_F[:count].tolist()
    places = rank_F.argsort()[found[count:]].tolist()
    assert len(places) == EVENLY and places[0] == 0 and places[-1] == active - 1
    assert max(b - a for a, b in zip(places, places[1:], strict=False)) <= active / (EVENLY - 1) + 1


def test_no_latent_that_is_never_active_is_among_the_others():
    assert others(torch.zeros(50)) == []
    assert set(others(torch.tensor([0.0, 2.0, 0.0, 1.0]))) == {1, 3}
