"""Tables and plot of a benchmark's report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from rich import box
from rich.table import Table
from rich.text import Text

from cnntrain import terminal
from cnntrain.lab.benchmark.layers import ConvLayer
from cnntrain.lab.benchmark.report import (
    BenchmarkCase,
    BenchmarkReport,
    Quartiles,
    Row,
    SetTotal,
    Speedup,
)

NOTES = """\
ms: medians over the rounds, ± half the interquartile range. x {baseline}: the time over that of \
{baseline} in the same round, in brackets the quartiles. GFLOP/s: 2 MACs{three}.
extra MiB: peak memory beyond input, weight and results{kept}.
error: max|a - b| / max|b|, b in float64, {errors}."""
WITH_BACKWARD = {
    "three": ", three times as many with the backward",
    "kept": "; kept: the part of it that is kept for the backward",
    "errors": "the largest of output and gradients",
}
FORWARD_ONLY = {"three": "", "kept": "", "errors": "of the output"}
MAX_LAYER_WIDTH = 28  # characters of the layer column before it is wrapped
FILES = " or results.csv"
# Columns that a narrow terminal leaves out, in this order.
OPTIONAL = ("error", "kept", "extra", "GFLOP", "backward", "forward")
# The palette of Okabe and Ito, which is safe for colour-blind readers. The baseline is a line.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
INK = "#444444"
LINEAR_LIMIT = 12  # ratios above it have a logarithmic axis
Groups = list[tuple[str, dict[str, Row | SetTotal]]]  # a label, and the bar of each backend


def print_report(report: BenchmarkReport) -> None:
    """Print all rows by set, batch size, dtype and layer; then sums and speedups."""
    terminal.paragraph(heading(report.meta))
    for group, rows in groupby(report.rows, lambda row: _title(row.case)):
        print(f"\n{group}")
        terminal.print_table(_rows_table(list(rows), report), OPTIONAL, FILES)
    for row in report.rows:
        if row.measured.problem:
            where = f"{row.case.layer.name}, batch {row.case.batch_size}, {row.case.dtype}"
            print(terminal.encodable(f"{row.backend}, {where}: {row.measured.problem}"))
    baseline = report.meta["baseline"]
    texts = WITH_BACKWARD if report.meta["backward"] else FORWARD_ONLY
    terminal.paragraph(f"\n{NOTES.format(baseline=baseline, **texts)}\n\n")
    others = [backend for backend in report.backends if backend != baseline]
    table = Table("\nsum over the layers", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in [f"{baseline}\nms", *(f"{backend}\nx {baseline}" for backend in others)]:
        table.add_column(title, justify="right")
    for name, group_of_sums in groupby(report.sums, _title):
        sums = {total.backend: total for total in group_of_sums}
        cells = [terminal.encodable(_ms(sums[baseline].total))]
        table.add_row(name, *cells, *(_ratio(sums[b].ratio) for b in others))
    terminal.print_table(table, others[:0:-1], FILES)
    terminal.paragraph("\n".join(["", *speedup_lines(report.speedups)]))


def speedup_lines(speedups: Sequence[Speedup]) -> Iterator[str]:
    """`im2col is 3.10 x as fast as unfold, geometric mean of 11 sums (2.20 to 4.50)`."""
    faster: dict[Any, Speedup] = {}
    for speedup in speedups:
        pair = speedup.dtype, frozenset((speedup.backend, speedup.other))
        if pair not in faster or speedup.geometric_mean > faster[pair].geometric_mean:
            faster[pair] = speedup
    several = len({speedup.dtype for speedup in speedups}) > 1
    for s in faster.values():
        line = f"{s.backend} is {times(s.geometric_mean)} x as fast as {s.other}"
        line += f" in {s.dtype}" if several else ""
        spread = f" ({times(s.lowest)} to {times(s.highest)})"
        yield line + (f", geometric mean of {s.sums} sums{spread}" if s.sums > 1 else "")


def heading(meta: dict[str, Any]) -> str:
    """Device, threads, version, memory format and rounds in one line."""
    where = meta["gpu"] or f"{meta['processor']} ({meta['instructions']})"
    threads = f"{meta['threads']} thread{'s' if meta['threads'] > 1 else ''}"
    torch, rounds = f"torch {meta['versions']['torch']}", f"{meta['rounds']} rounds"
    return ", ".join([where, threads, torch, meta["memory_format"], rounds])


def _rows_table(rows: Sequence[Row], report: BenchmarkReport) -> Table:
    backward, baseline = report.meta["backward"], report.meta["baseline"]
    spans = ["forward\nms", "backward\nms", "total\nms"] if backward else ["forward\nms"]
    memory = ["extra\nMiB", "kept\nMiB"] if backward else ["extra\nMiB"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    widest = max(len(line) for row in report.rows for line in _layer_lines(row.case.layer))
    width = max(min(widest, MAX_LAYER_WIDTH), *(len(backend) + 2 for backend in report.backends))
    table.add_column(f"layer\n{'  backend':{width}}", max_width=width)  # the same in all tables
    for title in [*spans, f"\nx {baseline}", "GFLOP\n/s", *memory, "\nerror"]:
        table.add_column(title, justify="right", no_wrap=True)
    for layer, group in groupby(rows, lambda row: row.case.layer):
        for line in _layer_lines(layer):
            table.add_row(Text(terminal.encodable(line), style="bold"))
        for row in group:
            table.add_row(f"  {row.backend}", *map(terminal.encodable, _cells(row, backward)))
    return table


def _layer_lines(layer: ConvLayer) -> list[str]:
    count = f"{layer.count} x " if layer.count > 1 else ""
    shape = layer.shape.replace(" no bias", "")
    return [count + shape] if layer.name == layer.shape else [count + layer.name, shape]


def _cells(row: Row, backward: bool) -> list[str]:
    measured, memory = row.measured, row.measured.memory
    errors = [e for e in (measured.output_error, measured.gradient_error) if e is not None]
    rate = row.gflops(row.total, 3 if row.backward else 1)
    extra = (memory.total if backward else memory.forward) if memory else None
    return [
        _ms(row.forward),
        *([_ms(row.backward), _ms(row.total)] if backward else []),
        _ratio(row.ratio),
        "-" if rate is None else number(rate),
        _mib(extra),
        *([_mib(memory.kept if memory else None)] if backward else []),
        f"{max(errors):.0e}".replace("0e+00", "0") if errors else "-",
    ]


def _ms(time: Quartiles | None) -> str:
    """12.3 ±4%"""
    if time is None:
        return "-"
    return f"{number(time.median)} ±{(time.q3 - time.q1) / 2 / time.median:.0%}"


def _ratio(ratio: Quartiles | None) -> str:
    """1.23 (1.20-1.27); 1 for the baseline."""
    if ratio is None:
        return "-"
    if ratio.q1 == ratio.q3 == 1:
        return "1"
    return "{} ({}-{})".format(*map(times, (ratio.median, ratio.q1, ratio.q3)))


def _mib(size: int | None) -> str:
    return "-" if size is None else number(size / 2**20)


def number(value: float) -> str:
    """Three digits: 0.0120, 0.123, 1.23, 12.3; or all before the point: 1234; or 0."""
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:#.3g}"


def times(value: float) -> str:
    """A ratio: 0.12, 1.23, 12.3, 1234."""
    return number(value) if value >= 10 else f"{value:.2f}"


def _title(of: BenchmarkCase | SetTotal) -> str:
    return f"{of.set}, batch {of.batch_size}, {of.dtype}"


def plot(report: BenchmarkReport, file: Path) -> None:
    """Write a PNG with the time of each backend relative to the baseline.

    A panel for each dtype, with a group of bars for each set and batch size: the median over the
    rounds of the sum over the layers, and the quartiles. With a single sum also its layers.
    """
    baseline, meta = report.meta["baseline"], report.meta
    dtypes = list(dict.fromkeys(row.case.dtype for row in report.rows))
    panels = [_bar_groups(report, dtype) for dtype in dtypes]
    group_inches = max(0.8, 0.29 * (len(report.backends) - 1))
    width = max(7.0, 1 + group_inches * max(map(len, panels)))
    figure = Figure(figsize=(width, 0.9 + 3.2 * len(dtypes)), layout="constrained")
    axes = figure.subplots(len(dtypes), squeeze=False)[:, 0]
    for dtype, groups, panel in zip(dtypes, panels, axes, strict=True):
        _plot_panel(panel, groups, report)
        panel.set_title(dtype, loc="left", fontsize=10, color=INK)
        panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(report.backends),
                     frameon=False, fontsize=9, borderaxespad=0.2)  # fmt: skip
    what = "forward and backward" if meta["backward"] else "the forward"
    figure.suptitle(f"Time of {what} relative to {baseline}: lower is faster", fontsize=12)
    figure.supxlabel(f"ms: the time of {baseline}\n{heading(meta)}", fontsize=8, color=INK)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _bar_groups(report: BenchmarkReport, dtype: str) -> Groups:
    sums = [total for total in report.sums if total.dtype == dtype]
    groups: Groups = [
        (f"{name}\nbatch {batch_size}", {bar.backend: bar for bar in bars})
        for (name, batch_size), bars in groupby(sums, lambda total: (total.set, total.batch_size))
    ]
    if len(groups) > 1:
        return groups
    rows = [row for row in report.rows if row.case.dtype == dtype]
    layers: Groups = []
    for layer, cells in groupby(rows, lambda row: row.case.layer):
        channels, _, rest = layer.shape.replace(" no bias", "").partition(" ")
        label = f"{channels}\n{rest}".replace(" on ", "\n")
        layers.append((label, {cell.backend: cell for cell in cells}))
    return layers + groups if len(layers) > 1 else groups


def _plot_panel(panel: Axes, groups: Groups, report: BenchmarkReport) -> None:
    baseline = report.meta["baseline"]
    backends = [backend for backend in report.backends if backend != baseline] or [baseline]
    width = min(0.86 / len(backends), 0.3)
    panel.axhline(1, color=INK, linewidth=1.2, label=baseline, zorder=0.8)
    highest = 1.0
    for i, backend in enumerate(backends):
        offset = (i - (len(backends) - 1) / 2) * width
        known = [(x + offset, ratio) for x, (_, group) in enumerate(groups)
                 if (ratio := group[backend].ratio)]  # fmt: skip
        if not known:
            continue
        heights = [ratio.median for _, ratio in known]
        whiskers = [[r.median - r.q1 for _, r in known], [r.q3 - r.median for _, r in known]]
        bars = panel.bar([x for x, _ in known], heights, 0.92 * width, yerr=whiskers,
                         label=backend, color=COLOURS[i % len(COLOURS)],
                         error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2})  # fmt: skip
        for text in panel.bar_label(bars, list(map(times, heights)), padding=2, fontsize=6.5):
            # Keep it legible where the line of the baseline crosses it.
            text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        highest = max(highest, *(ratio.q3 for _, ratio in known))
    if highest > LINEAR_LIMIT:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.margins(y=0.1)
    else:
        panel.set_ylim(0, 1.1 * highest)
    labels = [f"{label}\n{number(total.median)} ms" if (total := group[baseline].total) else label
              for label, group in groups]  # fmt: skip
    panel.set_xticks(range(len(groups)), labels, fontsize=8)
    panel.set_xlim(-0.55, len(groups) - 0.45)
    panel.tick_params(which="both", length=0, labelcolor=INK)
    panel.set_ylabel(f"time / time of {baseline}", color=INK)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
