"""A benchmark's report as a picture: each backend's time as a multiple of the baseline's."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cnntrain.lab.benchmark.report import Report, Row, Sum
from cnntrain.lab.benchmark.tables import heading, number, times

# Okabe and Ito's, for eyes that do not see all colours. The baseline is a line.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
INK = "#444444"
LINEAR_TO = 12  # above that, a logarithmic axis

Group = dict[str, Row | Sum]  # backend -> what its bar shows
Groups = list[tuple[str, Group]]  # each with its label


def draw(report: Report, file: Path) -> None:
    """Write a PNG: a panel for each dtype, in it a group of bars for each set and batch size.

    A bar is the median over the rounds of the sum over a set's layers, a whisker goes from one
    quartile to the other. Where there is only one sum, its layers stand beside it.
    """
    dtypes = list(dict.fromkeys(row.case.dtype for row in report.rows))
    panels = [_groups(report, dtype) for dtype in dtypes]
    group_inches = max(0.8, 0.29 * (len(report.backends) - 1))
    width = max(7.0, 1 + group_inches * max(map(len, panels)))
    figure = Figure(figsize=(width, 0.9 + 3.2 * len(dtypes)), layout="constrained")
    axes = figure.subplots(len(dtypes), squeeze=False)[:, 0]
    for dtype, groups, panel in zip(dtypes, panels, axes, strict=True):
        _draw(panel, groups, report)
        panel.set_title(dtype, loc="left", fontsize=10, color=INK)
        panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(report.backends),
                     frameon=False, fontsize=9, borderaxespad=0.2)  # fmt: skip
    what = "forward and backward" if report.meta["backward"] else "the forward"
    baseline = report.meta["baseline"]
    figure.suptitle(f"Time of {what} relative to {baseline}: lower is faster", fontsize=12)
    notes = f"ms: the time of {baseline}\n{heading(report.meta)}"
    figure.supxlabel(notes, fontsize=8, color=INK)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _groups(report: Report, dtype: str) -> Groups:
    sums = [found for found in report.sums if found.dtype == dtype]
    groups: Groups = []
    for (name, batch_size), bars in groupby(sums, lambda found: (found.set, found.batch_size)):
        groups.append((f"{name}\nbatch {batch_size}", {bar.backend: bar for bar in bars}))
    if len(groups) > 1:
        return groups
    rows = [row for row in report.rows if row.case.dtype == dtype]
    layers: Groups = []
    for layer, cells in groupby(rows, lambda row: row.case.layer):
        channels, _, rest = layer.shape.replace(" no bias", "").partition(" ")
        label = channels + "\n" + rest.replace(" on ", "\n")
        layers.append((label, {cell.backend: cell for cell in cells}))
    return layers + groups if len(layers) > 1 else groups


def _draw(panel: Axes, groups: Groups, report: Report) -> None:
    baseline = report.meta["baseline"]
    backends = [backend for backend in report.backends if backend != baseline] or [baseline]
    width = min(0.86 / len(backends), 0.3)
    panel.axhline(1, color=INK, linewidth=1.2, label=baseline, zorder=0.8)
    highest = 1.0
    for i, backend in enumerate(backends):
        ratios = {x: group[backend].ratio for x, (_, group) in enumerate(groups)}
        known = {x: ratio for x, ratio in ratios.items() if ratio is not None}
        if not known:
            continue
        at = [x + (i - (len(backends) - 1) / 2) * width for x in known]
        heights = [ratio.median for ratio in known.values()]
        whiskers = [
            [ratio.median - ratio.q1 for ratio in known.values()],
            [ratio.q3 - ratio.median for ratio in known.values()],
        ]
        bars = panel.bar(
            at,
            heights,
            0.92 * width,
            yerr=whiskers,
            label=backend,
            color=COLOURS[i % len(COLOURS)],
            error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2},
        )
        for text in panel.bar_label(bars, list(map(times, heights)), padding=2, fontsize=6.5):
            # Legible where the baseline's line runs through.
            text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        highest = max(highest, *(ratio.q3 for ratio in known.values()))
    if highest > LINEAR_TO:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.margins(y=0.1)
    else:
        panel.set_ylim(0, 1.1 * highest)
    names = []
    for label, group in groups:
        total = group[baseline].total
        names.append(f"{label}\n{number(total.median)} ms" if total else label)
    panel.set_xticks(range(len(groups)), names, fontsize=8)
    panel.set_xlim(-0.55, len(groups) - 0.45)
    panel.tick_params(which="both", length=0, labelcolor=INK)
    panel.set_ylabel(f"time / {baseline}'s time", color=INK)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
