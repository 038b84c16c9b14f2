"""Figures of the report, by the numbers that they draw."""

from pathlib import Path

import numpy as np
import pytest
from run_folders import write_run

from cnntrain.sweeps.figures import cost, learning_curves, visible_range
from cnntrain.sweeps.ranking import means_by_value, pareto_front, rank
from cnntrain.sweeps.records import collect
from cnntrain.sweeps.report import html, svg
from cnntrain.sweeps.tables import rows


def test_learning_curves_against_numpy(tmp_path: Path) -> None:
    """The line is the mean over the seeds that reached the epoch, the band the deviation."""
    curves = [[0.6, 0.62, 0.64], [0.68, 0.7]]
    for seed, curve in enumerate(curves):
        write_run(tmp_path / f"a{seed}", seed=seed, val=curve, status="interrupted")
    write_run(tmp_path / "b", ["backend=naive"], val=[0.62, 0.7, 0.9])
    ranking = rank(collect(tmp_path))
    assert [group.label for group in ranking.groups] == ["naive", "native"]
    (axes,) = learning_curves(ranking)[0].figure.axes
    native, naive = (line.get_ydata() for line in axes.lines)  # the best is drawn last
    assert naive == pytest.approx([0.62, 0.7, 0.9])
    assert native == pytest.approx([np.mean([0.6, 0.68]), np.mean([0.62, 0.7]), 0.64])
    assert axes.lines[0].get_xdata() == pytest.approx([1, 2, 3])
    ((band,),) = (collection.get_paths() for collection in axes.collections)
    width = np.std([0.6, 0.68], ddof=1)
    assert np.ptp(band.vertices[band.vertices[:, 0] == 1, 1]) == pytest.approx(2 * width)


def test_means_are_over_the_options_in_common() -> None:
    """A missing member must not bias the mean of its value."""
    points = [(0.0, "good", 0.9), (0.0, "bad", 0.5), (1.0, "good", 0.88)]
    assert means_by_value(points) == [(0.0, 0.9), (1.0, 0.88)]
    assert means_by_value([(0.0, "a", 0.9), (0.0, "a", 0.7), (0.0, "b", 0.1), (1.0, "c", 0.5)]) == [
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
        assert set(pareto_front(points, dict.fromkeys(points, (0.0, 0.0)), sign == 1)) == front
        assert len(front) < 30


def test_a_difference_within_the_spread_is_no_domination() -> None:
    better, as_fast, slow = (10.04, 0.92), (10.0, 0.90), (20.0, 0.93)
    points = {0: slow, 1: better, 2: as_fast}
    exact = dict.fromkeys(points, (0.0, 0.0))
    assert pareto_front(points, exact, True) == [2, 1, 0]
    assert pareto_front(points, dict.fromkeys(points, (0.3, 0.001)), True) == [1, 0]
    alike = dict.fromkeys(points, (0.3, 0.05))  # nor is one better than another: the slow one goes
    assert pareto_front(points, alike, True) == [2, 1]
    losses = {i: (x, 1 - y) for i, (x, y) in points.items()}
    assert pareto_front(losses, dict.fromkeys(points, (0.3, 0.001)), False) == [1, 0]


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
        figure = cost(rank(collect(folder)))
        assert figure
        assert "Pareto front: 1: native" in svg(figure)
        assert "im2col" not in figure.caption
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
    text = html(collect(tmp_path), tmp_path)
    ranking = rank(collect(tmp_path))
    said = text.split("Not distinguished from it: ")[1].split("</span>")[0]
    second, third = (f"{i} ({ranking.groups[i - 1].label})" for i in (2, 3))
    assert said == f"{second}; {third}."
    assert ranking.groups[1].label.count(", ") == 2


@pytest.mark.parametrize("metric", ["val/acc", "val/loss"])
def test_learning_curves_show_every_epoch(metric: str, tmp_path: Path) -> None:
    """No point of a line or a band lies outside, even if one group learns nothing."""
    curves = {"native": [0.9 - 0.6 * 0.5**i for i in range(20)], "naive": [0.1] * 20}
    for backend, curve in curves.items():
        for seed in (0, 1):
            val = [value + 0.02 * seed for value in curve]
            write_run(tmp_path / f"{backend}{seed}", [f"backend={backend}"], seed=seed, val=val)
    for found in learning_curves(rank(collect(tmp_path, metric))):
        svg(found)
        (axes,) = found.figure.axes
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        drawn = [np.asarray(line.get_xydata()) for line in axes.lines]
        drawn += [path.vertices for band in axes.collections for path in band.get_paths()]
        assert len(axes.collections) == 2
        points = np.concatenate(drawn)
        assert ((points[:, 0] >= left) & (points[:, 0] <= right)).all()
        assert ((points[:, 1] >= low) & (points[:, 1] <= high)).all()
        assert np.ptp(points[:, 1]) > 0.8 * (high - low)


def test_a_diverged_member_does_not_set_the_scale() -> None:
    low, high = visible_range([0.1, 0.90, 0.91, 0.92, 0.93], maximise=True)
    assert 0.8 < low < 0.90
    assert 0.93 < high < 0.95
    low, high = visible_range([2.3, 0.30, 0.29, 0.31], maximise=False)
    assert low < 0.29
    assert 0.31 < high < 0.5
    assert visible_range([0.5], True)[0] < 0.5 < visible_range([0.5], True)[1]
