"""What each option does: the metric against its values, and all options side by side."""

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from cnntrain.sweeps.collect import Collection, Member, plain
from cnntrain.sweeps.ranking import Ranking, text
from cnntrain.sweeps.report.drawing import (
    GREY,
    INK,
    PAPER,
    SOFT,
    Picture,
    clipped,
    draw,
    in_sight,
    look,
    number_axis,
    spread_widely,
    value_axis,
)
from cnntrain.sweeps.tables import number, unit

SIZE = (3.3, 2.7)
MOST_PANELS = 12
MOST_AXES = 9
COORDINATES_FROM = 3  # options; with fewer the panels say it all
Point = tuple[int, Member, float]  # group, member, value of the metric that ranks


def effects(ranking: Ranking) -> list[Picture]:
    """The metric that ranks against each option that varies, a point for each member."""
    points, failed = _points(ranking)
    if not points:
        return []
    several = [
        option
        for option in ranking.collection.options
        if len({plain(m.values[option]) for _, m, _ in points if option in m.values}) > 1
    ]
    return [_effect(ranking, option, points, failed) for option in several[:MOST_PANELS]]


def parallel_coordinates(ranking: Ranking) -> Picture | None:
    """A line for each member through its values of all options to its value of the metric."""
    collection = ranking.collection
    points, _ = _points(ranking)
    options = collection.options[:MOST_AXES]
    if len(points) < 2 or (len(options) < COORDINATES_FROM and collection.search is None):
        return None
    metric, maximise = collection.metric, collection.maximise
    axes_of = {o: _Scale.of(collection, o, [m for _, m, _ in points]) for o in options}
    low, high = in_sight([value for _, _, value in points], maximise)
    order = sorted(points, key=lambda p: p[2], reverse=not maximise)  # the best one last, on top

    def paint(axes: Axes) -> None:
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        for x, option in enumerate(options):
            axes.vlines(x, 0, 1, color=GREY, linewidth=1, zorder=4)
            for height, label in axes_of[option].ticks:
                _tick(axes, x, height, label)
        last = len(options)
        axes.vlines(last, 0, 1, color=GREY, linewidth=1, zorder=4)
        for i in range(5):
            _tick(axes, last, i / 4, number(metric, low + (high - low) * i / 4))
        for place, (group, member, value) in enumerate(order):
            share = place / max(1, len(order) - 1)
            heights = [axes_of[o].height(member.values.get(o)) for o in options]
            heights.append(min(max((value - low) / (high - low), 0), 1))
            best = place == len(order) - 1
            axes.plot(*_smooth(heights), gid=f"g{group}-path", solid_capstyle="round",
                      color=look(1).colour if best else look(0).colour,
                      alpha=1 if best else 0.06 + 0.8 * share**3,
                      linewidth=2.6 if best else 0.8 + 0.9 * share,
                      zorder=3 if best else 2)  # fmt: skip
        names = [clipped(option.replace(".", ".\n", 1), 40) for option in options]
        axes.set_xticks(range(last + 1), [*names, f"{metric}{unit(metric)}"], color=INK)
        axes.xaxis.tick_top()
        axes.set_yticks([])
        axes.set_xlim(-0.35, last + 0.35)
        axes.set_ylim(-0.04, 1.03)

    _, best, value = order[-1]
    chosen = ", ".join(f"{o}={text(best.values[o])}" for o in options if o in best.values)
    said = f"{number(metric, value)}{unit(metric)}"
    alt = f"Parallel coordinates of {len(points)} members; the best, {said}, has {chosen}"
    caption = (
        f"A line is a member: from its values on the left to its {metric} on the right. The "
        f"stronger the line the better; orange is the best, {said}. Where strong lines meet on an "
        "axis, that value matters; where they scatter, it does not."
    )
    if collection.search is not None and any("when" in str(s) for s in _space(collection).values()):
        caption += " n/a: the option has no part in that member."
    size = (max(5.4, 1.5 * (len(options) + 1)), 3.6)
    return Picture(draw("coordinates", alt, size, paint, ranking), caption)


def _effect(
    ranking: Ranking, option: str, points: Sequence[Point], failed: Sequence[Member]
) -> Picture:
    collection = ranking.collection
    metric, maximise = collection.metric, collection.maximise
    with_it = [(g, m, v) for g, m, v in points if option in m.values]
    without = [m for m in failed if option in m.values]
    values = [m.values[option] for _, m, _ in with_it]
    numeric = all(map(is_number, values))
    names = [] if numeric else [plain(v) for v in collection.over[option]]
    low, high = in_sight([v for _, _, v in with_it], maximise)
    inside = 0.03 * (high - low)
    shuffled = random.Random(0)

    def place(member: Member, jitter: bool = True) -> float:
        value = member.values[option]
        if numeric:
            return float(value)
        return names.index(plain(value)) + (shuffled.uniform(-0.16, 0.16) if jitter else 0)

    means = _means([(place(m, jitter=False), _others(m, option, collection), v)
                    for _, m, v in with_it])  # fmt: skip
    # Several members at each value, and none for being promising.
    grid = collection.search is None and len(means) <= max(2, len(with_it) / 2)

    def paint(axes: Axes) -> None:
        for group, member, v in reversed(with_it):
            shown = look(group)
            axes.scatter(place(member), min(max(v, low + inside), high - inside), s=26,
                         color=shown.colour, alpha=0.9 if shown.highlighted else 0.5,
                         edgecolor=PAPER, linewidth=0.5, gid=f"g{group}-point",
                         zorder=3 if shown.highlighted else 2)  # fmt: skip
        if grid and numeric:
            axes.plot(*zip(*means, strict=True), color=INK, linewidth=1.4, zorder=4)
        elif not numeric:
            for x, mean in means:
                axes.hlines(mean, x - 0.28, x + 0.28, color=INK, linewidth=1.8, zorder=4)
        if without and (not numeric or all(is_number(m.values[option]) for m in without)):
            at = [place(m) for m in without if numeric or plain(m.values[option]) in names]
            axes.scatter(at, [low + inside] * len(at), marker="x", s=24, color=SOFT, zorder=3)
        axes.set_ylim(low, high)
        value_axis(axes, metric)
        if numeric:
            everywhere = [float(v) for v in (*values, *(m.values[option] for m in without))
                          if is_number(v)]  # fmt: skip
            number_axis(axes, everywhere, declared_log(collection, option))
            axes.margins(x=0.08)
        else:
            most = max(6, 40 // len(names))
            tilted = len(names) > 3 and max(map(len, names)) > 8
            axes.set_xticks(range(len(names)), [clipped(n, most) for n in names],
                            rotation=30 if tilted else 0, ha="right" if tilted else "center",
                            rotation_mode="anchor")  # fmt: skip
            axes.set_xlim(-0.5, len(names) - 0.5)
            axes.grid(visible=False, axis="x")
        axes.set_title(clipped(option, 34))

    best = max(means, key=lambda mean: mean[1] if maximise else -mean[1])
    called = f"{best[0]:.4g}" if numeric else names[int(best[0])]
    said = f"{number(metric, best[1])}{unit(metric)}"
    alt = f"{metric} against {option} for {len(with_it)} members"
    alt += f"; best on average at {called}" if grid else ""
    caption = f"{option}: best on average at {called} ({said})" if grid else option
    caption += f"; × {len(without)} failed." if without else "."
    index = collection.options.index(option)
    return Picture(draw(f"effect{index}", alt, SIZE, paint, ranking), caption)


def _means(points: Sequence[tuple[float, str, float]]) -> list[tuple[float, float]]:
    """The mean at each x, of points (x, what else varies, value).

    Over what the values of x have in common, each with the same weight, if there is anything: a
    member that is missing must not make the others of its value look better.
    """
    cells: dict[float, dict[str, list[float]]] = {}
    for x, others, value in points:
        cells.setdefault(x, {}).setdefault(others, []).append(value)
    common = set.intersection(*(set(found) for found in cells.values()))
    means = []
    for x, found in sorted(cells.items()):
        alike = [fmean(found[others]) for others in sorted(common)]
        means.append((x, fmean(alike or [v for values in found.values() for v in values])))
    return means


def _others(member: Member, option: str, collection: Collection) -> str:
    return plain([member.values.get(o) for o in collection.options if o != option])


class _Scale:
    """An axis of the parallel coordinates, from 0 at the bottom to 1."""

    def __init__(self, ticks: list[tuple[float, str]], numeric: bool, log: bool, ends: Any):
        self.ticks, self.numeric, self.log, self.ends = ticks, numeric, log, ends

    @classmethod
    def of(cls, collection: Collection, option: str, members: Sequence[Member]) -> "_Scale":
        values = [m.values[option] for m in members if option in m.values]
        missing = len(values) < len(members)
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


def declared_log(collection: Collection, option: str) -> bool | None:
    """What the search's space says of an option's scale; None where nothing does."""
    declared = _space(collection).get(option)
    return bool(declared.get("log", False)) if isinstance(declared, dict) else None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _space(collection: Collection) -> dict[str, Any]:
    space = (collection.search or {}).get("space")
    return space if isinstance(space, dict) else {}


def _points(ranking: Ranking) -> tuple[list[Point], list[Member]]:
    """The members with a finite value of the metric, with their groups; and those that failed."""
    metric = ranking.collection.metric
    points = [
        (i, member, member.metrics[metric])
        for i, group in enumerate(ranking.groups)
        for member in group.members
        if member.status == "completed" and math.isfinite(member.metrics.get(metric, math.nan))
    ]
    return points, [m for m in ranking.collection.members if m.status == "failed"]


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
