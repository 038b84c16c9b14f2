"""A ranking as a table: for the terminal, as Markdown, as CSV."""

import csv
import io
from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from cnntrain import terminal
from cnntrain.sweeps.collect import Collection
from cnntrain.sweeps.ranking import (
    DIFFERS,
    NOISE,
    RULE,
    TIE,
    Comparison,
    Group,
    Ranking,
    rank,
    short,
    text,
)
from cnntrain.sweeps.record import METRICS, plain

MOST_ROWS = 30  # on the terminal
# Columns that a narrow terminal does without, the first one first; then the last options.
OPTIONAL = (
    *("train/acc", "train/loss", "val/loss", "seconds", "val/acc", "test/loss", "test/acc"),
    *("n", "− best", "verdict"),
)
SHOWN = ("val/acc", "test/acc", "train/acc", "val/loss")  # beside the metric that ranks
FEW_SEEDS = "n = 1 in every row: nothing tells a difference from chance; add seeds (seed=0,1,2)."
OF_THE_TEST = "Ranked on the test set: what is chosen by it has no unbiased test accuracy any more."


def print_ranked(collection: Collection) -> None:
    """The groups, best first, the rule by which they are told apart, and what failed."""
    ranking = rank(collection)
    needed = [collection.metric, *_titles(collection.options)]
    optional = [name for name in OPTIONAL if name not in needed] + needed[:1:-1]
    terminal.paragraph(f"{headline(ranking)}\n\n")
    terminal.print_table(_table(ranking), optional, " or the report")
    if (more := len(ranking.groups) - MOST_ROWS) > 0:
        print(f"and {more} more")
    terminal.paragraph(f"\n{note(ranking)}")
    failed = [m for m in collection.members if m.status in ("failed", "damaged")]
    lines = [f"{m.status}: {m.name}: {m.error or 'no reason is recorded'}" for m in failed]
    for line in [*lines, *collection.problems]:  # a line each, for who searches or copies it
        print(terminal.encodable(line))


def _table(ranking: Ranking) -> Table:
    """A line for each group."""
    options = _titles(ranking.collection.options)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for title in columns(ranking):
        name = title.removesuffix(" %")
        left = name in (*options, "n", "verdict")
        head = f"{name}\n{'%' if name != title else ''}"
        table.add_column(terminal.encodable(head), justify="left" if left else "right")
    for group, row in zip(ranking.groups, rows(ranking)[:MOST_ROWS], strict=False):
        cells = [Text(terminal.encodable(cell)) for cell in row]
        table.add_row(*cells, style="bold" if group is ranking.best else "")
    return table


def headline(ranking: Ranking) -> str:
    """The answer in a sentence."""
    collection, best = ranking.collection, ranking.best
    counts = ", ".join(f"{n} {status}" for status, n in collection.counts.items())
    if best is None:
        return f"{collection.name}: no completed member has {collection.metric} yet ({counts})"
    metric = collection.metric
    named = f"best by {metric} is {best.label}" if len(ranking.groups) > 1 else metric
    said = f"{collection.name}: {named}, {value(metric, best)}"
    said += unit(metric) + (f" (n = {best.n})" if best.n > 1 else "")
    verdicts = Counter(g.against.verdict for g in ranking.groups if g.against)
    alike = verdicts[NOISE] + verdicts[TIE]
    if alike:
        said += f"; {alike} other{'s are' if alike > 1 else ' is'} within noise of it"
    elif verdicts[DIFFERS] == len(ranking.ranked) - 1 > 0:
        said += "; every other differs from it by more than noise"
    members = len(collection.members)
    return f"{said}. {members} member{'s' if members > 1 else ''}: {counts}."


def note(ranking: Ranking) -> str:
    """The rule by which groups are told apart, or why none are."""
    said = f"Mean ± standard deviation over n seeds, best first. {RULE}"
    if not _tested(ranking):
        said = FEW_SEEDS if len(ranking.ranked) > 1 else "There is nothing to compare with yet."
    return f"{said} {OF_THE_TEST}" if ranking.collection.metric.startswith("test") else said


def columns(ranking: Ranking) -> list[str]:
    """The titles of `rows`."""
    metric = ranking.collection.metric
    metrics = [f"{name}{unit(name)}" for name in [metric, *_others(ranking)]]
    verdict = ["verdict"] if _told(ranking) else []
    options = _titles(ranking.collection.options)
    return ["#", *options, *metrics, "seconds", "− best", "n", *verdict]


def rows(ranking: Ranking) -> list[list[str]]:
    """A row of text for each group: rank, options, means, difference to the best, n, verdict."""
    metric = ranking.collection.metric
    found = []
    for i, group in enumerate(ranking.groups, 1):
        options = [
            text(group.values[o]) if o in group.values else "–" for o in ranking.collection.options
        ]
        others = [number(name, group.means.get(name)) for name in _others(ranking)]
        found.append(
            [
                str(i) if group.samples else "–",
                *options,
                value(metric, group),
                *others,
                duration(group.seconds, group.seconds_deviation),
                difference(metric, group.against),
                count(group),
                *([verdict(ranking, group)] if _told(ranking) else []),
            ]
        )
    return found


def markdown(collection: Collection) -> str:
    """The ranked table as Markdown."""
    ranking = rank(collection)
    table = markdown_table(columns(ranking), rows(ranking))
    failed = [
        f"- {m.status}: `{m.name}`: {_escaped(m.error or 'no reason is recorded')}"
        for m in collection.members
        if m.status in ("failed", "damaged")
    ]
    parts = [f"# {collection.name}", _escaped(headline(ranking)), table, note(ranking)]
    parts += ["\n".join(failed)] if failed else []
    return "\n\n".join([*parts, *collection.problems]) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as they are to be read."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def group_csv(collection: Collection) -> str:
    """A row per group, numbers as they are: accuracies from 0 to 1, losses in nats, seconds."""
    ranking, options = rank(collection), collection.options
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    spread = [f"{metric} {what}" for metric in METRICS for what in ("mean", "std")]
    against_best = ["difference", "p", "verdict"]
    writer.writerow(["rank", *options, "n", "members", *spread, "seconds", *against_best])
    for i, group in enumerate(ranking.groups, 1):
        against = group.against
        numbers = [d.get(m) for m in METRICS for d in (group.means, group.deviations)]
        writer.writerow(
            [
                i if group.samples else "",
                *(plain(group.values[o]) if o in group.values else "" for o in options),
                group.n,
                len(group.members),
                *numbers,
                group.seconds,
                against.difference if against else "",
                against.p if against else "",
                "best" if group is ranking.best else against.verdict if against else "",
            ]
        )
    return out.getvalue()


def unit(metric: str) -> str:
    return " %" if metric.endswith("acc") else ""


def number(metric: str, mean: float | None, digits: int = 2) -> str:
    """An accuracy in %, a loss with four digits behind the point."""
    if mean is None:
        return "–"
    return f"{100 * mean:.{digits}f}" if metric.endswith("acc") else f"{mean:.4f}"


def value(metric: str, group: Group) -> str:
    """`91.90 ± 0.12`"""
    if group.deviation is None:
        return number(metric, group.mean)
    return f"{number(metric, group.mean)} ± {number(metric, group.deviation)}"


def duration(seconds: float | None, deviation: float | None = None) -> str:
    """`9.54`, `120 ± 3`"""
    if seconds is None:
        return "–"
    said = f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}"
    return said if deviation is None else f"{said} ± {deviation:.2g}"


def difference(metric: str, against: Comparison | None) -> str:
    """To the best, with its sign: points of accuracy, or nats."""
    if against is None:
        return ""
    sign = "−" if against.difference < 0 else "+"
    return sign + number(metric, abs(against.difference))


def count(group: Group) -> str:
    """`3`, or `2 of 3`."""
    return str(group.n) if group.n == group.planned else f"{group.n} of {group.planned}"


def verdict(ranking: Ranking, group: Group) -> str:
    """`best`, `≈ p = 0.32`, `n = 1: cannot tell`."""
    against = group.against
    if group is ranking.best:
        return "best"
    if against is None:
        return ", ".join(dict.fromkeys(m.status for m in group.members))
    if not _tested(ranking):
        return ""  # of n = 1 in every row the note tells
    if against.p is None or against.verdict == TIE:
        return against.verdict
    return f"{against.verdict} " + ("p < 0.001" if against.p < 0.001 else f"p = {against.p:.2g}")


def _tested(ranking: Ranking) -> bool:
    """Whether there are seeds enough to compare any two groups."""
    return sum(group.n > 1 for group in ranking.ranked) > 1


def _told(ranking: Ranking) -> bool:
    """Whether there is a verdict on any group, or a reason why it has no value."""
    return _tested(ranking) or len(ranking.ranked) < len(ranking.groups)


def _others(ranking: Ranking) -> list[str]:
    known = {metric for group in ranking.groups for metric in group.means}
    return [m for m in SHOWN if m in known and m != ranking.collection.metric]


def _titles(options: list[str]) -> list[str]:
    """The last part of an option's name where that is clear."""
    shorts = list(map(short, options))
    return [last if shorts.count(last) == 1 else o for last, o in zip(shorts, options, strict=True)]


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
