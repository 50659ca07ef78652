"""fipo.pareto: points of both kinds of result files, one line a method."""

import json

import pytest

from fipo.cli import main
from fipo.compare import pareto_points
from fipo.errors import UserError
from fipo.pareto import Point, draw_pareto, ground_truth_points, in_order, line, references
from tests.test_compare import finished


def ground_truth(path):
    """A result file with two methods at two sparsities, two seeds each."""
    rows = [
        {
            "method": method,
            "k": k,
            "seed": seed,
            "explained_variance": 0.1 * k + 0.01 * seed,
            "f1": 0.2 * k + 0.1 * seed,
        }
        for method in ("ours", "rival")
        for k in (3, 1)
        for seed in (0, 2)
    ]
    path.write_text(json.dumps({"settings": {"features": 1024}, "rows": rows}))
    return path


def test_seeds_of_a_setting_are_one_point_and_the_line_goes_by_explained_variance(tmp_path):
    points = ground_truth_points(ground_truth(tmp_path / "a.json"))
    assert len(points) == 8 and {point.panel for point in points} == {"F1 of 1,024 known features"}
    found = line([point for point in points if point.method == "ours"])
    spread = pytest.approx(0.2 / 2**0.5)
    assert found == [
        ("k 1", pytest.approx(0.11), pytest.approx(0.3), spread),
        ("k 3", pytest.approx(0.31), pytest.approx(0.7), spread),
    ]


def test_one_seed_has_no_spread():
    assert line([Point("p", "m", "k 1", 0.5, 0.7)]) == [("k 1", 0.5, 0.7, 0.0)]


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": {"features": 4}, "rows": [{"method": "a"}]}'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a.json"):
        ground_truth_points(tmp_path / "a.json")


def test_a_picture_is_written_whole(tmp_path):
    draw_pareto([Point("p", "m", "k 1", 0.5, 0.7)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("name", "begins"), [("a.pdf", b"%PDF"), ("a.svg", b"<?xml")])
def test_the_name_says_the_format(tmp_path, name, begins):
    draw_pareto([Point("p", "m", "k 1", 0.5, 0.7)], tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_another_format_is_refused_before_anything_is_read(tmp_path, capsys, name):
    assert main(["compare", str(tmp_path / "none"), "--picture", str(tmp_path / name)]) == 2
    assert f"{name}; expected a name in .png, .pdf, .svg" in capsys.readouterr().err


def test_layers_stand_in_their_order():
    assert in_order(["m, layer 12", "F1 of 1,024", "m, layer 5", "m, layer 12"]) == [
        *("F1 of 1,024", "m, layer 5", "m, layer 12")
    ]


def test_references_are_means():
    points = [Point("p", "m", "k 1", 0.5, 0.7, (("a", a), ("b", 0.5))) for a in (0.2, 0.4)]
    assert references(points) == {"a": pytest.approx(0.3), "b": 0.5} and not references([Point("p", "m", "", 0.5, 1)])


def test_a_picture_says_what_is_in_it(tmp_path, monkeypatch):
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    points = [
        Point(f"top-1, layer {layer}", method, f"k {k}", 0.01 * k, 0.6, (("random SAE", 0.5),))
        for layer in (3, 1)
        for method in ("ours", "rival")
        for k in (16, 32)
    ]
    draw_pareto(points, tmp_path / "a.png")
    (figure,) = drawn
    assert [axis.get_title() for axis in figure.axes] == ["layer 1", "layer 3"]
    for axis in figure.axes:
        assert axis.get_ylabel() == "top-1" and len(axis.get_xticks()) < 9
        assert sorted(text.get_text() for text in axis.texts) == ["k 16", "k 16", "k 32", "k 32"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["ours", "rival", "random SAE"]
    assert "standard deviation over seeds" in figure.get_supxlabel()
    monkeypatch.undo()
    pyplot.close(figure)


def test_runs_are_drawn_beside_channels_components_and_random_sae(tmp_path):
    folder = finished(tmp_path / "a", "run_6", 1, 0.3)
    (point,) = pareto_points([folder])
    assert point.references == (("channels of the model", 0.6),)
    info = json.loads((folder / "final_info.json").read_text())
    means = {"pca_top_1_test_accuracy": 0.65, "random_top_1_test_accuracy": 0.55}
    margin = {"difference": 0.1, "standard_error": 0.01}
    controls = {"mean": means, "datasets": {"a": means}, "margin_over_random": {"top_1": margin}}
    info["layers"]["3"]["eval_result_controls"] = controls
    (folder / "final_info.json").write_text(json.dumps(info))
    (point,) = pareto_points([folder])
    assert point.references[1:] == (("principal components", 0.65), ("random SAE", 0.55))


def test_compare_draws_runs_and_known_features_side_by_side(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("fipo.pareto.draw_pareto", lambda points, path: drawn.append((points, path)))
    folders = [finished(tmp_path / f"k{k}", "run_6", 1, 0.3 + k / 100, k=k) for k in (16, 32)]
    given = [*folders, ground_truth(tmp_path / "a.json"), "--picture", tmp_path / "a.png"]
    assert main(["compare", *map(str, given)]) == 0
    [(points, path)] = drawn
    assert path == tmp_path / "a.png" and len(points) == 10
    runs = [point for point in points if point.panel == "top-1 of sparse probing, minilm, layer 3"]
    assert [(p.method, p.setting, p.score) for p in runs] == [("run_6", "k 16", 0.7), ("run_6", "k 32", 0.7)]
    assert [p.explained_variance for p in runs] == [pytest.approx(0.54), pytest.approx(0.38)]
    assert "| run_6, k 16 | 3 | 0.460 |" in capsys.readouterr().out


def test_a_picture_needs_something_to_draw(tmp_path, capsys):
    assert main(["compare", str(ground_truth(tmp_path / "a.json"))]) == 2
    assert "--picture OUT.png" in capsys.readouterr().err
