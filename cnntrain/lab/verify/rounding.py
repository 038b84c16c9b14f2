"""Checks of rounding errors in float32, bfloat16 and float16, and of NaN, Inf and -0.0.

A result in float32 may be off by what adding in float32 costs. A result in a half type is an exact
sum rounded once: products and sums are accumulated in float32, and a sum that is kept in the half
type, as a whole or in parts, exceeds the budget.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cnntrain.lab.verify.behaviour import DTYPES, LAYERS
from cnntrain.lab.verify.cases import Case, corners, layers, sizes
from cnntrain.lab.verify.check import (
    WITHOUT,
    Check,
    Finding,
    Results,
    Subject,
    Wrong,
    check,
    collected,
    compare,
    truth_of,
)
from cnntrain.lab.verify.numerics import drawn, each, some
from cnntrain.lab.verify.oracles import BIAS, INPUT, OUTPUT, WEIGHT, Problem, Truth, taps


def float32_unit(p: Problem, local: bool = True) -> Truth:
    """sqrt(K) 2^-24 sum |x| |w|, K being the number of products in a sum; or of the largest that
    there could be of numbers of this size."""
    filters, channels, kh, kw = p.w.shape
    terms = {
        OUTPUT: channels * kh * kw,
        INPUT: filters // p.case.groups * kh * kw,
        WEIGHT: p.g.size // filters,
        BIAS: p.g.size // filters,
    }
    p = p.map(np.abs)
    x, w, g = (float(t.max(initial=0)) for t in (p.x, p.w, p.g))
    most = {OUTPUT: x * w, INPUT: w * g, WEIGHT: x * g, BIAS: g}
    sums = taps(p) if local else {q: terms[q] * most[q] for q in p.truth}
    return {q: math.sqrt(terms[q]) * 2**-24 * sums[q] for q in sums}


@check(
    *each("{}, float32"),
    cases=lambda s: itertools.product(layers(s.short), ["normal", "positive"]),
    budget=lambda s: s.rounding_budget,
    unit="sqrt(K)uS",
)
def float32(subject: Subject, case: Case, numbers: str) -> Iterator[Finding]:
    """Against the same sums in float64."""
    p = getattr(Problem, numbers)(case, subject.seed).map(lambda t: t.astype("f4").astype("f8"))
    found = subject.results(p, torch.float32)
    yield from compare(found, p.truth, float32_unit(p), torch.float32, "{}, float32")


NUMBERS = "positive", "integers", "integers under autocast", "normal"


def half(dtype: torch.dtype) -> Check:
    """Output and gradients in a half type against exact sums that are rounded once."""
    line, first = f"{{}}, {str(dtype).removeprefix('torch.')}", int(dtype == torch.float16)

    def numbered(subject: Subject) -> Iterator[tuple[Case, str]]:
        """Layers with all numbers; of the short form, with the first and the next two in turns."""
        for i, case in enumerate(layers(subject.short), first):
            for numbers in (NUMBERS[0], NUMBERS[1 + i % 2]) if subject.short else NUMBERS:
                yield case, numbers

    @check(
        *each(line),
        cases=numbered,
        budget=1.0,
        unit="roundings",
    )
    def measure(subject: Subject, case: Case, words: str) -> Iterator[Finding]:
        numbers, *autocast = words.split(" under ")
        p: Problem = getattr(Problem, numbers)(case, subject.seed)
        quantum = min(1.0, 2.0 ** (12 - math.frexp(p.g.size // case.out_channels)[1]))
        p = replace(p, g=p.g * quantum)  # float16 has no sums above 65504
        p = p.map(lambda t: torch.tensor(t).to(dtype).double().numpy())
        quantum = quantum if numbers == "integers" else 0
        kind = torch.float32 if autocast else dtype
        found, allowed = found_and_allowed(subject, p, kind, dtype, quantum)
        yield from compare(found, p.truth, allowed, kind, line)

    return measure


bfloat16, float16 = map(half, (torch.bfloat16, torch.float16))


def whole_numbers(
    line: str,
    cases: Callable[[Subject], Iterable[Any]],
    make: Callable[..., Problem] = lambda case, seed, dtype: Problem.integers(
        case, seed, 2 if dtype.itemsize == 2 else 21
    ),
    quantities: int = 4,
) -> Check:
    """Sums of whole numbers, that have no rounding errors in float32 and one in a half type."""

    @check(*each(line)[:quantities], cases=cases, unit="absolute")
    def measure(subject: Subject, case: Case, dtype: str, *words: Any) -> Iterator[Finding]:
        kind = getattr(torch, dtype)
        p = make(case, subject.seed, kind, *words)
        quantum = min(abs(t[t != 0]).min(initial=1) for t in (p.x, p.w, p.g))
        found, allowed = found_and_allowed(subject, p, kind, kind, quantum)
        nearest = dict(p.truth)  # of the numbers that are right
        for name, t in truth_of(found).items():
            right = p.truth.get(q := name.removesuffix(WITHOUT))
            if right is not None and t.shape == right.shape:
                nearest[name] = t.clip(right - allowed[q], right + allowed[q])
        yield from compare(found, nearest, 1.0, kind, line)

    return measure


def in_dtypes(subject: Subject, cases: Iterable[Case]) -> Iterator[tuple[Case, str]]:
    """In float32, and the smaller ones in a half type in turns; of the short form every third."""
    for number, case in enumerate(cases):
        yield case, "float32"
        if (number % 3 == 1 or not subject.short) and case.elements < 500_000:
            yield case, "bfloat16" if number % 4 < 2 else "float16"


FACTORS = {"input": "x", "weight": "w", "output gradient": "g"}


def one_scaled(case: Case, seed: int, dtype: torch.dtype, factor: str, how: str) -> Problem:
    """Shows what is squared, cut off or flushed to zero."""
    p, name = Problem.integers(replace(case, bias=False), seed, 2), FACTORS[factor]
    power = 6 if dtype == torch.float16 else 20
    scale = 2.0 ** (power if how == "large" else -power)
    return p.with_(**{name: scale * getattr(p, name)})


integers = whole_numbers(
    "{}, small integers", lambda s: in_dtypes(s, [*corners(), *drawn(s)[:: 4 if s.short else 2]])
)
block_sizes = whole_numbers("{}, sizes", lambda s: in_dtypes(s, sizes(s.short)))
wide_integers = whole_numbers(
    "{}, 12-bit integers",
    lambda s: itertools.product([*LAYERS, *layers(True)[:8]], ["float32"], FACTORS),
    lambda case, seed, dtype, factor: Problem.wide(case, seed, FACTORS[factor]),
)
magnitudes = whole_numbers(
    "{}, large and small numbers",
    lambda s: s.thinned(
        7, some(s), ["float32", "bfloat16", "float16"], FACTORS, ["large", "small"], full=5
    ),
    one_scaled,
    quantities=3,
)


def found_and_allowed(
    subject: Subject, p: Problem, kind: torch.dtype, dtype: torch.dtype, quantum: float
) -> tuple[Results, Truth]:
    """Results in `dtype` of a layer of that kind, or of a float32 one under autocast, and by how
    much they may be off.

    With u the largest relative error of a rounding: u |y| for the result's, u |y - b| where a bias
    is added to what was already rounded, the spacing of the smallest numbers, and the error of the
    sum in float32. Sums of multiples of a quantum have none of the latter, but with an algorithm
    that divides, whose results are right when rounded.
    """
    half, info = dtype.itemsize == 2, torch.finfo(dtype)
    calls = TorchCalls()
    with calls if half else contextlib.nullcontext():
        found = run(subject, p, kind, dtype)
    u, smallest = (info.eps / 2, info.smallest_normal * info.eps) if half else (0.0, 0.0)
    rounded = {q: abs(t) for q, t in p.truth.items()}
    if p.b is not None:
        rounded[OUTPUT] = rounded[OUTPUT] + abs(p.truth[OUTPUT] - p.b[:, None, None])

    def once_rounded(added: dict[str, Any]) -> Truth:
        return {q: (1 + 2 * u) * (u * t + added[q]) + smallest for q, t in rounded.items()}

    def wrong(allowed: Truth) -> bool:
        return any(f.error > 1 for f in compare(found, p.truth, allowed, dtype))

    allowed = once_rounded(dict.fromkeys(rounded, 0.0 if subject.exact else 0.49 * quantum))
    if not (quantum and subject.exact) and wrong(allowed):
        sums = float32_unit(p, local=not quantum)
        allowed = once_rounded({q: subject.rounding_budget * t for q, t in sums.items()})
    # PyTorch's kernels add in the half type on CPUs that have no better ones.
    for own in (nn.Conv2d, ChannelsLast):
        if half and calls.seen and wrong(allowed):
            torchs = truth_of(run(replace(subject, backend=own), p, kind, dtype))
            allowed = {q: np.maximum(t, abs(torchs[q] - p.truth[q])) for q, t in allowed.items()}
    roundings = getattr(subject.kind, "half_roundings", 1)
    if half and roundings > 1:
        sums = taps(p.map(np.abs))
        allowed = {q: np.maximum(t, roundings * u * sums[q]) for q, t in allowed.items()}
    return found, allowed


def run(subject: Subject, p: Problem, kind: torch.dtype, dtype: torch.dtype) -> Results:
    """Results in `dtype` of a layer of that kind; of a float32 one under autocast, as float32."""
    if kind == dtype:
        return subject.results(p, dtype)
    layer, (x, g) = subject.loaded(p, kind), subject.inputs(p, kind)
    with torch.autocast(subject.device.type, dtype):
        y = layer(x.requires_grad_())
    if y.dtype != dtype:
        raise Wrong(f"is {y.dtype} under autocast to {dtype}")
    y.backward(g.to(y.dtype))
    return {q: None if t is None else t.float() for q, t in collected(layer, x, y).items()}


class ChannelsLast(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.contiguous(memory_format=torch.channels_last))


class TorchCalls(TorchFunctionMode):
    """Whether PyTorch's own convolution has been called."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func is torch.conv2d
        return func(*args, **(kwargs or {}))


SPECIAL = [
    *LAYERS,
    Case(32, 32, 3, (2, 6, 7), padding=1),
    Case(4, 4, 3, (2, 9, 52), padding=1, groups=4),
    Case(4, 8, 3, (2, 9, 10), stride=(3, 2), padding=2, groups=4),
]
REACH = "{}, NaN, Inf and -0.0"


@check(
    *(REACH.format(quantity) for quantity in (OUTPUT, INPUT, WEIGHT)),
    # A bias would hide the sign of a zero.
    cases=lambda s: s.thinned(7, [replace(c, bias=False) for c in SPECIAL], DTYPES, FACTORS),
    unit="elements",
)
def reach(subject: Subject, case: Case, dtype: str, name: str) -> Iterator[Finding]:
    """One number of a tensor is made NaN, Inf or 1. Results that it is a factor of have to be NaN,
    Inf or finite, and all others keep their bits. NaN or Inf times a zero of the padding may count
    or not: nn.Conv2d does either, by dtype and CPU."""
    p, factor, kind = Problem.positive(case, subject.seed), FACTORS[name], getattr(torch, dtype)
    zeros = p.map(lambda t: np.full_like(t, -0.0))
    index = tuple(np.random.default_rng(subject.seed).integers(0, getattr(p, factor).shape))

    def with_(value: float, p: Problem) -> Problem:
        changed = getattr(p, factor).copy()
        changed[index] = value
        return p.with_(**{factor: changed})

    with np.errstate(invalid="ignore"):
        truth = taps(with_(math.inf, p))  # zeros of the padding make NaN of it
    spreads = getattr(subject.kind, "spreads_non_finite", False)
    bases = {
        "among positive numbers": p,
        "among -0.0": p.with_(**{factor: getattr(zeros, factor)}),
        "times -0.0": zeros.with_(**{factor: getattr(p, factor)}),
    }
    for words, base in bases.items():
        before = truth_of(subject.results(base, kind))
        of_inf = np.isnan if words == "times -0.0" else np.isposinf
        for value, right in (math.nan, np.isnan), (math.inf, of_inf), (1.0, np.isfinite):
            for name, y in truth_of(subject.results(with_(value, base), kind)).items():
                quantity = name.removesuffix(WITHOUT)
                hit, padding = np.isinf(truth[quantity]), np.isnan(truth[quantity])
                equal = y == before[name]
                same = equal & (np.signbit(y) == np.signbit(before[name]))
                good = np.where(hit, right(y), same)
                good |= padding & (equal | np.isnan(y) & (value != 1))
                if spreads:  # then within an image, or a filter's gradient
                    near = (hit | padding).any(tuple(range(1, y.ndim)), keepdims=True)
                    near = near | ~near.any() | np.isfinite(y)
                    good = (value == 1) | np.where(hit, ~np.isfinite(y), near)
                wrong = int((~good).sum())
                text = f"{value} {words} makes {wrong} of {y.size} numbers of the {name} wrong"
                yield Finding(wrong, text, REACH.format(quantity))
