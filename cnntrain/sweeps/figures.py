"""Figures of the sweep report, drawn with matplotlib; to be called within `rc_context(RC)`."""

import math
import random
from collections.abc import Sequence
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from cnntrain.sweeps.ranking import Ranking, clipped, cost_points, mean_curve, means_by_value
from cnntrain.sweeps.records import Collection, as_typed, history, is_number
from cnntrain.sweeps.tables import number, unit

# The colour-blind safe palette of Okabe and Ito (2008), twice: solid and dashed lines.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
STYLES: list[tuple[str, Any]] = [(c, dash) for dash in ("-", (0, (4, 1.5))) for c in COLOURS]
HIGHLIGHTED = len(STYLES)  # further groups are grey
INK, SOFT, GREY, GRID, PAPER = THEME = ("#111112", "#555556", "#a0a0a1", "#dedfe0", "#fdfdfe")
RC: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a $ in a value is a $
    "axes.edgecolor": GREY,
    "grid.color": GRID,
    **dict.fromkeys(("text.color", "axes.titlecolor"), INK),
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), SOFT),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("font.size", "axes.titlesize"), 9),
    "axes.titlelocation": "left",
}
MOST_PANELS, MOST_AXES, BANDS = 12, 9, 6
LOG_FROM = 15  # ratio of the largest value to the smallest


class ReportFigure(NamedTuple):
    """A figure and its caption."""

    name: str  # unique within the page
    figure: Figure
    caption: str


def group_style(place: int) -> tuple[str, Any]:
    """Colour and dashes of the group at a place of the ranking."""
    return STYLES[place] if place < HIGHLIGHTED else (GREY, "-")


def learning_curves(ranking: Ranking) -> list[ReportFigure]:
    """Validation and training metric against the epoch: mean ± standard deviation by group."""
    kind = ranking.collection.metric.partition("/")[2]
    runs = [[history(m.directory) for m in group.members] for group in ranking.groups]
    figures = [_curves(ranking, f"{stage}/{kind}", runs) for stage in ("val", "train")]
    return [figure for figure in figures if figure]


def _curves(ranking: Ranking, metric: str, runs: Sequence[Any]) -> ReportFigure | None:
    curves = {i: c for i, rows in enumerate(runs) if (c := mean_curve(rows, metric))}
    if not curves:
        return None
    figure, axes = _axes((5.4, 3.3))
    shown = [i for i in curves if i < HIGHLIGHTED]
    banded = [i for i in shown if any(d for _, _, d in curves[i])][:BANDS]
    for i in sorted(curves, reverse=True):
        epochs, mean, deviation = np.array(curves[i]).T
        colour, dash = group_style(i)
        if i in banded:
            axes.fill_between(epochs, mean - deviation, mean + deviation, color=colour,
                              alpha=0.16, linewidth=0)  # fmt: skip
        axes.plot(epochs, mean, color=colour, linestyle=dash, zorder=3 if i in shown else 2,
                  linewidth=1.8 if i in shown else 0.8, marker="o" if len(epochs) == 1 else None,
                  label=f"{i + 1}  {clipped(ranking.groups[i].label, 24)}")  # fmt: skip
    _format(axes, metric, title=metric, xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    by_place = axes.get_legend_handles_labels()[0][::-1][: len(shown)]
    figure.legend(handles=by_place, loc="outside right upper", fontsize=8, handlelength=1.5)
    caption = f"{metric} after each epoch."
    if len(curves) > len(shown):
        caption += f" In colour the best {len(shown)}, grey the other {len(curves) - len(shown)}."
    return ReportFigure(metric.replace("/", "-"), figure, caption)


def search_history(ranking: Ranking) -> ReportFigure | None:
    """Each trial's value in the order of the trials, and the best so far."""
    collection, metric = ranking.collection, ranking.collection.metric
    best = max if collection.maximise else min
    values = [(i, m.status, m.metrics.get(metric)) for i, m in enumerate(collection.members)]
    finite = [(i, status, v) for i, status, v in values if v is not None and math.isfinite(v)]
    done = [(i, v) for i, status, v in finite if status == "completed"]
    if collection.search is None or not done:
        return None
    figure, axes = _axes((5.4, 3.3))
    low, high = visible_range([v for _, v in done], collection.maximise)
    steps = [*accumulate((v for _, v in done), best)]
    axes.step([*(i for i, _ in done), len(values) - 1], [*steps, steps[-1]], where="post",
              color=COLOURS[0], linewidth=2, label="best so far")  # fmt: skip
    for status, label in {"completed": "completed", "pruned": "pruned, at its last epoch"}.items():
        if points := [(i, _clip(v, low, high)) for i, own, v in finite if own == status]:
            axes.scatter([i for i, _ in points], [v for _, v in points], s=22, edgecolor=SOFT,
                         facecolor=SOFT if status == "completed" else "none",
                         label=label, zorder=3)  # fmt: skip
    if failed := [i for i, status, _ in values if status == "failed"]:
        axes.scatter(failed, [_clip(low, low, high)] * len(failed), marker="x", s=26,
                     color=COLOURS[1], label="failed", zorder=3)  # fmt: skip
    _format(axes, metric, title=metric, xlabel="trial", ylim=(low, high))
    axes.legend(fontsize=8.5, labelcolor=SOFT)
    at, top = best(done, key=lambda trial: trial[1])
    caption = f"{len(values)} trials; the line is the best so far: "
    caption += f"{number(metric, top)}{unit(metric)} in trial {at}."
    return ReportFigure("history", figure, caption)


def effect_panels(ranking: Ranking) -> list[ReportFigure]:
    """The ranking metric against each varying option, a point per completed member."""
    metric = ranking.collection.metric
    points = [
        (i, member.values, member.metrics[metric])
        for i, group in enumerate(ranking.groups)
        for member in group.members
        if member.status == "completed" and math.isfinite(member.metrics.get(metric, math.nan))
    ]
    figures = [_effect_panel(ranking, option, points) for option in ranking.collection.options]
    return [figure for figure in figures if figure][:MOST_PANELS]


def _effect_panel(
    ranking: Ranking, option: str, points: Sequence[tuple[int, dict[str, Any], float]]
) -> ReportFigure | None:
    collection, metric = ranking.collection, ranking.collection.metric
    points = [(i, values, y) for i, values, y in points if option in values]
    names = list(dict.fromkeys(as_typed(values[option]) for _, values, _ in points))
    if len(names) < 2:
        return None
    numeric = all(is_number(values[option]) for _, values, _ in points)
    xs = [float(v[option]) if numeric else names.index(as_typed(v[option]))
          for _, v, _ in points]  # fmt: skip
    low, high = visible_range([y for _, _, y in points], collection.maximise)
    figure, axes = _axes((3.3, 2.7))
    jitter = random.Random(0)
    for x, (i, _, y) in reversed([*zip(xs, points, strict=True)]):
        shift = 0 if numeric else jitter.uniform(-0.16, 0.16)
        axes.scatter(x + shift, _clip(y, low, high), s=26, color=group_style(i)[0],
                     edgecolor=PAPER, linewidth=0.5, zorder=3)  # fmt: skip
    others = [as_typed([v.get(o) for o in collection.options if o != option])
              for _, v, _ in points]  # fmt: skip
    means = means_by_value(zip(xs, others, [y for _, _, y in points], strict=True))
    # In a search nearly every member has a value of its own: a mean would be that of one member.
    averaged = collection.search is None and len(means) <= max(2, len(points) / 2)
    if not numeric:
        for at, mean in means:
            axes.hlines(mean, at - 0.28, at + 0.28, color=INK, linewidth=1.8, zorder=4)
        tilted = len(names) > 3 and max(map(len, names)) > 8
        axes.set_xticks(range(len(names)), [clipped(n, max(6, 40 // len(names))) for n in names],
                        rotation=20 if tilted else 0)  # fmt: skip
        axes.set_xlim(-0.5, len(names) - 0.5)
    else:
        if averaged:
            axes.plot(*zip(*means, strict=True), color=INK, linewidth=1.4, zorder=4)
        if _is_log(collection, option, xs):
            _set_log(axes)
    _format(axes, metric, title=clipped(option, 34), ylim=(low, high))
    at, mean = (max if collection.maximise else min)(means, key=lambda pair: pair[1])
    value = f"{at:.4g}" if numeric else names[int(at)]
    best = f"; best mean at {value} ({number(metric, mean)}{unit(metric)})" if averaged else ""
    caption = f"{metric} of {len(points)} members against {option}{best}."
    return ReportFigure(f"effect-{option}", figure, caption)


def parallel_coordinates(ranking: Ranking) -> ReportFigure | None:
    """A line per group through its options to its mean (Inselberg 1985, The Visual Computer 1)."""
    collection, groups, metric = ranking.collection, ranking.ranked, ranking.collection.metric
    options = collection.options[:MOST_AXES]
    if len(groups) < 2 or (len(options) < 3 and collection.search is None):
        return None
    means = [group.mean or 0.0 for group in groups]
    low, high = visible_range(means, collection.maximise)
    columns, last = [], len(options)
    figure, axes = _axes((max(5.4, 1.5 * (last + 1)), 3.6))
    for i, option in enumerate(options):
        values = [group.values.get(option) for group in groups]
        log = _is_log(collection, option, [v for v in values if isinstance(v, (int, float))])
        heights, ticks = _axis_heights(values, log)
        columns.append(heights)
        for height, label in ticks.items():
            _tick(axes, i, height, clipped(label, 14))
    columns.append([min(max((mean - low) / (high - low), 0), 1) for mean in means])
    for i in range(5):
        _tick(axes, last, i / 4, number(metric, low + (high - low) * i / 4))
    for i, line in enumerate(zip(*columns, strict=True)):
        share = 1 - i / (len(groups) - 1)
        axes.plot(line, color=COLOURS[0 if i else 1], zorder=2 if i else 3,
                  alpha=0.06 + 0.8 * share**3 if i else 1,
                  linewidth=0.8 + 0.9 * share if i else 2.6)  # fmt: skip
    axes.vlines(range(last + 1), 0, 1, color=GREY, linewidth=1, zorder=4)
    names = [*(o.replace(".", ".\n", 1) for o in options), f"{metric}{unit(metric)}"]
    axes.set_xticks(range(last + 1), [clipped(name, 40) for name in names], color=INK)
    axes.xaxis.tick_top()
    axes.set(yticks=[], xlim=(-0.35, last + 0.35), ylim=(-0.04, 1.03))
    axes.spines[:].set_visible(False)
    best = f"{number(metric, means[0])}{unit(metric)}, in orange is {groups[0].label}"
    return ReportFigure("coordinates", figure, f"{len(groups)} groups; the best, {best}.")


def cost(ranking: Ranking) -> ReportFigure | None:
    """The ranking metric against the seconds of a run, and the Pareto front."""
    metric, maximise = ranking.collection.metric, ranking.collection.maximise
    groups = {i: g for i, g in enumerate(ranking.groups) if g.seconds is not None and g.samples}
    if len(groups) < 2:
        return None
    points, front = cost_points(groups, maximise)
    low, high = visible_range([y for _, y in points.values()], maximise)
    figure, axes = _axes((5.4, 3.3))
    xs, ys = zip(*(points[i] for i in front), strict=True)
    axes.step(xs, [*accumulate(ys, max if maximise else min)], where="post", color=SOFT,
              linewidth=1, linestyle=":", zorder=1)  # fmt: skip
    for i, group in reversed(groups.items()):
        x, y = points[i]
        axes.errorbar(x, y := _clip(y, low, high), yerr=group.deviation,
                      xerr=group.seconds_deviation, color=group_style(i)[0], marker="o",
                      markersize=7 if i in front else 5, elinewidth=1.2)  # fmt: skip
        if i < HIGHLIGHTED:
            axes.annotate(str(i + 1), (x, y), (7, 5), textcoords="offset points", fontsize=8.5)
    if _is_log(ranking.collection, "seconds", [x for x, _ in points.values()]):
        _set_log(axes)
    _format(axes, metric, title=metric, xlabel="seconds")
    members = "; ".join(f"{i + 1}: {ranking.groups[i].label}" for i in front)
    caption = f"{metric} against seconds of {len(groups)} groups. Pareto front: {members}."
    return ReportFigure("cost", figure, caption)


def visible_range(values: Sequence[float], maximise: bool) -> tuple[float, float]:
    """Axis limits that resolve the better half of the values; far worse ones lie outside."""
    best, worst = (max, min) if maximise else (min, max)
    edge, middle = best(values), median(values)
    far = best(worst(values), edge - 4 * (edge - middle)) if edge != middle else worst(values)
    margin = 0.08 * abs(edge - far) or 0.01 * abs(edge) or 0.01
    return min(edge, far) - margin, max(edge, far) + margin


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    return (figure := Figure(figsize=size, layout="constrained")), figure.subplots()


def _clip(value: float, low: float, high: float) -> float:
    return float(np.clip(value, 0.97 * low + 0.03 * high, 0.03 * low + 0.97 * high))


def _axis_heights(values: Sequence[Any], log: bool) -> tuple[list[float], dict[float, str]]:
    """Heights in [0, 1] on a parallel axis, and its ticks; a missing value is at 0."""
    known = [value for value in values if value is not None]
    bottom = 0.15 if len(known) < len(values) else 0.0
    if all(map(is_number, known)):
        scale = math.log if log else float
        low, high = scale(min(known)), scale(max(known))
        marks = sorted(set(known))
        marks = marks if len(marks) <= 6 else marks[:: len(marks) // 5]
        labels = {mark: f"{mark:.3g}" for mark in marks}
        places = {v: (scale(v) - low) / (high - low) if high > low else 0.5 for v in known}
    else:
        values = [None if value is None else as_typed(value) for value in values]
        labels = {value: value for value in values if value is not None}
        places = {value: (i + 0.5) / len(labels) for i, value in enumerate(labels)}
    places = {value: bottom + (1 - bottom) * place for value, place in places.items()}
    ticks = {0.0: "n/a"} if bottom else {}
    return [places.get(v, 0.0) for v in values], ticks | {places[v]: t for v, t in labels.items()}


def _tick(axes: Axes, x: float, height: float, label: str) -> None:
    box = {"boxstyle": "round,pad=0.1", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.75}
    axes.text(x + 0.03, height, label, va="center", fontsize=8, zorder=5, bbox=box)


def _format(axes: Axes, metric: str, **properties: Any) -> None:
    axes.set(**properties)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if metric.endswith("acc"):
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def _set_log(axes: Axes) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _is_log(collection: Collection, option: str, numbers: Sequence[float]) -> bool:
    """As the search space declares it; else for numbers that spread widely."""
    declared = ((collection.search or {}).get("space") or {}).get(option)
    if not numbers or min(numbers) <= 0:
        return False
    if isinstance(declared, dict):
        return bool(declared.get("log", False))
    return max(numbers) / min(numbers) >= LOG_FROM
