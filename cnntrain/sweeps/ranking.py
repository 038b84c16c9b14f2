"""Ranking of a sweep's runs: groups over seeds, Welch's t-test, effects of single options."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from scipy.stats import ttest_ind

from cnntrain.metric_names import METRICS
from cnntrain.sweeps.records import Collection, Member, as_typed, text

ALPHA = 0.05  # significance level


@dataclass(frozen=True)
class Group:
    """Members that differ only in the seed; repetitions of a seed are averaged."""

    values: dict[str, Any]
    members: tuple[Member, ...]
    metric: str  # for the ranking
    samples: dict[str, list[float]]  # of every metric and `seconds`: one per completed seed
    difference: float | None = None  # of the means, to the best group
    p: float | None = None  # of Welch's t-test against the best group

    @property
    def n(self) -> int:
        return len(self.samples[self.metric])

    @property
    def planned(self) -> int:
        """Number of seeds, completed or not."""
        return len({_seed(member) for member in self.members})

    @property
    def label(self) -> str:
        """`im2col, lenet5, lr=0.01`: an option with a dot in its name by the last part."""
        parts = [
            v if isinstance(v, str) and "." not in option else f"{short(option)}={text(v)}"
            for option, v in self.values.items()
        ]
        return ", ".join(parts) or "all"

    def mean(self, metric: str | None = None) -> float | None:
        samples = self.samples[metric or self.metric]
        return fmean(samples) if samples else None

    def deviation(self, metric: str | None = None) -> float | None:
        """Standard deviation of a sample (n - 1); None with fewer than two values."""
        samples = self.samples[metric or self.metric]
        return stdev(samples) if len(samples) > 1 else None


@dataclass(frozen=True)
class Ranking:
    """The groups of a collection, best first; groups without a value come last."""

    collection: Collection
    groups: tuple[Group, ...]

    @property
    def best(self) -> Group | None:
        return self.groups[0] if self.groups and self.groups[0].n else None

    @property
    def ranked(self) -> list[Group]:
        """The groups that have a value."""
        return [group for group in self.groups if group.n]


def rank(collection: Collection) -> Ranking:
    """Group the members over seeds, sort by the mean and compare each group with the best."""
    together: dict[str, list[Member]] = {}
    for member in collection.members:
        if member.values or member.status != "damaged":  # else its options are unknown
            known = {o: member.values[o] for o in collection.options if o in member.values}
            together.setdefault(as_typed(sorted(known.items())), []).append(member)
    groups = [_group(members, collection) for members in together.values()]
    sign = -1 if collection.maximise else 1
    groups.sort(key=lambda g: math.inf if (mean := g.mean()) is None else sign * mean)
    for i, group in enumerate(groups[1:], 1):
        if own := group.samples[collection.metric]:
            best = groups[0].samples[collection.metric]
            difference, p = fmean(own) - fmean(best), welch_p(own, best)
            groups[i] = replace(group, difference=difference, p=p)
    return Ranking(collection, tuple(groups))


def welch_p(a: Sequence[float], b: Sequence[float]) -> float | None:
    """p-value of Welch's t-test (Welch 1947, Biometrika 34); None with fewer than two samples."""
    if len(a) < 2 or len(b) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # samples without variance
        p = float(ttest_ind(a, b, equal_var=False).pvalue)
    return 1.0 if math.isnan(p) else p  # all are equal


@dataclass(frozen=True)
class OptionEffect:
    """Effect of one value of an option against another, over pairs equal in all other options."""

    option: str
    value: Any
    instead: Any
    gains: tuple[float, ...]  # of the ranking metric, positive where `value` is better

    @property
    def gain(self) -> float:
        return fmean(self.gains)


def option_effects(ranking: Ranking) -> list[OptionEffect]:
    """For each option with two values and completed pairs the better one, largest effect first."""
    if ranking.collection.search is not None:  # whose trials form no pairs
        return []
    found = [_effect(ranking, option) for option in ranking.collection.options]
    return sorted(filter(None, found), key=lambda effect: -effect.gain)


def mean_curve(
    runs: Sequence[Sequence[dict[str, float]]], metric: str
) -> list[tuple[float, float, float]]:
    """Epoch, mean and standard deviation, over the runs with a finite value at the epoch."""
    epochs: dict[float, list[float]] = {}
    for row in (row for rows in runs for row in rows):
        if math.isfinite(row.get(metric, math.nan)):
            epochs.setdefault(row["epoch"], []).append(row[metric])
    return [(e, fmean(v), stdev(v) if len(v) > 1 else 0.0) for e, v in sorted(epochs.items())]


def clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def short(option: str) -> str:
    """`lr` of `optimizer.lr`, `backend` of `backend._target_`."""
    return option.removesuffix("._target_").rpartition(".")[2]


def _effect(ranking: Ranking, option: str) -> OptionEffect | None:
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
    pairs = [pair for pair in scores.values() if len(pair) == 2]
    if len(values) != 2 or len(pairs) < 2:
        return None
    one, other = values
    sign = 1 if ranking.collection.maximise else -1
    gains = tuple(sign * (pair[one] - pair[other]) for pair in pairs)
    if fmean(gains) < 0:
        one, other, gains = other, one, tuple(-gain for gain in gains)
    return OptionEffect(option, values[one], values[other], gains)


def _seed(member: Member) -> Any:
    return member.values.get("seed", member.name)


def _group(members: Sequence[Member], collection: Collection) -> Group:
    values = {o: members[0].values[o] for o in collection.options if o in members[0].values}
    samples = {}
    for name in (*METRICS, "seconds"):
        by_seed: dict[Any, list[float]] = {}
        for member in members:
            value = {**member.metrics, "seconds": member.seconds}.get(name)
            if member.status == "completed" and value is not None and math.isfinite(value):
                by_seed.setdefault(_seed(member), []).append(value)
        samples[name] = list(map(fmean, by_seed.values()))
    return Group(values, tuple(members), collection.metric, samples)
