"""What each option does: the metric that ranks against its values."""

import math
import random
from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes

from cnntrain.sweeps.collect import Collection
from cnntrain.sweeps.ranking import Ranking
from cnntrain.sweeps.record import Member, plain
from cnntrain.sweeps.report.drawing import (
    INK,
    PAPER,
    SOFT,
    Picture,
    clipped,
    declared_log,
    draw,
    in_sight,
    is_number,
    look,
    number_axis,
    value_axis,
)
from cnntrain.sweeps.tables import number, unit

SIZE = (3.3, 2.7)
MOST_PANELS = 12
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
