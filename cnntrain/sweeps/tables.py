"""Tables of a sweep: the ranking on the terminal, as Markdown and CSV; sweep.csv."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cnntrain import terminal
from cnntrain.atomic import replacing
from cnntrain.metric_names import METRICS, higher_is_better
from cnntrain.sweeps.ranking import ALPHA, Group, OptionEffect, Ranking, option_effects, rank, short
from cnntrain.sweeps.records import Collection, as_typed, number, text, unit

MOST_ROWS = 30  # on the terminal
# Columns left out on a narrow terminal, in this order; then options from the last one on.
OPTIONAL = (
    *("train/acc", "train/loss", "val/loss", "seconds", "val/acc", "test/loss", "test/acc"),
    *("test/balanced_acc", "test/macro_f1"),
    *("n", "− best", "verdict"),
)
# Besides the ranking metric and its value on the test set.
SHOWN = ("val/acc", "test/acc", "train/acc", "val/loss")
EFFECT_COLUMNS = ("option", "instead of", "effect", "pairs", "better in")
RULE = (
    "≈: not distinguished from the best by Welch's t-test (two-sided, p ≥ 0.05, not corrected for "
    "the number of comparisons); with few seeds that test is weak, so ≈ does not mean equal."
)
FEW_SEEDS = (
    "n = 1 in every row: differences cannot be distinguished from noise; add seeds (seed=0,1,2)."
)
TEST_SET = "Ranked on the test set: the test accuracy of a run selected by it is biased upwards."


def print_ranked(collection: Collection) -> None:
    """Print the ranked groups, the rule of the comparison, and the failed members."""
    ranking, titles = rank(collection), _titles(collection.options)
    needed = [collection.metric, *titles]
    optional = [name for name in OPTIONAL if name not in needed] + needed[:1:-1]
    terminal.paragraph(f"{headline(ranking)}\n\n")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for title in columns(ranking):
        justify: Any = "left" if title in (*titles, "n", "verdict") else "right"
        table.add_column(terminal.encodable(title.replace(" %", "\n%")), justify=justify)
    for row in rows(ranking)[:MOST_ROWS]:
        cells = [Text(terminal.encodable(cell)) for cell in row]
        table.add_row(*cells, style="bold" if row[-1] == "best" else "")
    terminal.print_table(table, optional, " or the report")
    if (more := len(ranking.groups) - MOST_ROWS) > 0:
        print(f"and {more} more")
    terminal.paragraph(f"\n{note(ranking)}")
    for line in failures(collection):  # not wrapped: to be copied
        print(terminal.encodable(line))


def headline(ranking: Ranking) -> str:
    """The result in one sentence."""
    collection, best = ranking.collection, ranking.best
    counts = ", ".join(f"{n} {status}" for status, n in collection.counts.items())
    if best is None:
        return f"{collection.name}: no completed member has {collection.metric} yet ({counts})"
    metric = collection.metric
    named = f"best by {metric} is {best.label}" if len(ranking.groups) > 1 else metric
    sentence = f"{collection.name}: {named}, {value(best)}"
    sentence += unit(metric) + (f" (n = {best.n})" if best.n > 1 else "")
    alike = sum(group.p is not None and group.p >= ALPHA for group in ranking.groups)
    if alike:
        sentence += f"; {alike} other{'s are' if alike > 1 else ' is'} within noise of it"
    elif len(ranking.ranked) > 1 and all(group.p is not None for group in ranking.ranked[1:]):
        sentence += "; every other differs from it by more than noise"
    members = len(collection.members)
    return f"{sentence}. {members} member{'s' if members > 1 else ''}: {counts}."


def note(ranking: Ranking) -> str:
    """The rule by which groups are compared, or why none are."""
    sentence = f"Mean ± standard deviation over n seeds, best first. {RULE}"
    if not _tested(ranking):
        sentence = FEW_SEEDS if len(ranking.ranked) > 1 else "There is nothing to compare with yet."
    test = ranking.collection.metric.startswith("test")
    return f"{sentence} {TEST_SET}" if test else sentence


def columns(ranking: Ranking) -> list[str]:
    """The titles of `rows`."""
    metrics = [f"{name}{unit(name)}" for name in [ranking.collection.metric, *_others(ranking)]]
    options = _titles(ranking.collection.options)
    return ["#", *options, *metrics, "seconds", "− best", "n", "verdict"]


def rows(ranking: Ranking) -> list[list[str]]:
    """A row per group: rank, options, means, seconds, difference to the best, n, verdict."""
    metric = ranking.collection.metric
    return [
        [
            str(i) if g.n else "–",
            *(text(g.values[o]) if o in g.values else "–" for o in ranking.collection.options),
            value(g),
            *(number(name, g.mean(name)) for name in _others(ranking)),
            duration(g.mean("seconds"), g.deviation("seconds")),
            "" if g.difference is None else difference(metric, g.difference),
            str(g.n) if g.n == g.planned else f"{g.n} of {g.planned}",
            _verdict(ranking, g),
        ]
        for i, g in enumerate(ranking.groups, 1)
    ]


def effect_row(effect: OptionEffect, metric: str) -> list[str]:
    """Cells for EFFECT_COLUMNS, in percentage points, or nats of a loss."""
    return [
        f"{effect.option}={text(effect.value)}",
        text(effect.instead),
        f"{difference(metric, effect.gain)} ± {number(metric, stdev(effect.gains))}",
        str(len(effect.gains)),
        str(sum(gain > 0 for gain in effect.gains)),
    ]


def effects_note(metric: str) -> str:
    points = "percentage points" if higher_is_better(metric) else "nats"
    mean = "mean difference ± its standard deviation"
    return f"{metric}, in {points}: {mean} over pairs of members that differ in nothing else."


def failures(collection: Collection) -> list[str]:
    """A line per failed or damaged member."""
    return [
        f"{m.status}: {m.name}: {m.error or 'no reason is recorded'}"
        for m in collection.members
        if m.status in ("failed", "damaged")
    ]


def write_member_csv(collection: Collection, path: Path) -> None:
    """Write a row per member: status, varying options, metrics, seconds, directory, error."""
    seeds = ["seed"] if any("seed" in member.values for member in collection.members) else []
    options = list(dict.fromkeys([*collection.over, *seeds]))
    columns = ["status", *options, *METRICS, "seconds", "epochs", "directory", "error"]
    table: list[list[Any]] = [columns]
    for m in collection.members:
        values = [as_typed(m.values[o]) if o in m.values else "" for o in options]
        metrics = [m.metrics.get(name, "") for name in METRICS]
        table.append([m.status, *values, *metrics, m.seconds, m.epochs, m.name, m.error])
    with replacing(path) as file:
        file.write(_csv(table).encode())


def markdown(collection: Collection) -> str:
    """The ranking and the effects of options as Markdown."""
    ranking, metric = rank(collection), collection.metric
    table = markdown_table(columns(ranking), rows(ranking))
    parts = [f"# {collection.name}", _escaped(headline(ranking)), table, note(ranking)]
    if failed := failures(collection):
        parts.append("\n".join(f"- {_escaped(line)}" for line in failed))
    if effects := option_effects(ranking):
        parts += ["## Effect of each option", effects_note(metric)]
        parts.append(markdown_table(EFFECT_COLUMNS, [effect_row(e, metric) for e in effects]))
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def group_csv(collection: Collection) -> str:
    """A row per group: losses in nats, other metrics in [0, 1], seconds."""
    ranking, options = rank(collection), collection.options
    spread = [f"{metric} {kind}" for metric in METRICS for kind in ("mean", "std")]
    head = ["rank", *options, "n", "members", *spread, "seconds", "difference", "p"]
    table: list[list[Any]] = [head]
    for i, g in enumerate(ranking.groups, 1):
        values = [as_typed(g.values[o]) if o in g.values else "" for o in options]
        numbers = [n for metric in METRICS for n in (g.mean(metric), g.deviation(metric))]
        row = [i if g.n else "", *values, g.n, len(g.members), *numbers, g.mean("seconds")]
        table.append([*row, g.difference, g.p])
    return _csv(table)


def value(group: Group) -> str:
    """`91.90 ± 0.12`, of the ranking metric."""
    mean, deviation = number(group.metric, group.mean()), group.deviation()
    return mean if deviation is None else f"{mean} ± {number(group.metric, deviation)}"


def duration(seconds: float | None, deviation: float | None = None) -> str:
    """`9.54`, `120 ± 3`"""
    if seconds is None:
        return "–"
    rounded = f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}"
    return rounded if deviation is None else f"{rounded} ± {deviation:.2g}"


def difference(metric: str, amount: float) -> str:
    """A signed difference in percentage points, or nats of a loss."""
    return ("−" if amount < 0 else "+") + number(metric, abs(amount))


def _verdict(ranking: Ranking, group: Group) -> str:
    """`best`, `≈ p = 0.32`, `n = 1: cannot tell`."""
    if group is ranking.best:
        return "best"
    if not group.n:
        return ", ".join(dict.fromkeys(m.status for m in group.members))
    if group.p is None:  # if n = 1 in every row, that is stated in the note
        return "n = 1: cannot tell" if _tested(ranking) else ""
    p = "p < 0.001" if group.p < 0.001 else f"p = {group.p:.2g}"
    return f"{'differs' if group.p < ALPHA else '≈'} {p}"


def _tested(ranking: Ranking) -> bool:
    """Whether any two groups have seeds enough for a test."""
    return sum(group.n > 1 for group in ranking.ranked) > 1


def _others(ranking: Ranking) -> list[str]:
    shown = dict.fromkeys([*SHOWN, ranking.collection.metric.replace("val/", "test/")])
    known = [m for m in shown if any(group.samples[m] for group in ranking.groups)]
    return [metric for metric in known if metric != ranking.collection.metric]


def _titles(options: list[str]) -> list[str]:
    """The last part of an option's name where that is unambiguous."""
    names = list(map(short, options))
    return [last if names.count(last) == 1 else o for last, o in zip(names, options, strict=True)]


def _csv(table: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out).writerows(table)
    return out.getvalue()


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
