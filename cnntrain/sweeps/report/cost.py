"""What a result costs: the metric against the seconds that a run takes."""

import math
from collections.abc import Sequence
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from cnntrain.sweeps.ranking import Ranking
from cnntrain.sweeps.report.drawing import (
    HIGHLIGHTED,
    INK,
    LABEL,
    PAPER,
    SIZE,
    SOFT,
    Picture,
    apart,
    draw,
    in_sight,
    look,
    number_axis,
    spread_widely,
    value_axis,
)

SINGLE = 0.05  # standard deviation of the seconds of a run that has no other seed, a share of them


def cost(ranking: Ranking) -> Picture | None:
    """The metric that ranks against the seconds that a run takes, and the Pareto front."""
    metric, maximise = ranking.collection.metric, ranking.collection.maximise
    groups = [(i, g) for i, g in enumerate(ranking.groups) if g.seconds is not None and g.samples]
    if len(groups) < 2:
        return None
    points = {i: (g.seconds or 0.0, g.mean or 0.0) for i, g in groups}
    spreads = {}
    for i, group in groups:
        deviation = group.seconds_deviation
        seconds = SINGLE * points[i][0] if deviation is None else deviation
        spreads[i] = (seconds, group.deviation or 0.0)
    front = pareto(points, spreads, maximise)
    nameless = any(len(ranking.groups[i].label) > LABEL for i in front)
    low, high = in_sight([y for _, y in points.values()], maximise)
    tips = [group.deviation or 0.0 for _, group in groups]  # whiskers at the good end are seen
    if maximise:
        high = max(high, *(y + tip for (_, y), tip in zip(points.values(), tips, strict=True)))
    else:
        low = min(low, *(y - tip for (_, y), tip in zip(points.values(), tips, strict=True)))

    def paint(axes: Axes) -> None:
        xs, ys = zip(*(points[i] for i in front), strict=True)
        ys = tuple(accumulate(ys, max if maximise else min))
        axes.step(xs, ys, where="post", color=SOFT, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        for i, group in reversed(groups):
            x, y = points[i]
            shown = look(i)
            y = min(max(y, low), high)
            axes.errorbar(x, y, yerr=group.deviation if shown.highlighted else None,
                          xerr=group.seconds_deviation if shown.highlighted else None,
                          color=shown.colour, marker="o", markersize=7 if i in front else 5,
                          elinewidth=1.2, gid=f"g{i}-point",
                          zorder=3 if shown.highlighted else 2)  # fmt: skip
        number_axis(axes, [x for x, _ in points.values()], ticks=False)
        middle = _middle([x for x, _ in points.values()])
        named = [] if nameless else front
        heights = [min(max(points[i][1], low), high) for i in named]
        places = apart(heights, 0.07 * (high - low), low, high)
        for i, height in zip(named, places, strict=True):
            right = points[i][0] < middle
            axes.annotate(f"{i + 1}  {ranking.groups[i].label}", (points[i][0], height),
                          (9 if right else -9, 0), textcoords="offset points", fontsize=8.5,
                          color=INK, va="center", ha="left" if right else "right",
                          gid=f"g{i}-label",
                          path_effects=[withStroke(linewidth=2.5, foreground=PAPER)])  # fmt: skip
        for i in points.keys() - set(named):
            if i in front or len(groups) <= HIGHLIGHTED:
                axes.annotate(str(i + 1), (points[i][0], min(max(points[i][1], low), high)), (7, 0),
                              textcoords="offset points", va="center", fontsize=8.5,
                              color=INK if i in front else SOFT, gid=f"g{i}-label",
                              path_effects=[withStroke(linewidth=2, foreground=PAPER)])  # fmt: skip
        axes.set_ylim(low, high)
        axes.margins(x=0.08)
        axes.set(xlabel="seconds", title=metric)
        value_axis(axes, metric)

    better = "higher" if maximise else "lower"
    members = "; ".join(f"{i + 1}: {ranking.groups[i].label}" for i in front)
    alt = f"{metric} against seconds of {len(groups)} groups; the Pareto front is {members}"
    caption = (
        f"Means over the seeds, whiskers one standard deviation; {better} and further left is "
        "better. Larger points are the Pareto front: no other is faster or better by more than the "
        "standard deviations of both together without being as clearly worse in the other of the "
        f"two. From the fastest on: {members}."
    )
    if any(group.seconds_deviation is None for _, group in groups):
        caption += f" The seconds of a single run are taken to vary by {SINGLE:.0%}."
    return Picture(draw("cost", alt, SIZE, paint, ranking), caption)


def pareto(
    points: dict[int, tuple[float, float]], spreads: dict[int, tuple[float, float]], maximise: bool
) -> list[int]:
    """Which of (seconds, value) no other dominates, from the fastest on.

    One dominates another if it is clearly better in one of the two and not clearly worse in the
    other: by more than the root of the sum of both standard deviations' squares (`spreads`).
    """
    signs = (1, -1 if maximise else 1)

    def clearly(a: int, b: int, axis: int) -> bool:
        return signs[axis] * (points[b][axis] - points[a][axis]) > math.hypot(
            spreads[a][axis], spreads[b][axis]
        )

    def dominates(a: int, b: int) -> bool:
        better, worse = ({clearly(*pair, axis) for axis in (0, 1)} for pair in ((a, b), (b, a)))
        return True in better and True not in worse

    front = [i for i in points if not any(dominates(j, i) for j in points)]
    return sorted(front or points, key=lambda i: points[i])


def _middle(seconds: Sequence[float]) -> float:
    """The middle of the axis that `number_axis` gives them."""
    low, high = min(seconds), max(seconds)
    return math.sqrt(low * high) if spread_widely(seconds) else (low + high) / 2
