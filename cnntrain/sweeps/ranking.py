"""Ranking of a sweep's runs: groups over seeds, Welch's t-test, effects of single options."""

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from scipy.stats import ttest_ind

from cnntrain.sweeps.records import METRICS, Collection, Member, as_typed

ALPHA = 0.05
SINGLE_RUN = 0.05  # assumed relative standard deviation of the seconds of a single run
RULE = (
    "≈: not distinguished from the best by Welch's t-test (two-sided, p ≥ 0.05, not corrected for "
    "the number of comparisons); with few seeds that test is weak, so ≈ does not mean equal."
)
BEST, NOISE, DIFFERS, TIE, UNKNOWN = "best", "≈", "differs", "tie", "n = 1: cannot tell"


@dataclass(frozen=True)
class Comparison:
    """Difference of two groups' means; `p` is None where no test is possible."""

    difference: float
    p: float | None
    verdict: str  # NOISE, DIFFERS, TIE or UNKNOWN


@dataclass(frozen=True)
class Group:
    """Members that differ only in the seed.

    `samples` are the finite values of the ranking metric, one per seed with a completed member;
    standard deviations are those of a sample (n - 1).
    """

    values: dict[str, Any]
    members: tuple[Member, ...]
    samples: tuple[float, ...]
    means: dict[str, float]  # of every metric
    deviations: dict[str, float]  # of metrics with two seeds or more
    seconds: float | None  # mean over completed members
    seconds_deviation: float | None  # with two members or more
    against: Comparison | None = field(default=None)  # to the best; None: is the best, or no value

    @property
    def n(self) -> int:
        return len(self.samples)

    @property
    def mean(self) -> float | None:
        return fmean(self.samples) if self.samples else None

    @property
    def deviation(self) -> float | None:
        return stdev(self.samples) if self.n > 1 else None

    @property
    def planned(self) -> int:
        """Number of seeds, completed or not."""
        return len({_seed(member) for member in self.members})

    @property
    def label(self) -> str:
        """`im2col, lenet5, lr=0.01`"""
        return label(self.values)


@dataclass(frozen=True)
class Ranking:
    """The groups of a collection, best first; groups without a value come last."""

    collection: Collection
    groups: tuple[Group, ...]

    @property
    def best(self) -> Group | None:
        return self.groups[0] if self.groups and self.groups[0].samples else None

    @property
    def ranked(self) -> list[Group]:
        """The groups that have a value."""
        return [group for group in self.groups if group.samples]

    def pairs(self, most: int) -> list[list[Comparison | None]]:
        """Differences (row less column) between the first `most` groups; diagonal None."""
        groups = self.ranked[:most]
        return [[None if a is b else compare(a.samples, b.samples) for b in groups] for a in groups]


def rank(collection: Collection) -> Ranking:
    """Group the members over seeds, sort by the mean and compare each group with the best."""
    together: dict[str, list[Member]] = {}
    for member in collection.members:
        if member.values or member.status != "damaged":  # else its options are unknown
            known = {o: member.values[o] for o in collection.options if o in member.values}
            key = json.dumps(known, sort_keys=True, default=str)
            together.setdefault(key, []).append(member)
    groups = [_group(members, collection) for members in together.values()]
    sign = -1 if collection.maximise else 1
    groups.sort(key=lambda g: sign * g.mean if g.mean is not None else math.inf)
    if groups and (best := groups[0]).samples:
        groups[1:] = [
            replace(g, against=compare(g.samples, best.samples)) if g.samples else g
            for g in groups[1:]
        ]
    return Ranking(collection, tuple(groups))


def compare(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Welch's t-test for the difference of two means (Welch 1947, Biometrika 34).

    It needs two samples of each. Samples without variance are compared by their values.
    """
    difference = fmean(a) - fmean(b)
    if len(a) < 2 or len(b) < 2:
        return Comparison(difference, None, UNKNOWN)
    if len({*a}) == len({*b}) == 1:
        return Comparison(difference, None, TIE if a[0] == b[0] else DIFFERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # samples equal up to rounding
        p = float(ttest_ind(a, b, equal_var=False).pvalue)
    if sorted(a) == sorted(b):
        return Comparison(difference, p, TIE)
    return Comparison(difference, p, DIFFERS if p < ALPHA else NOISE)


@dataclass(frozen=True)
class OptionEffect:
    """Effect of one value of an option against another, over pairs equal in all other options.

    `gains` are differences of the ranking metric, positive where `value` is better.
    """

    option: str
    value: Any
    instead: Any
    gains: tuple[float, ...]

    @property
    def gain(self) -> float:
        return fmean(self.gains)


def option_effects(ranking: Ranking) -> list[OptionEffect]:
    """For each option with two values the better one, largest effect first.

    Needs at least two completed pairs; empty for a search, whose trials form no pairs.
    """
    if ranking.collection.search is not None:
        return []
    found = [e for option in ranking.collection.options for e in _effect(ranking, option)]
    return sorted(found, key=lambda effect: -effect.gain)


def mean_curve(
    runs: Sequence[Sequence[dict[str, float]]], metric: str
) -> list[tuple[float, float, float]]:
    """Epoch, mean and standard deviation, over the runs with a finite value at the epoch."""
    epochs: dict[float, list[float]] = {}
    for row in (row for rows in runs for row in rows):
        if math.isfinite(row.get(metric, math.nan)):
            epochs.setdefault(row["epoch"], []).append(row[metric])
    return [(e, fmean(v), stdev(v) if len(v) > 1 else 0.0) for e, v in sorted(epochs.items())]


def cost_points(
    groups: Mapping[int, Group], maximise: bool
) -> tuple[dict[int, tuple[float, float]], list[int]]:
    """Mean seconds and metric of groups, by their place, and the places on the Pareto front."""
    points = {i: (g.seconds or 0.0, g.mean or 0.0) for i, g in groups.items()}
    spreads = {}
    for i, g in groups.items():
        seconds = g.seconds_deviation
        spreads[i] = (points[i][0] * SINGLE_RUN if seconds is None else seconds, g.deviation or 0.0)
    return points, pareto_front(points, spreads, maximise)


def pareto_front(
    points: Mapping[int, tuple[float, float]],
    spreads: Mapping[int, tuple[float, float]],
    maximise: bool,
) -> list[int]:
    """The keys of (seconds, metric) that no other dominates, fastest first.

    A dominates B if it is better in one coordinate and not worse in the other, each by more than
    the root of the summed squares of both standard deviations.
    """
    signs = (1, -1 if maximise else 1)

    def better(a: int, b: int, axis: int) -> bool:
        spread = math.hypot(spreads[a][axis], spreads[b][axis])
        return signs[axis] * (points[b][axis] - points[a][axis]) > spread

    def dominates(a: int, b: int) -> bool:
        return any(better(a, b, i) for i in (0, 1)) and not any(better(b, a, i) for i in (0, 1))

    front = [i for i in points if not any(dominates(j, i) for j in points)]
    return sorted(front or points, key=lambda i: points[i])


def means_by_value(points: Iterable[tuple[float, str, float]]) -> list[tuple[float, float]]:
    """The mean metric at each x, of points (x, other options, metric).

    Averages over the other options that all x have in common, if there are any, so that a missing
    member does not bias the comparison.
    """
    cells: dict[float, dict[str, list[float]]] = {}
    for x, others, value in points:
        cells.setdefault(x, {}).setdefault(others, []).append(value)
    common = set.intersection(*(set(found) for found in cells.values()))
    means = []
    for x, found in sorted(cells.items()):
        alike = [fmean(found[others]) for others in sorted(common)]
        means.append((x, fmean(alike or [v for values in found.values() for v in values])))
    return means


def label(values: dict[str, Any]) -> str:
    """Values on one line; an option with a dot in its name is given by its last part."""
    parts = [
        value if isinstance(value, str) and "." not in option else f"{short(option)}={text(value)}"
        for option, value in values.items()
    ]
    return ", ".join(parts) or "all"


def clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def short(option: str) -> str:
    """`lr` of `optimizer.lr`, `backend` of `backend._target_`."""
    return option.removesuffix("._target_").rpartition(".")[2]


def text(value: Any) -> str:
    """A value for display: floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else as_typed(value)


def _effect(ranking: Ranking, option: str) -> Iterator[OptionEffect]:
    metric = ranking.collection.metric
    scores: dict[str, dict[str, float]] = {}  # other options and seed -> value -> metric
    values: dict[str, Any] = {}
    for member in ranking.collection.members:
        score = member.metrics.get(metric, math.nan)
        if option in member.values and member.status == "completed" and math.isfinite(score):
            key = as_typed(member.values[option])
            values.setdefault(key, member.values[option])
            rest = as_typed({k: v for k, v in sorted(member.values.items()) if k != option})
            scores.setdefault(rest, {})[key] = score
    if len(values) != 2:
        return
    one, other = values
    sign = 1 if ranking.collection.maximise else -1
    gains = tuple(sign * (pair[one] - pair[other]) for pair in scores.values() if len(pair) == 2)
    if len(gains) < 2:
        return
    if fmean(gains) < 0:
        one, other, gains = other, one, tuple(-gain for gain in gains)
    yield OptionEffect(option, values[one], values[other], gains)


def _seed(member: Member) -> Any:
    return member.values.get("seed", member.name)


def _group(members: Sequence[Member], collection: Collection) -> Group:
    done = [member for member in members if member.status == "completed"]
    samples = {metric: _samples(done, metric) for metric in METRICS}
    seconds = [member.seconds for member in done if member.seconds is not None]
    return Group(
        values={o: members[0].values[o] for o in collection.options if o in members[0].values},
        members=tuple(members),
        samples=tuple(samples[collection.metric]),
        means={metric: fmean(found) for metric, found in samples.items() if found},
        deviations={metric: stdev(found) for metric, found in samples.items() if len(found) > 1},
        seconds=fmean(seconds) if seconds else None,
        seconds_deviation=stdev(seconds) if len(seconds) > 1 else None,
    )


def _samples(members: Sequence[Member], metric: str) -> list[float]:
    """One value per seed: repetitions of a seed are no independent samples and are averaged."""
    by_seed: dict[Any, list[float]] = {}
    for member in members:
        value = member.metrics.get(metric)
        if value is not None and math.isfinite(value):
            by_seed.setdefault(_seed(member), []).append(value)
    return [fmean(values) for values in by_seed.values()]
