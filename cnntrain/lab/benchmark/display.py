"""Tables and plot of a benchmark's report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from rich import box
from rich.table import Table
from rich.text import Text

from cnntrain import terminal
from cnntrain.lab.benchmark.report import BenchmarkReport

Row = dict[str, Any]  # of `BenchmarkReport.rows` or `BenchmarkReport.sums`
NOTES = """\
ms: medians over the rounds, ± half the interquartile range. x {baseline}: the time over that of \
{baseline} in the same round, in brackets the quartiles. GFLOP/s: 2 MACs, three times as many with \
the backward. extra MiB: peak memory beyond input, weight and results; kept: the part of it that \
is kept for the backward. error: max|a - b| / max|b|, b in float64, the largest of output and \
gradients."""
FILES = " or results.csv"
# Columns that a narrow terminal leaves out, in this order.
OPTIONAL = ("error", "kept", "extra", "GFLOP", "backward", "forward")
# The palette of Okabe and Ito, which is safe for colour-blind readers. The baseline is a line.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
INK = "#444444"
LINEAR_LIMIT = 12  # ratios above it have a logarithmic axis


def print_report(report: BenchmarkReport) -> None:
    """Print all rows by set, batch size, dtype and layer; then the sums."""
    terminal.paragraph(heading(report.meta))
    for title, rows in groupby(report.rows, _title):
        print(f"\n{title}")
        terminal.print_table(_rows_table(list(rows), report.meta), OPTIONAL, FILES)
    for row in report.rows:
        if row["problem"]:
            where = f"{row['backend']}, {row['layer']}, batch {row['batch_size']}, {row['dtype']}"
            print(terminal.encodable(f"{where}: {row['problem']}"))
    baseline = report.meta["baseline"]
    terminal.paragraph(f"\n{NOTES.format(baseline=baseline)}\n\n")
    others = [backend for backend in report.backends if backend != baseline]
    table = Table("\nsum over the layers", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in [f"{baseline}\nms", *(f"{backend}\nx {baseline}" for backend in others)]:
        table.add_column(title, justify="right")
    ratios: dict[str, list[float]] = {backend: [] for backend in others}
    for title, group in groupby(report.sums, _title):
        sums = {row["backend"]: row for row in group}
        cells = [terminal.encodable(_ms(sums[baseline], "total_ms"))]
        table.add_row(title, *cells, *(_ratio(sums[backend]) for backend in others))
        for backend in others:
            ratios[backend] += [ratio] if (ratio := sums[backend]["ratio"]) else []
    if table.row_count > 1:
        means = (times(geometric_mean(ratios[b])) if ratios[b] else "-" for b in others)
        table.add_row("geometric mean", "", *means)
    terminal.print_table(table, others[:0:-1], FILES)


def heading(meta: dict[str, Any]) -> str:
    """Device, threads, version, memory format and rounds in one line."""
    where = meta["gpu"] or f"{meta['processor']} ({meta['instructions']})"
    threads = f"{meta['threads']} thread{'s' if meta['threads'] > 1 else ''}"
    torch, rounds = f"torch {meta['versions']['torch']}", f"{meta['rounds']} rounds"
    return ", ".join([where, threads, torch, meta["memory_format"], rounds])


def _rows_table(rows: Sequence[Row], meta: dict[str, Any]) -> Table:
    backward = meta["backward"]
    spans = ["forward", "backward", "total"] if backward else ["forward"]
    titles = [*(f"{span}\nms" for span in spans), f"\nx {meta['baseline']}", "GFLOP\n/s"]
    titles += ["extra\nMiB", *(["kept\nMiB"] if backward else []), "\nerror"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("layer\n  backend")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for (layer, shape, count), group in groupby(rows, itemgetter("layer", "shape", "count")):
        name = f"{count} x {layer}" if count > 1 else layer
        for line in [name] if layer == shape else [name, shape]:
            table.add_row(Text(terminal.encodable(line), style="bold"))
        for row in group:
            errors = [e for e in (row["output_error"], row["gradient_error"]) if e is not None]
            cells = [
                *(_ms(row, f"{span}_ms") for span in spans),
                _ratio(row),
                "-" if (rate := row["total_gflops"]) is None else number(rate),
                _mib(row["total_extra_bytes" if backward else "forward_extra_bytes"]),
                *([_mib(row["kept_bytes"])] if backward else []),
                f"{max(errors):.0e}".replace("0e+00", "0") if errors else "-",
            ]
            table.add_row(f"  {row['backend']}", *map(terminal.encodable, cells))
    return table


def _ms(row: Row, name: str) -> str:
    """12.3 ±4%"""
    if row[name] is None:
        return "-"
    return f"{number(row[name])} ±{(row[f'{name}_q3'] - row[f'{name}_q1']) / 2 / row[name]:.0%}"


def _ratio(row: Row) -> str:
    """1.23 (1.20-1.27); 1 for the baseline."""
    if row["ratio"] is None:
        return "-"
    if row["ratio_q1"] == row["ratio_q3"] == 1:
        return "1"
    return f"{times(row['ratio'])} ({times(row['ratio_q1'])}-{times(row['ratio_q3'])})"


def _mib(size: int | None) -> str:
    return "-" if size is None else number(size / 2**20)


def number(value: float) -> str:
    """Three digits: 0.0120, 0.123, 1.23, 12.3; or all before the point: 1234; or 0."""
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:#.3g}"


def times(value: float) -> str:
    """A ratio: 0.12, 1.23, 12.3, 1234."""
    return number(value) if value >= 10 else f"{value:.2f}"


def _title(row: Row) -> str:
    return f"{row['set']}, batch {row['batch_size']}, {row['dtype']}"


def plot(report: BenchmarkReport, file: Path) -> None:
    """Write a PNG with the time of each backend relative to the baseline.

    A panel for each dtype, with a group of bars for each set and batch size: the median over the
    rounds of the sum over the layers, and the quartiles. With a single sum also its layers.
    """
    baseline, meta = report.meta["baseline"], report.meta
    panels: dict[str, dict[str, dict[str, Row]]] = {}
    single = len({(row["set"], row["batch_size"]) for row in report.sums}) == 1
    layers = report.rows if single and len(report.rows) > len(report.sums) else []
    for row in [*layers, *report.sums]:
        bars = panels.setdefault(row["dtype"], {}).setdefault(_bar_label(row), {})
        bars[row["backend"]] = row
    group_inches = max(0.8, 0.29 * (len(report.backends) - 1))
    width = max(7.0, 1 + group_inches * max(map(len, panels.values())))
    figure = Figure(figsize=(width, 0.9 + 3.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for (dtype, groups), panel in zip(panels.items(), axes, strict=True):
        _plot_panel(panel, groups, report)
        panel.set_title(dtype, loc="left", fontsize=10, color=INK)
        panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(report.backends),
                     frameon=False, fontsize=9, borderaxespad=0.2)  # fmt: skip
    what = "forward and backward" if meta["backward"] else "the forward"
    figure.suptitle(f"Time of {what} relative to {baseline}: lower is faster", fontsize=12)
    figure.supxlabel(f"ms: the time of {baseline}\n{heading(meta)}", fontsize=8, color=INK)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _bar_label(row: Row) -> str:
    if "shape" not in row:
        return f"{row['set']}\nbatch {row['batch_size']}"
    return row["shape"].replace(" no bias", "").replace(" on ", "\n").replace(" ", "\n", 1)


def _plot_panel(panel: Axes, groups: dict[str, dict[str, Row]], report: BenchmarkReport) -> None:
    baseline = report.meta["baseline"]
    backends = [backend for backend in report.backends if backend != baseline] or [baseline]
    width = min(0.86 / len(backends), 0.3)
    panel.axhline(1, color=INK, linewidth=1.2, label=baseline, zorder=0.8)
    highest = 1.0
    for i, backend in enumerate(backends):
        offset = (i - (len(backends) - 1) / 2) * width
        known = {x + offset: row for x, rows in enumerate(groups.values())
                 if (row := rows[backend])["ratio"] is not None}  # fmt: skip
        if not known:
            continue
        median, low, high = ([row[key] for row in known.values()]
                             for key in ("ratio", "ratio_q1", "ratio_q3"))  # fmt: skip
        whiskers = np.abs(np.array([low, high]) - median)
        bars = panel.bar([*known], median, 0.92 * width, yerr=whiskers, label=backend,
                         color=COLOURS[i % len(COLOURS)],
                         error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2})  # fmt: skip
        panel.bar_label(bars, list(map(times, median)), padding=2, fontsize=6.5)
        highest = max(highest, *high)
    if highest > LINEAR_LIMIT:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.margins(y=0.1)
    else:
        panel.set_ylim(0, 1.1 * highest)
    labels = [f"{label}\n{number(total)} ms" if (total := rows[baseline]["total_ms"]) else label
              for label, rows in groups.items()]  # fmt: skip
    panel.set_xticks(range(len(groups)), labels, fontsize=8)
    panel.set_xlim(-0.55, len(groups) - 0.45)
    panel.tick_params(which="both", length=0, labelcolor=INK)
    panel.set_ylabel(f"time / time of {baseline}", color=INK)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
