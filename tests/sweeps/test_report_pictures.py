"""The report's pictures, by the numbers that they draw."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from run_folders import write_run

from cnntrain.sweeps.collect import collect
from cnntrain.sweeps.ranking import rank
from cnntrain.sweeps.report.cost import cost, pareto
from cnntrain.sweeps.report.curves import learning_curves
from cnntrain.sweeps.report.drawing import apart, in_sight
from cnntrain.sweeps.report.effects import _means
from cnntrain.sweeps.report.page import page
from cnntrain.sweeps.tables import rows


def test_learning_curves_against_numpy(tmp_path: Path) -> None:
    """The line is the mean over the seeds that got so far: read back from the picture."""
    curves = [[0.6, 0.62, 0.64], [0.68, 0.7]]  # high enough for all to lie within the picture
    for seed, curve in enumerate(curves):
        write_run(tmp_path / f"a{seed}", seed=seed, val=curve, status="interrupted")
    write_run(tmp_path / "b", ["backend=naive"], val=[0.62, 0.7, 0.9])
    ranking = rank(collect(tmp_path))
    assert [group.label for group in ranking.groups] == ["naive", "native"]
    picture = learning_curves(ranking)[0]
    # Differences of heights are differences of values, all by the same scale.
    heights = {g: path_heights(picture.svg, g) for g in (0, 1)}
    naive, native = [0.62, 0.7, 0.9], [np.mean([0.6, 0.68]), np.mean([0.62, 0.7]), 0.64]
    scale = (heights[0][0] - heights[0][2]) / (naive[2] - naive[0])
    for found, values in ((heights[0], naive), (heights[1], native)):
        for (a, b), (x, y) in zip(pairwise(found), pairwise(values), strict=True):
            assert a - b == pytest.approx(scale * (y - x), abs=0.01)
    assert heights[1][0] - heights[0][0] == pytest.approx(scale * (0.62 - native[0]), abs=0.01)


def path_heights(svg: str, group: int) -> list[float]:
    """The y of every point of the line of a group, in the picture's units, downwards."""
    for part in svg.split(f'<g class="g g{group}">')[1:]:
        path = re.search(r'd="(M[^z"]*)"', part)
        if path and "fill: none" in part[: part.index("/>")]:
            return [float(y) for _, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path[1])]
    raise AssertionError("no line")


def test_means_are_over_what_values_have_in_common() -> None:
    """A value whose bad member is missing must not look better for it."""
    points = [(0.0, "good", 0.9), (0.0, "bad", 0.5), (1.0, "good", 0.88)]
    assert _means(points) == [(0.0, 0.9), (1.0, 0.88)]
    assert _means([(0.0, "a", 0.9), (0.0, "a", 0.7), (0.0, "b", 0.1), (1.0, "c", 0.5)]) == [
        (0.0, pytest.approx((0.9 + 0.7 + 0.1) / 3)),
        (1.0, 0.5),
    ]


def test_the_pareto_front_by_brute_force() -> None:
    random = np.random.default_rng(0)
    for sign in (1, -1):
        points = {i: (float(x), float(y)) for i, (x, y) in enumerate(random.random((30, 2)))}
        front = {
            i
            for i, (x, y) in points.items()
            if not any(
                a <= x and sign * b >= sign * y and (a, b) != (x, y) for a, b in points.values()
            )
        }
        assert set(pareto(points, dict.fromkeys(points, (0.0, 0.0)), sign == 1)) == front
        assert len(front) < 30


def test_a_difference_within_the_spread_is_no_domination() -> None:
    better, as_fast, slow = (10.04, 0.92), (10.0, 0.90), (20.0, 0.93)
    points = {0: slow, 1: better, 2: as_fast}
    exact = dict.fromkeys(points, (0.0, 0.0))
    assert pareto(points, exact, True) == [2, 1, 0]
    assert pareto(points, dict.fromkeys(points, (0.3, 0.001)), True) == [1, 0]
    alike = dict.fromkeys(points, (0.3, 0.05))  # nor is one better than another: the slow one goes
    assert pareto(points, alike, True) == [2, 1]
    losses = {i: (x, 1 - y) for i, (x, y) in points.items()}
    assert pareto(losses, dict.fromkeys(points, (0.3, 0.001)), False) == [1, 0]


def test_the_cost_has_the_seconds_spread(tmp_path: Path) -> None:
    """A group that is 0.04 s faster and clearly worse is not on the front, whatever the seeds."""
    for seeds in (3, 1):
        folder = tmp_path / str(seeds)
        for seed in range(seeds):
            for backend, seconds, val in (("native", 10.04, 0.92), ("im2col", 10.0, 0.8)):
                write_run(
                    folder / f"{backend}{seed}",
                    [f"backend={backend}"],
                    seed=seed,
                    val=[val + 0.001 * seed],
                    seconds=seconds + 0.3 * (seed - 1),
                )
        picture = cost(rank(collect(folder)))
        assert picture
        assert "the Pareto front is 1: native" in picture.svg
        assert "im2col" not in picture.caption
        assert ("a single run are taken to vary by 5%" in picture.caption) == (seeds == 1)
    groups = rank(collect(tmp_path / "3")).groups
    assert groups[0].seconds_deviation == pytest.approx(0.3)
    assert any("10 ± 0.3" in row for row in rows(rank(collect(tmp_path / "3"))))


def test_the_headline_names_each_group_once_and_apart(tmp_path: Path) -> None:
    """Groups whose labels have commas, and values in common."""
    for backend in ("native", "im2col", "naive"):
        for seed in range(3):
            options = [f"backend={backend}", "model=shallow", "optimizer.lr=0.01"]
            name = f"{backend}{seed}"
            write_run(tmp_path / name, options, seed=seed, val=[0.9 + 0.01 * seed])
            options = [f"backend={backend}", "model=lenet5", "optimizer.lr=0.02"]
            write_run(tmp_path / f"lenet{name}", options, seed=seed, val=[0.3 + 0.01 * seed])
    text = page(collect(tmp_path), tmp_path)
    ranking = rank(collect(tmp_path))
    said = text.split("Not told apart from it: ")[1].split("</span>")[0]
    second, third = (f"{i} ({ranking.groups[i - 1].label})" for i in (2, 3))
    assert said == f"{second}; {third}."
    assert ranking.groups[1].label.count(", ") == 2


CURVES = {  # of two groups: two epochs whose finals tie, many epochs, one that learns nothing
    "ties": [[0.3, 0.9], [0.5, 0.9]],
    "three": [[0.3, 0.8, 0.9], [0.5, 0.85, 0.91]],
    "many": [[0.9 - 0.6 * 0.5**i for i in range(20)], [0.91 - 0.5 * 0.6**i for i in range(20)]],
    "stuck": [[0.9 - 0.6 * 0.5**i for i in range(20)], [0.1] * 20],
    "one": [[0.7], [0.8]],
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("metric", ["val/acc", "val/loss"])
def test_learning_curves_show_every_epoch(
    name: str, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No point of a line or a band lies outside; a small picture covers none of them."""
    for backend, curve in zip(("native", "naive"), CURVES[name], strict=True):
        for seed in (0, 1):
            val = [value + 0.02 * seed for value in curve]
            write_run(tmp_path / f"{backend}{seed}", [f"backend={backend}"], seed=seed, val=val)
    painted: list[Figure] = []
    savefig = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        savefig(self, *args, **options)
        painted.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    pictures = learning_curves(rank(collect(tmp_path, metric)))
    assert len(painted) == len(pictures) == 2
    for figure, picture in zip(painted, pictures, strict=True):
        (axes,) = figure.axes
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        drawn = [*(line.get_xydata() for line in axes.lines)]
        drawn += [path.vertices for band in axes.collections for path in band.get_paths()]
        assert len(axes.collections) == 2
        for points in map(np.asarray, drawn):
            assert ((points[:, 0] >= left) & (points[:, 0] <= right)).all()
            assert ((points[:, 1] > low) & (points[:, 1] < high)).all()
        values = np.concatenate([points[:, 1] for points in drawn])
        assert np.ptp(values) > 0.8 * (high - low)  # and little else is inside
        insets = axes.child_axes
        assert len(insets) == (name in ("many", "stuck"))
        assert ("The small picture" in picture.caption) == bool(insets)
        for inset in insets:
            box = inset.get_tightbbox().transformed(axes.transData.inverted())
            for points in (line.get_xydata() for line in axes.lines):
                at = np.linspace(box.x0, box.x1, 100)
                heights = np.interp(at, *np.asarray(points).T)
                assert ((heights < box.y0) | (heights > box.y1)).all()
            assert inset.get_xlim()[1] == right
            better = axes.lines[1].get_xydata()[-1, 1]  # the best is drawn last
            assert inset.get_ylim()[0] < better < inset.get_ylim()[1]
            assert np.ptp(inset.get_ylim()) < (high - low) / 3


def test_labels_do_not_overlap() -> None:
    random = np.random.default_rng(1)
    heights = [float(h) for h in random.random(12) * 0.3 + 0.7]
    placed = apart(heights, 0.08, 0.0, 1.0)
    assert all(b - a >= 0.08 - 1e-6 for a, b in pairwise(sorted(placed)))
    assert max(placed) <= 1 + 1e-9
    assert np.argsort(placed).tolist() == np.argsort(heights).tolist()
    many = apart([0.5] * 5, 0.1, 0.0, 1.0)
    assert sorted(many) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert apart([0.2, 0.8], 0.1, 0.0, 1.0) == [0.2, 0.8]


def test_a_diverged_member_does_not_press_the_others_together() -> None:
    low, high = in_sight([0.1, 0.90, 0.91, 0.92, 0.93], maximise=True)
    assert 0.8 < low < 0.90
    assert 0.93 < high < 0.95
    low, high = in_sight([2.3, 0.30, 0.29, 0.31], maximise=False)
    assert low < 0.29
    assert 0.31 < high < 0.5
    assert in_sight([0.5], True)[0] < 0.5 < in_sight([0.5], True)[1]
