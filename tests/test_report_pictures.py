"""The report's pictures, by the numbers that they draw."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from run_folders import write_run

from cnntrain.sweeps.collect import collect
from cnntrain.sweeps.ranking import rank
from cnntrain.sweeps.report.cost import pareto
from cnntrain.sweeps.report.curves import learning_curves
from cnntrain.sweeps.report.drawing import apart, in_sight
from cnntrain.sweeps.report.effects import _means


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
        assert set(pareto(points, sign == 1)) == front
        assert len(front) < 30


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
