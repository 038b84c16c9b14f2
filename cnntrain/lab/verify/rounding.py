"""Checks of rounding errors in float32, bfloat16 and float16, and of NaN, Inf and -0.0.

A result in float32 may be off by what adding in float32 costs. A result in a half type is an exact
sum rounded once: products and sums are accumulated in float32, and a sum that is kept in the half
type, as a whole or in parts, exceeds the budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cnntrain.lab.verify.cases import Case, corners, large, layers
from cnntrain.lab.verify.check import (
    Check,
    Finding,
    Results,
    Subject,
    check,
    collected,
    compare,
    truth_of,
)
from cnntrain.lab.verify.memory import CASES
from cnntrain.lab.verify.numerics import drawn, each
from cnntrain.lab.verify.oracles import BIAS, INPUT, OUTPUT, WEIGHT, Problem, Truth, taps


def rounding_budget(subject: Subject) -> float:
    return float(getattr(subject.kind, "rounding_budget", 4.0))


def exact(subject: Subject) -> bool:
    return getattr(subject.kind, "exact_on_integers", True)


def float32_unit(p: Problem) -> Truth:
    """sqrt(K) 2^-24 sum |x| |w|, K being the number of products in a sum."""
    filters, channels, kh, kw = p.w.shape
    terms = {
        OUTPUT: channels * kh * kw,
        INPUT: filters // p.case.groups * kh * kw,
        WEIGHT: p.g.size // filters,
        BIAS: p.g.size // filters,
    }
    sums = taps(p.map(np.abs))
    return {q: math.sqrt(terms[q]) * 2**-24 * sums[q] for q in sums}


@check(
    *each("{}, small integers"),
    cases=lambda s: [*corners(), *large(s.short), *drawn(s)],
    budget=lambda s: 0.0 if exact(s) else 0.5,
    unit="absolute",
)
def integers(subject: Subject, case: Case) -> Iterator[Finding]:
    """In float32, where sums of whole numbers below 2^24 have no rounding errors."""
    p = Problem.integers(case, subject.seed)
    scale: dict[str, Any] | float = 1.0
    if not exact(subject):  # then rounded they are right, unless sums are so large
        most = {q: 2 * rounding_budget(subject) * t for q, t in float32_unit(p).items()}
        scale = {q: np.maximum(1.0, t) for q, t in most.items()}
    found = subject.results(p, torch.float32)
    yield from compare(found, taps(p), scale, torch.float32, "{}, small integers")


@check(
    *each("{}, float32"),
    cases=lambda s: itertools.product(layers(s.short), ["normal", "positive"]),
    budget=rounding_budget,
    unit="sqrt(K)uS",
)
def float32(subject: Subject, case: Case, numbers: str) -> Iterator[Finding]:
    """Against the same sums in float64."""
    p = getattr(Problem, numbers)(case, subject.seed).map(lambda t: t.astype("f4").astype("f8"))
    found = subject.results(p, torch.float32)
    yield from compare(found, taps(p), float32_unit(p), torch.float32, "{}, float32")


NUMBERS = "normal", "positive", "integers", "integers under autocast"


def half(dtype: torch.dtype) -> Check:
    """Output and gradients in a half type against exact sums that are rounded once."""
    line = f"{{}}, {str(dtype).removeprefix('torch.')}"

    @check(
        *each(line),
        cases=lambda s: itertools.product(layers(s.short), NUMBERS),
        budget=1.0,
        unit="roundings",
    )
    def measure(subject: Subject, case: Case, words: str) -> Iterator[Finding]:
        numbers, *autocast = words.split(" under ")
        kind = torch.float32 if autocast else dtype
        p: Problem = getattr(Problem, numbers)(case, subject.seed)
        quantum = min(1.0, 2.0 ** (12 - math.frexp(p.g.size // case.out_channels)[1]))
        p = replace(p, g=p.g * quantum)  # float16 has no sums above 65504
        p = p.map(lambda t: torch.tensor(t).to(dtype).double().numpy())
        truth = taps(p)
        allowed = allowed_errors(subject, p, truth, dtype, quantum if numbers == "integers" else 0)
        with TorchCalls() as calls:
            found = run(subject, p, kind, dtype)
        if calls.seen:  # PyTorch's kernels add in the half type on CPUs that have no better ones
            torchs = truth_of(run(replace(subject, backend=nn.Conv2d), p, kind, dtype))
            allowed = {q: np.maximum(t, abs(torchs[q] - truth[q])) for q, t in allowed.items()}
        yield from compare(found, truth, allowed, kind, line)

    return measure


def allowed_errors(
    subject: Subject, p: Problem, truth: Truth, dtype: torch.dtype, quantum: float
) -> Truth:
    """The largest errors that results in a half type may have.

    With u the largest relative error of a rounding: u |y| for the result's, u |y - b| where a bias
    is added to what was already rounded, the spacing of the smallest numbers, and the error of the
    sum in float32. Sums of multiples of a quantum have none of the latter, but with an algorithm
    that divides; half of it stands for 0, which no other number of theirs is as close to.
    """
    info, sums = torch.finfo(dtype), float32_unit(p)
    u, rounded = info.eps / 2, {q: abs(t) for q, t in truth.items()}
    if p.b is not None:
        rounded[OUTPUT] = rounded[OUTPUT] + abs(truth[OUTPUT] - p.b[:, None, None])
    added: dict[str, Any] = {q: rounding_budget(subject) * t for q, t in sums.items()}
    if quantum and exact(subject):
        added = dict.fromkeys(truth, quantum / 2)
    smallest = info.smallest_normal * info.eps
    return {q: (1 + 2 * u) * (u * rounded[q] + added[q]) + smallest for q in truth}


def run(subject: Subject, p: Problem, kind: torch.dtype, dtype: torch.dtype) -> Results:
    """Results in `dtype` of a layer of that kind; of a float32 one under autocast, as float32."""
    if kind == dtype:
        return subject.results(p, dtype)
    layer, (x, g) = subject.loaded(p, kind), subject.inputs(p, kind)
    with torch.autocast(subject.device.type, dtype):
        y = layer(x.requires_grad_())
    y.backward(g.to(y.dtype))
    return {q: None if t is None else t.float() for q, t in collected(layer, x, y).items()}


class TorchCalls(TorchFunctionMode):
    """Whether PyTorch's own convolution has been called."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func is torch.conv2d
        return func(*args, **(kwargs or {}))


bfloat16, float16 = map(half, (torch.bfloat16, torch.float16))


FACTORS = {"input": "x", "weight": "w", "output gradient": "g"}
SPECIAL = [
    *CASES,
    Case(32, 32, 3, (2, 6, 7), padding=1),
    Case(4, 4, 3, (2, 9, 52), padding=1, groups=4),
    Case(4, 8, 3, (2, 9, 10), stride=(3, 2), padding=2, groups=4),
]
REACH = "{}, NaN, Inf and -0.0"


@check(
    *(REACH.format(quantity) for quantity in (OUTPUT, INPUT, WEIGHT)),
    # A bias would hide the sign of a zero.
    cases=lambda _: itertools.product([replace(c, bias=False) for c in SPECIAL], FACTORS),
    unit="elements",
)
def reach(subject: Subject, case: Case, name: str) -> Iterator[Finding]:
    """One number of a tensor is made NaN, Inf or 1. Results that it is a factor of have to be NaN,
    Inf or finite, and all others keep their bits. NaN or Inf times a zero of the padding may count
    or not: nn.Conv2d does either, by dtype and CPU."""
    p, factor = Problem.positive(case, subject.seed), FACTORS[name]
    zeros = p.map(lambda t: np.full_like(t, -0.0))
    index = tuple(np.random.default_rng(subject.seed).integers(0, getattr(p, factor).shape))

    def with_(value: float, p: Problem) -> Problem:
        changed = getattr(p, factor).copy()
        changed[index] = value
        return replace(p, **{factor: changed})

    with np.errstate(invalid="ignore"):
        truth = taps(with_(math.inf, p))  # zeros of the padding make NaN of it
    spreads = getattr(subject.kind, "spreads_non_finite", False)
    bases = {
        "among positive numbers": p,
        "among -0.0": replace(p, **{factor: getattr(zeros, factor)}),
        "times -0.0": replace(zeros, **{factor: getattr(p, factor)}),
    }
    for words, base in bases.items():
        before = truth_of(subject.results(base, torch.float32))
        of_inf = np.isnan if words == "times -0.0" else np.isposinf
        for value, right in (math.nan, np.isnan), (math.inf, of_inf), (1.0, np.isfinite):
            found = truth_of(subject.results(with_(value, base), torch.float32))
            for quantity, y in found.items():
                hit, padding = np.isinf(truth[quantity]), np.isnan(truth[quantity])
                equal = y == before[quantity]
                same = equal & (np.signbit(y) == np.signbit(before[quantity]))
                good = np.where(hit, right(y), same)
                good |= padding & (equal | np.isnan(y) & (value != 1))
                if spreads:  # then within an image, or a filter's gradient
                    near = (hit | padding).any(tuple(range(1, y.ndim)), keepdims=True)
                    near = near | ~near.any() | np.isfinite(y)
                    good = (value == 1) | np.where(hit, ~np.isfinite(y), near)
                wrong = int((~good).sum())
                text = f"{value} {words} makes {wrong} of {y.size} numbers of the {quantity} wrong"
                yield Finding(wrong, text, REACH.format(quantity))
