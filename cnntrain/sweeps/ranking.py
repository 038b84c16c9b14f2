"""Members that differ only in the seed as one group, the best first, and what chance explains."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from scipy.stats import ttest_ind

from cnntrain.sweeps.collect import Collection
from cnntrain.sweeps.record import METRICS, Member, plain

ALPHA = 0.05
RULE = (
    "≈: not told apart from the best by Welch's t-test (two-sided, p ≥ 0.05, not corrected for the "
    "number of comparisons); with few seeds that test is weak, so ≈ does not mean equal."
)
BEST, NOISE, DIFFERS, TIE, UNKNOWN = "best", "≈", "differs", "tie", "n = 1: cannot tell"


@dataclass(frozen=True)
class Comparison:
    """Two groups' difference in the metric that ranks; `p` is None where there is no test."""

    difference: float
    p: float | None
    verdict: str  # NOISE, DIFFERS, TIE or UNKNOWN


@dataclass(frozen=True)
class Group:
    """Members with the same values but for the seed.

    `samples` are the values of the metric that ranks, one for each seed with a completed member
    that has a finite one; their standard deviation is that of a sample (n - 1).
    """

    values: dict[str, Any]
    members: tuple[Member, ...]
    samples: tuple[float, ...]
    means: dict[str, float]  # of every metric that there is, as `samples`
    deviations: dict[str, float]  # of those with two seeds or more
    seconds: float | None  # the mean of the completed members'
    seconds_deviation: float | None  # of two members or more
    against: Comparison | None = field(default=None)  # the best; None: has no value, or is the best

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
        """How many seeds there are to be."""
        return len({seed_of(member) for member in self.members})

    @property
    def label(self) -> str:
        """`im2col, lenet5, optimizer.lr=0.01`: values that say what they are by themselves bare."""
        return label(self.values)


@dataclass(frozen=True)
class Ranking:
    """The groups of a collection, best first, those without any value behind them."""

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
        """The differences of the first `most` groups, row less column; None on the diagonal."""
        groups = self.ranked[:most]
        return [[None if a is b else compare(a.samples, b.samples) for b in groups] for a in groups]


def rank(collection: Collection) -> Ranking:
    """The groups of a collection, with what tells each from the best."""
    options = collection.options
    together: dict[str, list[Member]] = {}
    for member in collection.members:
        if member.values or member.status != "damaged":  # else nobody knows what it was
            together.setdefault(_same_but_seed(member, options), []).append(member)
    groups = [_group(members, collection) for members in together.values()]
    sign = -1 if collection.maximise else 1
    groups.sort(key=lambda g: sign * g.mean if g.mean is not None else math.inf)
    if groups and (first := groups[0]).samples:
        groups[1:] = [
            _with(g, compare(g.samples, first.samples)) if g.samples else g for g in groups[1:]
        ]
    return Ranking(collection, tuple(groups))


def compare(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """The difference of two means, and whether chance alone explains it.

    By Welch's t-test, which takes the variances as they are (Welch 1947); it needs two samples of
    each. Samples without any variance are told apart by their values alone.
    """
    difference = fmean(a) - fmean(b)
    if len(a) < 2 or len(b) < 2:
        return Comparison(difference, None, UNKNOWN)
    if len({*a}) == len({*b}) == 1:
        same = a[0] == b[0]
        return Comparison(difference, None, TIE if same else DIFFERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # samples that differ in the last bits only
        p = float(ttest_ind(a, b, equal_var=False).pvalue)
    if sorted(a) == sorted(b):
        return Comparison(difference, p, TIE)
    return Comparison(difference, p, DIFFERS if p < ALPHA else NOISE)


def label(values: dict[str, Any]) -> str:
    """Values in a line, those of an option with a dot in its name behind the last part of it."""
    bare = [
        value if isinstance(value, str) and "." not in option else f"{short(option)}={text(value)}"
        for option, value in values.items()
    ]
    return ", ".join(bare) or "all"


def short(option: str) -> str:
    """`lr` of `optimizer.lr`, `backend` of `backend._target_`."""
    return option.removesuffix("._target_").rpartition(".")[2]


def text(value: Any) -> str:
    """A value to be read: floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def seed_of(member: Member) -> Any:
    """The seed, or what else tells members of a group apart."""
    return member.values.get("seed", member.name)


def _group(members: Sequence[Member], collection: Collection) -> Group:
    done = [member for member in members if member.status == "completed"]
    by_metric = {metric: _samples(done, metric) for metric in METRICS}
    seconds = [member.seconds for member in done if member.seconds is not None]
    return Group(
        values={o: members[0].values[o] for o in collection.options if o in members[0].values},
        members=tuple(members),
        samples=tuple(by_metric[collection.metric]),
        means={metric: fmean(found) for metric, found in by_metric.items() if found},
        deviations={metric: stdev(found) for metric, found in by_metric.items() if len(found) > 1},
        seconds=fmean(seconds) if seconds else None,
        seconds_deviation=stdev(seconds) if len(seconds) > 1 else None,
    )


def _samples(members: Sequence[Member], metric: str) -> list[float]:
    """A value for each seed: a seed that was run twice says nothing new of chance."""
    by_seed: dict[Any, list[float]] = {}
    for member in members:
        value = member.metrics.get(metric)
        if value is not None and math.isfinite(value):
            by_seed.setdefault(seed_of(member), []).append(value)
    return [fmean(values) for values in by_seed.values()]


def _same_but_seed(member: Member, options: Sequence[str]) -> str:
    known = {option: member.values[option] for option in options if option in member.values}
    return json.dumps(known, sort_keys=True, default=str)


def _with(group: Group, comparison: Comparison) -> Group:
    return Group(**{**vars(group), "against": comparison})
