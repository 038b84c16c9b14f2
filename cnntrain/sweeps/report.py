"""Report of a sweep as files: a self-contained HTML page with figures, Markdown, CSV."""

import io
import math
import os
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

import cnntrain
from cnntrain.atomic import replacing
from cnntrain.metric_names import METRICS, higher_is_better
from cnntrain.sweeps import tables
from cnntrain.sweeps.ranking import Ranking, clipped, mean_curve, option_effects, rank
from cnntrain.sweeps.records import Collection, Member, as_typed, history, is_number
from cnntrain.sweeps.tables import text, unit

# The colour-blind safe palette of Okabe and Ito (2008); further groups are grey.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
INK, SOFT, GREY, GRID, PAPER = THEME = ("#111112", "#555556", "#a0a0a1", "#dedfe0", "#fdfdfe")
# The style sheet has these colours for light and dark mode.
CSS_VARIABLES = dict(zip(THEME, ("ink", "soft", "grey", "grid", "paper"), strict=True))
CSS_VARIABLES |= {colour: f"c{i}" for i, colour in enumerate(COLOURS)}
STYLE = Path(__file__).with_suffix(".mplstyle")
WIDE, SMALL = (5.4, 3.3), (3.3, 2.7)  # inches
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(collection: Collection, folder: str | os.PathLike[str]) -> list[Path]:
    """Write report.html, report.md and report.csv; returns their paths. Raises OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.html": html(collection, folder),
        "report.md": tables.markdown(collection),
        "report.csv": tables.group_csv(collection),
    }
    for name, content in contents.items():
        with replacing(folder / name) as file:
            file.write(content.encode())
    return [folder / name for name in contents]


@rc_context(fname=STYLE)
def html(collection: Collection, folder: Path) -> str:
    """The page. Links to the runs are relative to `folder`."""
    ranking, metric, members = rank(collection), collection.metric, collection.members
    return TEMPLATES.get_template("report.html.j2").render(
        collection=collection,
        ranking=ranking,
        metric=metric,
        over={option: _values(values) for option, values in collection.over.items()},
        tables=tables,
        columns=tables.columns(ranking),
        rows=tables.rows(ranking),
        colour=lambda place: CSS_VARIABLES[colour(place)],
        curves=learning_curves(ranking),
        panels=effect_panels(ranking),
        svg=lambda figure: Markup(svg(figure)),
        effects=[tables.effect_row(effect, metric) for effect in option_effects(ranking)],
        failed=[m for m in members if m.error or m.status == "failed"],
        link=lambda member: _link(member, folder),
        metrics={m: f"{m}{unit(m)}" for m in METRICS if any(m in x.metrics for x in members)},
        version=cnntrain.__version__,
        now=f"{datetime.now():%Y-%m-%d %H:%M}",
        command=shlex.join(["cnntrain", "report", str(collection.folder.absolute())]),
    )


def svg(figure: Figure) -> str:
    """A figure as an SVG element whose colours are CSS variables, for light and dark mode."""
    out = io.StringIO()
    with rc_context({"svg.hashsalt": figure.get_label()}, STYLE):  # ids are unique in the page
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", out.getvalue(), flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    (box,) = re.findall(r'viewBox="[^"]*"', text)
    text = (
        f'<svg role="img" aria-label="{escape(figure.get_label())}" {box}{text[text.index(">") :]}'
    )
    text = text.replace("xlink:href", "href")
    return re.sub("|".join(CSS_VARIABLES), lambda found: f"var(--{CSS_VARIABLES[found[0]]})", text)


def colour(place: int) -> str:
    """The colour of the group at a place of the ranking."""
    return COLOURS[place] if place < len(COLOURS) else GREY


def learning_curves(ranking: Ranking) -> list[Figure]:
    """Metrics against the epoch: mean ± standard deviation by group; labels are the captions."""
    kind = ranking.collection.metric.partition("/")[2]
    runs = [[history(m.directory) for m in group.members] for group in ranking.groups]
    return [it for s in ("val", "train") if (it := _curves(ranking, f"{s}/{kind}", runs))]


def _curves(ranking: Ranking, metric: str, runs: Sequence[Any]) -> Figure | None:
    curves = {i: c for i, rows in enumerate(runs) if (c := mean_curve(rows, metric))}
    if not curves:
        return None
    figure, axes = _axes(WIDE, metric, title=metric, xlabel="epoch")
    shown = [i for i in curves if i < len(COLOURS)]
    for i in sorted(curves, reverse=True):
        epochs, mean, deviation = np.array(curves[i]).T
        if i in shown and deviation.any():
            axes.fill_between(epochs, mean - deviation, mean + deviation, color=colour(i),
                              alpha=0.16, linewidth=0)  # fmt: skip
        axes.plot(epochs, mean, color=colour(i), linewidth=1.8 if i in shown else 0.8,
                  marker="o" if len(epochs) == 1 else None,
                  label=f"{i + 1}  {clipped(ranking.groups[i].label, 24)}")  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    by_place = axes.get_legend_handles_labels()[0][::-1][: len(shown)]
    figure.legend(handles=by_place, loc="outside right upper", fontsize=8, handlelength=1.5)
    caption = f"{metric} after each epoch."
    if grey := len(curves) - len(shown):
        caption += f" In colour the best {len(shown)}, grey the other {grey}."
    figure.set_label(caption)
    return figure


def effect_panels(ranking: Ranking) -> list[Figure]:
    """The ranking metric against each varying option, a point per completed member."""
    metric = ranking.collection.metric
    points = [
        (i, member.values, member.metrics[metric])
        for i, group in enumerate(ranking.groups)
        for member in group.members
        if member.status == "completed" and math.isfinite(member.metrics.get(metric, math.nan))
    ]
    return [it for o in ranking.collection.options if (it := _effect_panel(ranking, o, points))]


def _effect_panel(
    ranking: Ranking, option: str, points: Sequence[tuple[int, dict[str, Any], float]]
) -> Figure | None:
    collection, metric = ranking.collection, ranking.collection.metric
    points = [point for point in points if option in point[1]]
    names = list(dict.fromkeys(as_typed(values[option]) for _, values, _ in points))
    if len(names) < 2:
        return None
    numeric = all(is_number(values[option]) for _, values, _ in points)
    xs = [float(v[option]) if numeric else names.index(as_typed(v[option]))
          for _, v, _ in points]  # fmt: skip
    ys = [y for _, _, y in points]
    ylim = visible_range(ys, collection.maximise)
    figure, axes = _axes(SMALL, metric, title=clipped(option, 34), ylim=ylim)
    axes.scatter(xs, ys, s=26, color=[colour(i) for i, _, _ in points],
                 edgecolor=PAPER, linewidth=0.5, zorder=3)  # fmt: skip
    means = [(x, fmean(y for at, y in zip(xs, ys, strict=True) if at == x)) for x in sorted({*xs})]
    # In a search nearly every member has a value of its own: a mean would be that of one member.
    averaged = collection.search is None and len(means) <= max(2, len(points) / 2)
    if numeric and averaged:
        axes.plot(*zip(*means, strict=True), color=INK, linewidth=1.4, zorder=4)
    if numeric and min(xs) > 0 and max(xs) / min(xs) >= 15:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if not numeric:
        for at, mean in means:
            axes.hlines(mean, at - 0.28, at + 0.28, color=INK, linewidth=1.8, zorder=4)
        short = [clipped(name, max(6, 40 // len(names))) for name in names]
        axes.set_xticks(range(len(names)), short, rotation=20 if len(names) > 3 else 0)
        axes.set_xlim(-0.5, len(names) - 0.5)
    figure.set_label(f"{metric} of {len(points)} members against {option}.")
    return figure


def visible_range(values: Sequence[float], maximise: bool) -> tuple[float, float]:
    """Axis limits that resolve the better half of the values; far worse ones lie outside."""
    best, worst = (max, min) if maximise else (min, max)
    edge, middle = best(values), median(values)
    far = best(worst(values), edge - 4 * (edge - middle)) if edge != middle else worst(values)
    margin = 0.08 * abs(edge - far) or 0.01 * abs(edge) or 0.01
    return min(edge, far) - margin, max(edge, far) + margin


def _axes(size: tuple[float, float], metric: str, **properties: Any) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(**properties)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if higher_is_better(metric):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    return figure, axes


def _link(member: Member, folder: Path) -> str:
    if not member.directory.is_dir():
        return ""
    return quote(os.path.relpath(member.directory, folder).replace(os.sep, "/")) + "/"


def _values(values: Sequence[Any]) -> str:
    if len(values) > 8 and all(map(is_number, values)):
        return f"{len(values)} values from {text(min(values))} to {text(max(values))}"
    return ", ".join(map(text, values))
