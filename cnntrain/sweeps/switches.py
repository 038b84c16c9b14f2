"""What an option with two values brings, all else equal."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cnntrain import terminal
from cnntrain.sweeps.collect import Collection
from cnntrain.sweeps.ranking import Ranking, rank, text
from cnntrain.sweeps.record import Member, plain
from cnntrain.sweeps.tables import markdown_table, number

COLUMNS = ("option", "instead of", "brings", "pairs", "better in")


@dataclass(frozen=True)
class Switch:
    """A value in place of another one, over pairs of members that differ in nothing else.

    `gains` are differences of the metric that ranks, above zero where the first value is better.
    """

    option: str
    value: Any
    instead: Any
    gains: tuple[float, ...]

    @property
    def gain(self) -> float:
        return fmean(self.gains)

    def row(self, metric: str) -> list[str]:
        """Cells for COLUMNS; points of accuracy, or nats."""
        sign = "−" if self.gain < 0 else "+"
        spread = number(metric, stdev(self.gains))
        return [
            f"{self.option}={text(self.value)}",
            text(self.instead),
            f"{sign}{number(metric, abs(self.gain))} ± {spread}",
            str(len(self.gains)),
            str(sum(gain > 0 for gain in self.gains)),
        ]


def of_pairs(metric: str) -> str:
    """What the table's numbers are."""
    points = "percentage points" if metric.endswith("acc") else "nats"
    return (
        f"{metric}, in {points}: the mean difference ± its standard deviation over pairs of "
        "members that differ in nothing else."
    )


def switches_markdown(ranking: Ranking) -> str:
    """The table of `switches`, empty if there are none."""
    found = switches(ranking)
    if not found:
        return ""
    metric = ranking.collection.metric
    table = markdown_table(COLUMNS, [switch.row(metric) for switch in found])
    return f"## What each option brings\n\n{table}\n\n{of_pairs(metric)}\n"


def print_switches(collection: Collection) -> None:
    """The same for the terminal; nothing if there are none."""
    found = switches(rank(collection))
    if not found:
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, title in enumerate(COLUMNS):
        table.add_column(title, justify="right" if i > 1 else "left")
    for switch in found:
        table.add_row(*(Text(terminal.encodable(cell)) for cell in switch.row(collection.metric)))
    print("\nWhat each option brings\n")
    terminal.print_table(table, ("better in", "pairs"), " or the report")
    terminal.paragraph(f"\n{of_pairs(collection.metric)}")


def switches(ranking: Ranking) -> list[Switch]:
    """Of each option with two values the better one, what brings most first.

    Only where two pairs or more have come to their end, and not of a search, whose members are no
    pairs.
    """
    if ranking.collection.search is not None:
        return []
    found = [switch for option in ranking.collection.options for switch in _switch(ranking, option)]
    return sorted(found, key=lambda switch: -switch.gain)


def _switch(ranking: Ranking, option: str) -> Iterator[Switch]:
    collection = ranking.collection
    alike: dict[str, dict[str, Member]] = {}  # what else varies, the seed included -> value
    values: dict[str, Any] = {}
    for member in collection.members:
        score = member.metrics.get(collection.metric, math.nan)
        if option in member.values and member.status == "completed" and math.isfinite(score):
            value = plain(member.values[option])
            values.setdefault(value, member.values[option])
            rest = plain({k: v for k, v in sorted(member.values.items()) if k != option})
            alike.setdefault(rest, {})[value] = member
    if len(values) != 2:
        return
    one, other = values
    sign = 1 if collection.maximise else -1
    gains = tuple(
        sign * (pair[one].metrics[collection.metric] - pair[other].metrics[collection.metric])
        for pair in alike.values()
        if len(pair) == 2
    )
    if len(gains) < 2:
        return
    if fmean(gains) < 0:
        one, other, gains = other, one, tuple(-gain for gain in gains)
    yield Switch(option, values[one], values[other], gains)
