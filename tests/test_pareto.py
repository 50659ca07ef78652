"""fipo.pareto: points of both kinds of result files, one line a method."""

import json

import pytest

from fipo.cli import main
from fipo.errors import UserError
from fipo.pareto import Point, draw_pareto, ground_truth_points, line
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
        (pytest.approx(0.11), pytest.approx(0.3), spread),
        (pytest.approx(0.31), pytest.approx(0.7), spread),
    ]


def test_one_seed_has_no_spread():
    assert line([Point("p", "m", "k 1", 0.5, 0.7)]) == [(0.5, 0.7, 0.0)]


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": {"features": 4}, "rows": [{"method": "a"}]}'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a.json"):
        ground_truth_points(tmp_path / "a.json")


def test_a_picture_is_written_whole(tmp_path):
    draw_pareto([Point("p", "m", "k 1", 0.5, 0.7)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


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
