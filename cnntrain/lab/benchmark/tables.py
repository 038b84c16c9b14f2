"""A benchmark's report for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cnntrain import terminal
from cnntrain.lab.benchmark.layers import Layer
from cnntrain.lab.benchmark.measure import Case
from cnntrain.lab.benchmark.report import Report, Row, Speedup, Spread, Sum

NOTES = """\
ms: medians over the rounds, ± half the interquartile range. x {baseline}: the time over that of \
{baseline} in the same round, in brackets the quartiles. GFLOP/s: 2 MACs{three}.
extra MiB: the most in use at once beyond input, weight and results{kept}.
error: max|a - b| / max|b|, b in float64, {errors}."""
WITH_BACKWARD = {
    "three": ", three times as many with the backward",
    "kept": "; kept: what of it stays for the backward",
    "errors": "the largest of output and gradients",
}
FORWARD_ALONE = {"three": "", "kept": "", "errors": "of the output"}
WIDTH = 28  # that layers take before they are wrapped
FILES = " or results.csv"
# Columns that a narrow terminal does without, the first one first.
OPTIONAL = ("error", "kept", "extra", "GFLOP", "backward", "forward")


def print_report(report: Report) -> None:
    """Every row, under its set, batch size, dtype and layer; then the sums and how they compare."""
    terminal.paragraph(heading(report.meta))
    for group, rows in groupby(report.rows, lambda row: _sum_name(row.case)):
        print(f"\n{group}")
        terminal.print_table(_rows_table(list(rows), report), OPTIONAL, FILES)
    for problem in problems(report.rows):  # a line each, for who searches or copies it
        print(terminal.encodable(problem))
    said = WITH_BACKWARD if report.meta["backward"] else FORWARD_ALONE
    notes = NOTES.format(baseline=report.meta["baseline"], **said)
    terminal.paragraph(f"\n{notes}\n\n")
    others = [backend for backend in report.backends if backend != report.meta["baseline"]]
    terminal.print_table(sums_table(report), others[:0:-1], FILES)
    terminal.paragraph("\n".join(["", *speedup_lines(report.speedups)]))


def sums_table(report: Report) -> Table:
    """Sums over the layers of a set: ms of the baseline, and of the others the ratio to it."""
    baseline = report.meta["baseline"]
    others = [backend for backend in report.backends if backend != baseline]
    table = Table("\nsum over the layers", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in [f"{baseline}\nms", *(f"{backend}\nx {baseline}" for backend in others)]:
        table.add_column(title, justify="right")
    for name, group in groupby(report.sums, _sum_name):
        sums = {found.backend: found for found in group}
        total = terminal.encodable(_ms(sums[baseline].total))
        table.add_row(name, total, *(_ratio(sums[b].ratio) for b in others))
    return table


def speedup_lines(speedups: Sequence[Speedup]) -> Iterator[str]:
    """`im2col is 3.1 x as fast as unfold, geometric mean of 11 sums (2.2 to 4.5)`, faster first."""
    best: dict[Any, Speedup] = {}
    for speedup in speedups:
        pair = speedup.dtype, frozenset((speedup.backend, speedup.other))
        if pair not in best or speedup.geometric_mean > best[pair].geometric_mean:
            best[pair] = speedup
    several = len({speedup.dtype for speedup in speedups}) > 1
    for s in best.values():
        said = f"{s.backend} is {times(s.geometric_mean)} x as fast as {s.other}"
        dtype = f" in {s.dtype}" if several else ""
        many = f", geometric mean of {s.sums} sums ({times(s.lowest)} to {times(s.highest)})"
        yield said + dtype + (many if s.sums > 1 else "")


def problems(rows: Sequence[Row]) -> Iterator[str]:
    """`mine, 3->4 3x3 on 8x8, batch 32, float32: RuntimeError: ...`, for each row that has one."""
    for row in rows:
        if row.measured.problem:
            case = row.case
            where = f"{case.layer.name}, batch {case.batch_size}, {case.dtype}"
            yield f"{row.backend}, {where}: {row.measured.problem}"


def heading(meta: dict[str, Any]) -> str:
    """What the numbers depend on, in a line."""
    where = meta["gpu"] or f"{meta['processor']} ({meta['instructions']})"
    threads = f"{meta['threads']} thread{'s' if meta['threads'] > 1 else ''}"
    torch, rounds = f"torch {meta['versions']['torch']}", f"{meta['rounds']} rounds"
    return ", ".join([where, threads, torch, meta["memory_format"], rounds])


def _rows_table(rows: Sequence[Row], report: Report) -> Table:
    backward, baseline = report.meta["backward"], report.meta["baseline"]
    spans = ["forward\nms", "backward\nms", "total\nms"] if backward else ["forward\nms"]
    memory = ["extra\nMiB", "kept\nMiB"] if backward else ["extra\nMiB"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    widest = max(len(line) for row in report.rows for line in _lines(row.case.layer))
    width = max(min(widest, WIDTH), *(len(backend) + 2 for backend in report.backends))
    table.add_column(f"layer\n{'  backend':{width}}", max_width=width)  # the same in all tables
    for title in [*spans, f"\nx {baseline}", "GFLOP\n/s", *memory, "\nerror"]:
        table.add_column(title, justify="right", no_wrap=True)
    for layer, group in groupby(rows, lambda row: row.case.layer):
        for line in _lines(layer):
            table.add_row(Text(terminal.encodable(line), style="bold"))
        for row in group:
            table.add_row(f"  {row.backend}", *map(terminal.encodable, _cells(row, backward)))
    return table


def _lines(layer: Layer) -> list[str]:
    count = f"{layer.count} x " if layer.count > 1 else ""
    shape = layer.shape.replace(" no bias", "")
    return [count + shape] if layer.name == layer.shape else [count + layer.name, shape]


def _cells(row: Row, backward: bool) -> list[str]:
    measured = row.measured
    errors = [e for e in (measured.output_error, measured.gradient_error) if e is not None]
    rate = row.gflops(row.total, 3 if row.backward else 1)
    extra = kept = None
    if memory := measured.memory:
        extra, kept = (memory.total if backward else memory.forward), memory.kept
    return [
        _ms(row.forward),
        *([_ms(row.backward), _ms(row.total)] if backward else []),
        _ratio(row.ratio),
        "-" if rate is None else number(rate),
        _mib(extra),
        *([_mib(kept)] if backward else []),
        f"{max(errors):.0e}".replace("0e+00", "0") if errors else "-",
    ]


def _ms(spread: Spread | None) -> str:
    """12.3 ±4%"""
    if spread is None:
        return "-"
    half = (spread.q3 - spread.q1) / 2 / spread.median
    return f"{number(spread.median)} ±{half:.0%}"


def _ratio(spread: Spread | None) -> str:
    """1.23 (1.20-1.27); 1 for the baseline's own."""
    if spread is None:
        return "-"
    if spread.q1 == spread.q3 == 1:
        return "1"
    return "{} ({}-{})".format(*map(times, (spread.median, spread.q1, spread.q3)))


def _mib(size: int | None) -> str:
    return "-" if size is None else number(size / 2**20)


def number(value: float) -> str:
    """Three digits: 0.0120, 0.123, 1.23, 12.3; or all that stand before the point: 1234; or 0."""
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:#.3g}"


def times(value: float) -> str:
    """A ratio: 0.12, 1.23, 12.3, 1234."""
    return number(value) if value >= 10 else f"{value:.2f}"


def _sum_name(of: Case | Sum) -> str:
    return f"{of.set}, batch {of.batch_size}, {of.dtype}"
