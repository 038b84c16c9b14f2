"""Figures of the report: the numbers that they show."""

from pathlib import Path

import numpy as np
import pytest
from run_folders import write_run

from cnntrain.sweeps.ranking import rank
from cnntrain.sweeps.records import collect
from cnntrain.sweeps.report import learning_curves, svg, visible_range


def test_learning_curves_against_numpy(tmp_path: Path) -> None:
    """The line is the mean over the seeds that reached the epoch, the band the deviation."""
    curves = [[0.6, 0.62, 0.64], [0.68, 0.7]]
    for seed, curve in enumerate(curves):
        write_run(tmp_path / f"a{seed}", seed=seed, val=curve, status="interrupted")
    write_run(tmp_path / "b", ["backend=naive"], val=[0.62, 0.7, 0.9])
    ranking = rank(collect(tmp_path))
    assert [group.label for group in ranking.groups] == ["naive", "native"]
    (axes,) = learning_curves(ranking)[0].axes
    native, naive = (line.get_ydata() for line in axes.lines)  # the best is drawn last
    assert naive == pytest.approx([0.62, 0.7, 0.9])
    assert native == pytest.approx([np.mean([0.6, 0.68]), np.mean([0.62, 0.7]), 0.64])
    assert axes.lines[0].get_xdata() == pytest.approx([1, 2, 3])
    ((band,),) = (collection.get_paths() for collection in axes.collections)
    width = np.std([0.6, 0.68], ddof=1)
    assert np.ptp(band.vertices[band.vertices[:, 0] == 1, 1]) == pytest.approx(2 * width)


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
        (axes,) = found.axes
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        drawn = [np.asarray(line.get_xydata()) for line in axes.lines]
        drawn += [path.vertices for band in axes.collections for path in band.get_paths()]
        assert len(axes.collections) == 2
        points = np.concatenate(drawn)
        assert ((points[:, 0] >= left) & (points[:, 0] <= right)).all()
        assert ((points[:, 1] >= low) & (points[:, 1] <= high)).all()
        assert np.ptp(points[:, 1]) > 0.8 * (high - low)


def test_visible_range() -> None:
    low, high = visible_range([0.1, 0.90, 0.91, 0.92, 0.93], maximise=True)
    assert 0.8 < low < 0.90
    assert 0.93 < high < 0.95
    low, high = visible_range([2.3, 0.30, 0.29, 0.31], maximise=False)
    assert low < 0.29
    assert 0.31 < high < 0.5
    assert visible_range([0.5], True)[0] < 0.5 < visible_range([0.5], True)[1]
