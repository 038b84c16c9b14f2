"""How the report's pictures look, and how they get into its page: as SVG that follows its theme."""

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from cnntrain.sweeps.collect import Collection
from cnntrain.sweeps.ranking import Group, Ranking

# Okabe and Ito's colours, for eyes that do not see all colours, and two kinds of line.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
DASHES: list[Any] = ["-", (0, (4, 1.5))]
HIGHLIGHTED = len(COLOURS) * len(DASHES)
INK, SOFT, GREY, GRID, PAPER = "#111112", "#555556", "#a0a0a1", "#dedfe0", "#fdfdfe"
# What the page's style sheet decides, for light and for dark.
THEME = {INK: "ink", SOFT: "soft", GREY: "grey", GRID: "grid", PAPER: "paper"} | {
    colour: f"c{i}" for i, colour in enumerate(COLOURS)
}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    "svg.hashsalt": "cnntrain",  # the same picture every time
    "text.parse_math": False,  # a $ in a value is a $
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
SIZE = (5.4, 3.3)  # inches
LABEL = 24  # characters of a group's name beside what is drawn of it
LOG_FROM = 15  # the largest value over the smallest


@dataclass(frozen=True)
class Picture:
    """An SVG with what there is to see in it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Look:
    """How a group is drawn; of those behind the first ones, grey."""

    colour: str
    dash: Any
    highlighted: bool


def look(rank: int) -> Look:
    """Of the group at place `rank`, from 0."""
    if rank >= HIGHLIGHTED:
        return Look(GREY, "-", False)
    return Look(COLOURS[rank % len(COLOURS)], DASHES[rank // len(COLOURS)], True)


def draw(
    name: str, alt: str, size: tuple[float, float], paint: Callable[[Axes], None], ranking: Ranking
) -> str:
    """What `paint` draws as an SVG element of `size` in inches. `name` is its own on the page.

    An artist with the gid `g3-...` belongs to the fourth group: the page can point it out.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots())
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    return _inline(out.getvalue(), name, alt, size, ranking.groups)


def _inline(
    svg: str, name: str, alt: str, size: tuple[float, float], groups: Sequence[Group]
) -> str:
    """Matplotlib's file as an element of a page with others."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view is not None
    width = round(size[0] * 105)  # CSS pixels: text has about 13 of them
    head = (
        f'<svg viewBox="{view[1]}" role="img" aria-label="{html.escape(alt)}" '
        f'style="max-width:{width}px">'
    )
    svg = head + svg[svg.index(">") + 1 :]

    def owned(found: re.Match[str]) -> str:
        label = html.escape(groups[int(found[1])].label)
        return f'<g class="g g{found[1]}"><title>{label}</title>'

    svg = re.sub(r'<g id="g(\d+)-[^"]*">', owned, svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # nothing refers to these
    svg = svg.replace(' id="', f' id="{name}-').replace("url(#", f"url(#{name}-")
    svg = svg.replace('xlink:href="#', f'href="#{name}-')
    return re.sub("|".join(THEME), lambda found: f"var(--{THEME[found[0]]})", svg)


def value_axis(axes: Axes, metric: str, which: str = "y") -> None:
    """Accuracies in %."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if metric.endswith("acc"):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{round(100 * v, 4):g} %"))


def number_axis(
    axes: Axes, values: Iterable[float], log: bool | None = None, ticks: bool = True
) -> None:
    """An x axis of numbers, logarithmic where it is declared so or where they spread widely.

    With `ticks`, few different numbers are the ticks.
    """
    numbers = list(values)
    if spread_widely(numbers) if log is None else log and min(numbers, default=0) > 0:
        axes.set_xscale("log")
        decades = math.log10(max(numbers) / min(numbers))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    few = sorted(set(numbers))
    if ticks and len(few) <= 6:
        axes.set_xticks(few, [f"{number:.3g}" for number in few])
        axes.set_xticks([], minor=True)


def spread_widely(numbers: Sequence[float]) -> bool:
    return bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_FROM


def in_sight(values: Sequence[float], maximise: bool) -> tuple[float, float]:
    """Limits of an axis that shows the better half well; what is far worse lies outside."""
    best, worst = (max, min) if maximise else (min, max)
    edge, middle = best(values), median(values)
    far = best(worst(values), edge - 4 * (edge - middle)) if edge != middle else worst(values)
    margin = 0.08 * abs(edge - far) or 0.01 * abs(edge) or 0.01
    low, high = sorted((edge, far))
    return low - margin, high + margin


def apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The heights moved as little as it takes to have `gap` between any two, in their order.

    The least squares of what they are moved by: isotonic regression of the heights less their
    places in a stack, by pooling neighbours (Ayer et al. 1955), then clipped.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    pools: list[list[float]] = []
    for place, i in enumerate(order):
        pools.append([heights[i] - place * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    bases = [fmean(pool) for pool in pools for _ in pool]
    top = high - (len(heights) - 1) * gap
    found = [0.0] * len(heights)
    for place, i in enumerate(order):
        found[i] = max(low, min(bases[place], top)) + place * gap
    return found


def declared_log(collection: Collection, option: str) -> bool | None:
    """What the search's space says of an option's scale; None where nothing does."""
    space = (collection.search or {}).get("space")
    declared = space.get(option) if isinstance(space, dict) else None
    return bool(declared.get("log", False)) if isinstance(declared, dict) else None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
