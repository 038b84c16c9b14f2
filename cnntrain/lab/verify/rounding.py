"""Checks of rounding errors in float32, bfloat16 and float16, against exact sums.

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
    def measure(subject: Subject, case: Case, numbers: str) -> Iterator[Finding]:
        autocast = "autocast" in numbers
        p, truth, allowed = problem(subject, case, numbers.split()[0], dtype)
        with Calls() as calls:
            found = run(subject, p, dtype, autocast)
        if calls.seen:  # PyTorch's kernels add in the half type on CPUs that have no better ones
            torchs = run(replace(subject, backend=nn.Conv2d), p, dtype, autocast)
            for q, t in truth_of(torchs).items():
                allowed[q] = np.maximum(allowed[q], abs(t - truth[q]))
        yield from compare(found, truth, allowed, torch.float32 if autocast else dtype, line)

    return measure


def problem(
    subject: Subject, case: Case, numbers: str, dtype: torch.dtype
) -> tuple[Problem, Truth, Truth]:
    """A problem whose numbers the type has, its results, and the largest errors they may have.

    With u the largest relative error of a rounding: u |y| for the result's, u |y - b| where a bias
    is added to what was already rounded, the spacing of the smallest numbers, and the error of the
    sum in float32. Integers have none of the latter, but with an algorithm that divides.
    """
    info, quantum = torch.finfo(dtype), 1.0
    u = info.eps / 2
    p: Problem = getattr(Problem, numbers)(case, subject.seed)
    positions = p.g.size // case.out_channels
    while positions * quantum > 2**12:  # float16 has no sums above 65504
        quantum /= 2
    p = replace(p, g=p.g * quantum).map(lambda t: torch.tensor(t).to(dtype).double().numpy())
    truth, sums = taps(p), float32_unit(p)
    allowed = {}
    for q, t in truth.items():
        rounded = abs(t)
        if q == OUTPUT and p.b is not None:
            rounded = rounded + abs(t - p.b[:, None, None])
        if numbers == "integers" and exact(subject):  # all sums are multiples of the quantum
            added: Any = 0.5 if q == OUTPUT else 0.5 * quantum
        else:
            added = rounding_budget(subject) * sums[q]
        allowed[q] = (1 + 2 * u) * (u * rounded + added) + info.smallest_normal * info.eps
    return p, truth, allowed


def run(subject: Subject, p: Problem, dtype: torch.dtype, autocast: bool) -> Results:
    """Results in a half type; under autocast, of and in float32, in whatever type they came."""
    if not autocast:
        return subject.results(p, dtype)
    layer, (x, g) = subject.loaded(p, torch.float32), subject.inputs(p, torch.float32)
    with torch.autocast(subject.device.type, dtype):
        y = layer(x.requires_grad_())
    y.backward(g.to(y.dtype))
    return {q: None if t is None else t.float() for q, t in collected(layer, x, y).items()}


class Calls(TorchFunctionMode):
    """Whether PyTorch's own convolution has been called."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func is torch.conv2d
        return func(*args, **(kwargs or {}))


bfloat16, float16 = map(half, (torch.bfloat16, torch.float16))
