"""The picture of a training: what can be read off it, of long and of shortest logs."""

import json

import pytest

from fipo.report import draw


def log(path, steps, l0=lambda step: 64 - step):
    """Lines of two layers."""
    shared = {"loss": 0.5, "fvu": 0.3, "dead_share": 0.0, "mean_max_cosine": 0.2, "max_cosine_histogram": [1, 2]}
    lines = [
        {"step": step, "tokens": 1000 * step, "layer": layer, "l0": l0(step), **shared}
        for step in range(1, steps + 1)
        for layer in (1, 3)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture
def panels(tmp_path, monkeypatch):
    """Of a log, by title: axes as they were drawn. A warning would fail the test."""
    from matplotlib import pyplot

    close, figures = pyplot.close, []
    monkeypatch.setattr(pyplot, "close", figures.append)

    def drawn(*given):
        draw(log(tmp_path / "log.jsonl", *given), tmp_path / "a.png", "title")
        return {axis.get_title(): axis for axis in figures[-1].axes}

    yield drawn
    for figure in figures:
        close(figure)


def shown(axis):
    """Numbers at the ticks that are inside."""
    low, high = axis.get_ylim()
    inside = [place for place in axis.get_yticks() if low <= place <= high]
    return [float(axis.yaxis.get_major_formatter()(place)) for place in inside]


@pytest.mark.parametrize(("l0", "ticks"), [(lambda step: 64 - step, [40, 50, 60]), (lambda step: 2 * 8**step, None)])
def test_l0_can_be_read(panels, l0, ticks):
    found = shown(panels(30 if ticks else 3, l0)["L0, active latents a token"])
    assert found == ticks if ticks else 5 <= len(found) <= 9 and {20, 50, 100, 200} <= set(found)


def test_no_share_is_below_zero_and_layers_are_named(panels):
    drawn = panels(30)
    assert drawn["dead latents, share"].get_ylim()[0] == 0
    assert [text.get_text() for text in drawn["loss"].get_legend().texts] == ["layer 1", "layer 3"]


def test_a_single_line_of_the_log_is_seen(panels):
    drawn = panels(1)
    assert [line.get_marker() for line in drawn["FVU"].lines] == ["o", "o"]
    assert drawn["max cosine of a latent, layer 3"].get_xlim() == (0, 0.001)
    assert [line.get_marker() for line in panels(2)["FVU"].lines] == ["None", "None"]
