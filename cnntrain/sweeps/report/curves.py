"""What happened over time: learning curves, and how a search went on."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cnntrain.sweeps.ranking import Ranking
from cnntrain.sweeps.record import Member, history
from cnntrain.sweeps.report.drawing import (
    HIGHLIGHTED,
    LABEL,
    SIZE,
    SOFT,
    Picture,
    apart,
    draw,
    in_sight,
    look,
    value_axis,
)
from cnntrain.sweeps.tables import number, unit

Curve = tuple[list[float], list[float], list[float]]  # epoch from 1, mean, standard deviation
BANDS = 6  # more would hide one another


def learning_curves(ranking: Ranking) -> list[Picture]:
    """The metric that ranks against the epoch, of validation and of training, by group."""
    kind = ranking.collection.metric.partition("/")[2]
    runs = [[history(m.directory) for m in group.members] for group in ranking.groups]
    found = []
    for stage in ("val", "train"):
        metric = f"{stage}/{kind}"
        curves = {i: c for i, rows in enumerate(runs) if (c := _mean_curve(rows, metric))[0]}
        if curves:
            found.append(_curves(ranking, metric, curves))
    return found


def search_history(ranking: Ranking) -> Picture | None:
    """Every trial's value in the order of the trials, and the best so far."""
    collection = ranking.collection
    metric, best = collection.metric, max if collection.maximise else min
    trials = [(i, m, _metric(m, metric)) for i, m in enumerate(collection.members)]
    done = [(i, v) for i, m, v in trials if m.status == "completed" and v is not None]
    if collection.search is None or not done:
        return None
    pruned = [(i, v) for i, m, v in trials if m.status == "pruned" and v is not None]
    failed = [i for i, m, _ in trials if m.status == "failed"]
    low, high = in_sight([v for _, v in done], collection.maximise)

    def paint(axes: Axes) -> None:
        steps = [best(v for j, v in done if j <= i) for i, _ in done]
        axes.step([*(i for i, _ in done), len(trials) - 1], [*steps, steps[-1]], where="post",
                  color=look(0).colour, linewidth=2, label="best so far")  # fmt: skip
        axes.scatter(*_split(done, low, high), s=22, color=SOFT, label="completed", zorder=3)
        if pruned:
            axes.scatter(*_split(pruned, low, high), s=24, facecolor="none", edgecolor=SOFT,
                         label="pruned, at its last epoch", zorder=3)  # fmt: skip
        if failed:
            axes.scatter(failed, [low + 0.03 * (high - low)] * len(failed), marker="x", s=26,
                         color=look(1).colour, label="failed", zorder=3)  # fmt: skip
        axes.set_ylim(low, high)
        axes.set(xlabel="trial", title=metric)
        value_axis(axes, metric)
        axes.legend(frameon=False, fontsize=8.5, loc="lower right", labelcolor=SOFT)

    at, top = max(done, key=lambda d: d[1] if collection.maximise else -d[1])
    value = f"{number(metric, top)}{unit(metric)}"
    alt = f"{metric} of {len(trials)} trials; the best is trial {at} with {value}"
    caption = (
        f"A point is a trial, the line the best value so far: {value} since trial {at}. A line "
        "that has long been flat says that more trials would bring little. Points at the lower "
        "edge lie beyond it."
    )
    return Picture(draw("history", alt, SIZE, paint, ranking), caption)


def _curves(ranking: Ranking, metric: str, curves: dict[int, Curve]) -> Picture:
    maximise = metric.endswith("acc")
    shown = [i for i in curves if look(i).highlighted]
    banded = [i for i in shown if any(curves[i][2])][:BANDS]
    nameless = any(len(ranking.groups[i].label) > LABEL for i in shown)

    low, high = _limits([_reach(curves[i], i in banded) for i in curves])
    beneath = _hidden({i: curves[i][1] for i in shown}, 0.008 * (high - low))
    last = max(curve[0][-1] for curve in curves.values())
    left, right = (0.5, 1.5) if last == 1 else (1, last)
    end = _end([curves[i] for i in shown or curves], last, (high - low) / 4, maximise)
    box = _free_box(curves.values(), (left, right), (low, high), maximise)
    closer = end if end and box and end[3] - end[2] < (high - low) / 3 else None

    def paint(axes: Axes) -> None:
        lines(axes)
        axes.set_ylim(low, high)
        axes.set_xlim(left, right)
        value_axis(axes, metric)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.set(xlabel="epoch", title=metric)
        if closer and box:
            inset = axes.inset_axes(box)
            lines(inset)
            inset.set(xlim=closer[:2], ylim=closer[2:])
            value_axis(inset, metric)
            inset.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            inset.tick_params(labelsize=7)
            inset.spines[:].set_visible(True)
            inset.set_title(f"from epoch {closer[0]:g} on", fontsize=8, pad=3)
        labels(axes)

    def lines(axes: Axes) -> None:
        for i in sorted(curves, reverse=True):
            epochs, mean, deviation = curves[i]
            style = look(i)
            front = style.highlighted
            if i in banded:
                below = [m - d for m, d in zip(mean, deviation, strict=True)]
                above = [m + d for m, d in zip(mean, deviation, strict=True)]
                axes.fill_between(epochs, below, above, color=style.colour, alpha=0.16,
                                  linewidth=0, gid=f"g{i}-band")  # fmt: skip
            axes.plot(epochs, mean, color=style.colour, linestyle=style.dash,
                      linewidth=4.5 if i in beneath else 1.8 if front else 0.8,
                      alpha=0.6 if i in beneath or not front else 1,
                      marker="o" if len(epochs) == 1 else None, markersize=4,
                      gid=f"g{i}-line", zorder=3 if front else 2)  # fmt: skip

    def labels(axes: Axes) -> None:
        ends = [curves[i][1][-1] for i in shown]
        places = apart(ends, 0.062 * (high - low), low, high)
        for i, end, place in zip(shown, ends, places, strict=True):
            at = curves[i][0][-1]
            text = f"{i + 1}" if nameless else f"{i + 1}  {ranking.groups[i].label}"
            axes.annotate(text, (at, end), (1.03, (place - low) / (high - low)), va="center",
                          textcoords="axes fraction", fontsize=8.5, color=look(i).colour,
                          annotation_clip=False, gid=f"g{i}-label",
                          arrowprops={"arrowstyle": "-", "color": look(i).colour,
                                      "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5),
                                      "shrinkA": 1, "shrinkB": 1})  # fmt: skip

    finals = "; ".join(
        f"{ranking.groups[i].label} {number(metric, curves[i][1][-1])}" for i in shown[:HIGHLIGHTED]
    )
    alt = f"{metric} against the epoch for {len(curves)} groups; at their last epoch: {finals}"
    caption = f"{metric} after each epoch, mean over the seeds"
    caption += ", the band one standard deviation to each side." if banded else "."
    caption += " The small picture shows the end of the large one." if closer else ""
    caption += " A broad line is one that another, equal to it, would hide." if beneath else ""
    caption += " The numbers are those of the ranking." if nameless else ""
    if len(curves) > len(shown):
        caption += f" In colour the best {len(shown)}, grey the other {len(curves) - len(shown)}."
    if metric.startswith("train"):
        caption += (
            " Far above the validation's curve it is learning by heart; with dropout or "
            "augmentation it may lie below."
            if maximise
            else " Far below the validation's curve it is learning by heart."
        )
    else:
        caption += (
            " Lines that still rise ask for more epochs."
            if maximise
            else (" A line that turns upwards is learning by heart.")
        )
    return Picture(draw(metric.replace("/", "-"), alt, SIZE, paint, ranking), caption)


def _hidden(means: dict[int, list[float]], reach: float) -> set[int]:
    """The curves that lie within `reach` of one that is drawn over them, all along."""
    return {
        i
        for i, curve in means.items()
        if any(
            j < i
            and len(other) == len(curve)
            and all(abs(a - b) < reach for a, b in zip(curve, other, strict=True))
            for j, other in means.items()
        )
    }


def _mean_curve(runs: Sequence[Sequence[dict[str, float]]], metric: str) -> Curve:
    """Over the runs that have come as far as an epoch and have a finite value."""
    by_epoch: dict[float, list[float]] = {}
    for rows in runs:
        for row in rows:
            if metric in row and math.isfinite(row[metric]):
                by_epoch.setdefault(row["epoch"], []).append(row[metric])
    epochs = sorted(by_epoch)
    deviations = [stdev(by_epoch[e]) if len(by_epoch[e]) > 1 else 0.0 for e in epochs]
    return epochs, [fmean(by_epoch[e]) for e in epochs], deviations


def _reach(curve: Curve, banded: bool, since: float = 0) -> tuple[float, float]:
    """The lowest and the highest that is drawn of a curve, its band included, from an epoch on."""
    rows = [(m, d if banded else 0.0) for e, m, d in zip(*curve, strict=True) if e >= since]
    return min(m - d for m, d in rows), max(m + d for m, d in rows)


def _limits(reaches: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Limits of an axis on which all of these are inside."""
    low, high = min(low for low, _ in reaches), max(high for _, high in reaches)
    margin = 0.05 * (high - low) or 0.01 * abs(high) or 0.01
    return low - margin, high + margin


def _end(
    curves: Sequence[Curve], last: float, near: float, maximise: bool
) -> tuple[float, float, float, float] | None:
    """The limits (x, x, y, y) of the last third of the epochs, of the curves that end as `near` to
    the best; None: there are too few epochs."""
    since = last - max(1, last // 3)
    ending = [curve for curve in curves if curve[0][-1] >= since]
    if last < 4:
        return None
    best = (max if maximise else min)(curve[1][-1] for curve in ending)
    inside = [curve for curve in ending if abs(curve[1][-1] - best) <= near]
    return since, last, *_limits([_reach(curve, True, since) for curve in inside])


def _free_box(
    curves: Iterable[Curve], x: tuple[float, float], y: tuple[float, float], maximise: bool
) -> tuple[float, float, float, float] | None:
    """Where an axes has room for a small one, in shares of its width and height; None: nowhere."""
    drawn = []  # as the axes has them
    for epochs, mean, deviation in curves:
        at = np.linspace(0.4, 1, 61)
        heights = np.interp(x[0] + at * (x[1] - x[0]), epochs, mean)
        reach = np.interp(x[0] + at * (x[1] - x[0]), epochs, deviation)
        drawn.append((heights - reach - y[0], heights + reach - y[0]))
    lower, upper = (np.array(part) / (y[1] - y[0]) for part in zip(*drawn, strict=True))
    for height in (0.44, 0.34):
        for bottom in (0.12, 0.3, 0.48) if maximise else (0.48, 0.3, 0.12):
            if ((upper < bottom - 0.1) | (lower > bottom + height + 0.1)).all():
                return 0.48, bottom, 0.5, height
    return None


def _metric(member: Member, metric: str) -> float | None:
    value = member.metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None


def _split(
    points: Sequence[tuple[float, float]], low: float, high: float
) -> tuple[list[float], list[float]]:
    inside = 0.03 * (high - low)
    return [x for x, _ in points], [min(max(y, low + inside), high - inside) for _, y in points]
