"""All options side by side: parallel coordinates (Inselberg 1985)."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes

from cnntrain.sweeps.collect import Collection
from cnntrain.sweeps.ranking import Ranking
from cnntrain.sweeps.record import plain
from cnntrain.sweeps.report.drawing import (
    GREY,
    INK,
    PAPER,
    Picture,
    clipped,
    declared_log,
    draw,
    in_sight,
    is_number,
    look,
    spread_widely,
)
from cnntrain.sweeps.tables import number, unit

MOST_AXES = 9
FROM = 3  # options; with fewer a panel for each says it all


def parallel_coordinates(ranking: Ranking) -> Picture | None:
    """A line for each group through its values of all options to its mean of the metric.

    Of the groups, not of the members: else the luckiest seed would be the best.
    """
    collection, groups = ranking.collection, ranking.ranked
    options = collection.options[:MOST_AXES]
    if len(groups) < 2 or (len(options) < FROM and collection.search is None):
        return None
    metric = collection.metric
    scales = {o: _Scale.of(collection, o, [group.values for group in groups]) for o in options}
    means = [group.mean for group in groups if group.mean is not None]
    low, high = in_sight(means, collection.maximise)
    last = len(options)

    def paint(axes: Axes) -> None:
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.vlines(range(last + 1), 0, 1, color=GREY, linewidth=1, zorder=4)
        for x, option in enumerate(options):
            for height, label in scales[option].ticks:
                _tick(axes, x, height, label)
        for i in range(5):
            _tick(axes, last, i / 4, number(metric, low + (high - low) * i / 4))
        for i, (group, mean) in enumerate(zip(groups, means, strict=True)):
            share = 1 - i / (len(groups) - 1)
            heights = [scales[o].height(group.values.get(o)) for o in options]
            heights.append(min(max((mean - low) / (high - low), 0), 1))
            axes.plot(*_smooth(heights), gid=f"g{i}-path", solid_capstyle="round",
                      color=look(0 if i else 1).colour, alpha=0.06 + 0.8 * share**3 if i else 1,
                      linewidth=0.8 + 0.9 * share if i else 2.6, zorder=2 if i else 3)  # fmt: skip
        names = [clipped(option.replace(".", ".\n", 1), 40) for option in options]
        axes.set_xticks(range(last + 1), [*names, f"{metric}{unit(metric)}"], color=INK)
        axes.xaxis.tick_top()
        axes.set_yticks([])
        axes.set_xlim(-0.35, last + 0.35)
        axes.set_ylim(-0.04, 1.03)

    said = f"{number(metric, means[0])}{unit(metric)}"
    alt = f"Parallel coordinates of {len(groups)} groups; the best, {said}, is {groups[0].label}"
    caption = (
        "A line is a row of the ranking: from its values on the left to its mean "
        f"{metric} on the right, the stronger the better; orange is the best, {said}. Where strong "
        "lines meet on an axis, that value matters; where they scatter, it does not."
    )
    if any(option not in group.values for option in options for group in groups):
        caption += " n/a: the option has no part in it."
    if (more := len(collection.options) - MOST_AXES) > 0:
        caption += f" {more} more options are left out."
    size = (max(5.4, 1.5 * (len(options) + 1)), 3.6)
    return Picture(draw("coordinates", alt, size, paint, ranking), caption)


class _Scale:
    """An axis of the parallel coordinates, from 0 at the bottom to 1."""

    def __init__(self, ticks: list[tuple[float, str]], numeric: bool, log: bool, ends: Any):
        self.ticks, self.numeric, self.log, self.ends = ticks, numeric, log, ends

    @classmethod
    def of(cls, collection: Collection, option: str, given: Sequence[dict[str, Any]]) -> "_Scale":
        values = [one[option] for one in given if option in one]
        missing = len(values) < len(given)
        bottom = 0.15 if missing else 0.0
        none = [(0.0, "n/a")] if missing else []
        if values and all(map(is_number, values)):
            log = declared_log(collection, option)
            log = min(values) > 0 and (spread_widely(values) if log is None else log)
            low, high = (math.log(v) if log else float(v) for v in (min(values), max(values)))
            scale = cls([], True, log, (low, high, bottom))
            few = sorted(set(values))
            if len(few) > 6:
                steps = [low + (high - low) * i / 4 for i in range(5)]
                few = [math.exp(s) if log else s for s in steps]
            scale.ticks = none + [(scale.height(v), f"{v:.3g}") for v in few]
            return scale
        names = list(dict.fromkeys(map(plain, values)))
        heights = {
            name: bottom + (1 - bottom) * (i + 0.5) / len(names) for i, name in enumerate(names)
        }
        ticks = none + [(height, clipped(name, 14)) for name, height in heights.items()]
        return cls(ticks, False, False, heights)

    def height(self, value: Any) -> float:
        if value is None:
            return 0.0
        if not self.numeric:
            return float(self.ends[plain(value)])
        low, high, bottom = self.ends
        at = math.log(value) if self.log else float(value)
        return float(bottom + (1 - bottom) * ((at - low) / (high - low) if high > low else 0.5))


def _smooth(heights: Sequence[float]) -> tuple[list[float], list[float]]:
    """A curve that is level at every axis, so that lines that meet there can be told apart."""
    xs, ys = [], []
    for x, (a, b) in enumerate(pairwise(heights)):
        for i in range(12):
            t = i / 12
            xs.append(x + t)
            ys.append(a + (b - a) * t * t * (3 - 2 * t))
    return [*xs, len(heights) - 1], [*ys, heights[-1]]


def _tick(axes: Axes, x: float, height: float, label: str) -> None:
    box = {"boxstyle": "round,pad=0.12", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.75}
    axes.text(x + 0.03, height, label, va="center", fontsize=8, color=INK, zorder=5, bbox=box)
