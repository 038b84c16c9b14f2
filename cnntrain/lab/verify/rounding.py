"""Rounding errors in float32, bfloat16 and float16, and propagation of NaN, Inf and -0.0.

A float32 result may be off by the usual error of a float32 sum. A result in a half type is an exact
sum rounded once: products are accumulated in float32, and a sum that is kept in the half type, as a
whole or in parts, exceeds the budget.
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

from cnntrain.lab.verify.cases import BIAS, INPUT, OUTPUT, WEIGHT, Case, Expected, Problem, corners
from cnntrain.lab.verify.check import Candidate, CaseError, Check, Errors, arrays, compare
from cnntrain.lab.verify.layers import DTYPES, NON_FINITE, SMALL_LAYERS, network_layers, size_cases
from cnntrain.lab.verify.numerics import expected

FACTORS = {"input": "x", "weight": "w", "output gradient": "g"}


def float32_unit(p: Problem, local: bool = True) -> Expected:
    """sqrt(K) 2^-24 sum |x| |w|, where K is the number of products of the sum; if not local, with
    the largest possible sum."""
    filters, channels, kh, kw = p.w.shape
    terms = {
        OUTPUT: channels * kh * kw,
        INPUT: filters // p.case.groups * kh * kw,
        WEIGHT: p.g.size // filters,
        BIAS: p.g.size // filters,
    }
    sums = expected(p := p.map(np.abs))
    if not local:
        x, w, g = (float(t.max(initial=0)) for t in (p.x, p.w, p.g))
        most = {OUTPUT: x * w, INPUT: w * g, WEIGHT: x * g, BIAS: g}
        sums = {q: terms[q] * most[q] for q in sums}
    return {q: math.sqrt(terms[q]) * 2**-24 * sums[q] for q in sums}


@Check(
    "{}, float32",
    cases=lambda s: itertools.product(network_layers(s.short), ["normal", "positive"]),
    limit=lambda s: s.declared("rounding_budget"),
    unit="sqrt(K)uS",
)
def float32(candidate: Candidate, case: Case, numbers: str) -> Errors:
    """Float32 sums against float64 ones."""
    p = getattr(Problem, numbers)(case, candidate.seed).map(lambda t: t.astype("f4").astype("f8"))
    found = candidate.results(p, torch.float32)
    yield from compare(found, expected(p), float32_unit(p), torch.float32)


NUMBERS = "positive", "integers", "integers under autocast", "normal"


def half(dtype: torch.dtype) -> Check:
    """Output and gradients in a half type against exact sums, rounded once."""

    def numbered(candidate: Candidate) -> Iterator[tuple[Case, str]]:
        """Layers with all kinds of numbers; in the short form with two kinds each."""
        for i, case in enumerate(network_layers(candidate.short), int(dtype == torch.float16)):
            for numbers in (NUMBERS[0], NUMBERS[1 + i % 2]) if candidate.short else NUMBERS:
                yield case, numbers

    @Check(f"{{}}, {str(dtype).removeprefix('torch.')}", numbered, 1.0, "roundings")
    def measure(candidate: Candidate, case: Case, words: str) -> Errors:
        numbers, *autocast = words.split(" under ")
        p: Problem = getattr(Problem, numbers)(case, candidate.seed)
        quantum = min(1.0, 2.0 ** (12 - math.frexp(p.g.size // case.out_channels)[1]))
        p = replace(p, g=p.g * quantum)  # float16 has no sums above 65504
        p = p.map(lambda t: torch.tensor(t).to(dtype).double().numpy())
        quantum = quantum if numbers == "integers" else 0
        kind, cast = (torch.float32, dtype) if autocast else (dtype, None)
        found, allowed = found_and_allowed(candidate, p, kind, cast, quantum)
        yield from compare(found, expected(p), allowed, kind)

    return measure


bfloat16, float16 = map(half, (torch.bfloat16, torch.float16))


def integer_check(
    line: str,
    cases: Callable[[Candidate], Iterable[Any]],
    make: Callable[..., Problem] = lambda case, seed, dtype: Problem.integers(
        case, seed, 2 if dtype.itemsize == 2 else 21
    ),
    **options: Any,
) -> Check:
    """Sums of integers: no rounding in float32, one in a half type."""

    @Check(line, cases, unit="absolute", **options)
    def measure(candidate: Candidate, case: Case, dtype: str, *words: Any) -> Errors:
        kind = getattr(torch, dtype)
        p = make(case, candidate.seed, kind, *words)
        quantum = min(abs(t[t != 0]).min(initial=1) for t in (p.x, p.w, p.g))
        found, allowed = found_and_allowed(candidate, p, kind, None, quantum)
        yield from compare(found, expected(p), 1.0, kind, allowed)

    return measure


def in_dtypes(candidate: Candidate, cases: Iterable[Case]) -> Iterator[tuple[Case, str]]:
    """In float32, and cases of moderate size in a half type too; in the short form a third."""
    for number, case in enumerate(cases):
        yield case, "float32"
        if (number % 3 == 1 or not candidate.short) and case.elements < 500_000:
            yield case, "bfloat16" if number % 4 < 2 else "float16"


def one_scaled(case: Case, seed: int, dtype: torch.dtype, factor: str, how: str) -> Problem:
    """One factor scaled: detects squares, clipping and flushing to zero."""
    p, name = Problem.integers(replace(case, bias=False), seed, 2), FACTORS[factor]
    power = 6 if dtype == torch.float16 else 20
    scale = 2.0 ** (power if how == "large" else -power)
    return replace(p, **{name: scale * getattr(p, name)})


small_integers = integer_check(
    "{}, small integers",
    lambda s: in_dtypes(s, [*corners(), *s.random_cases()[:: 4 if s.short else 2]]),
)
block_sizes = integer_check("{}, sizes", lambda s: in_dtypes(s, size_cases(s.short)))
wide_integers = integer_check(
    "{}, 12-bit integers",
    lambda s: itertools.product([*SMALL_LAYERS, *network_layers(True)[:8]], ["float32"], FACTORS),
    lambda case, seed, dtype, factor: Problem.wide(case, seed, FACTORS[factor]),
)
magnitudes = integer_check(
    "{}, large and small numbers",
    lambda s: s.thinned(7, s.some_cases(), DTYPES[:3], FACTORS, ["large", "small"], full=5),
    one_scaled,
    parts=[OUTPUT, INPUT, WEIGHT],
)


def found_and_allowed(
    candidate: Candidate,
    p: Problem,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    quantum: float,
) -> tuple[dict[str, Tensor | None], Expected]:
    """Results of a layer of a dtype, if wanted under autocast to another, and allowed errors.

    With u the largest relative error of a rounding, the allowed error is the sum of u |y| for the
    result, u |y - b| where a bias is added to a rounded sum, the spacing of subnormal numbers, and
    the error of a float32 sum. The last is 0 for sums of multiples of `quantum`; for an algorithm
    that divides, it is below half of the quantum.
    """
    right, info, calls = expected(p), torch.finfo(autocast or dtype), ConvolutionCalls()
    half = info.bits == 16
    with calls if half else contextlib.nullcontext():
        found = candidate.results(p, dtype, autocast)
    u, smallest = (info.eps / 2, info.smallest_normal * info.eps) if half else (0.0, 0.0)
    rounded = {q: abs(t) for q, t in right.items()}
    if p.b is not None:
        rounded[OUTPUT] = rounded[OUTPUT] + abs(right[OUTPUT] - p.b[:, None, None])

    def once_rounded(sums: dict[str, Any]) -> Expected:
        return {q: (1 + 2 * u) * (u * t + sums[q]) + smallest for q, t in rounded.items()}

    def exceeds(allowed: Expected) -> bool:
        return any(m.error > 1 for m in compare(found, right, allowed, dtype))

    exact = candidate.declared("exact_on_integers")
    allowed = once_rounded(dict.fromkeys(rounded, 0.0 if exact else 0.49 * quantum))
    if not (quantum and exact) and exceeds(allowed):
        budget, unit = candidate.declared("rounding_budget"), float32_unit(p, local=not quantum)
        allowed = once_rounded({q: budget * t for q, t in unit.items()})
    # A backend that calls torch.conv2d is allowed the errors of nn.Conv2d: PyTorch's kernels add in
    # the half type on some CPUs.
    for own in (nn.Conv2d, ChannelsLast):
        if half and calls.seen and exceeds(allowed):
            native = arrays(replace(candidate, backend=own).results(p, dtype, autocast))
            allowed = {q: np.maximum(t, abs(native[q] - right[q])) for q, t in allowed.items()}
    roundings = candidate.declared("half_roundings")
    if half and roundings > 1:
        sums = expected(p.map(np.abs))
        allowed = {q: np.maximum(t, roundings * u * sums[q]) for q, t in allowed.items()}
    return found, allowed


class ChannelsLast(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.contiguous(memory_format=torch.channels_last))


class ConvolutionCalls(TorchFunctionMode):
    """Records whether torch.conv2d is called."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func is torch.conv2d
        return func(*args, **(kwargs or {}))


@Check(
    "{}, NaN, Inf and -0.0",
    # A bias would hide the sign of a zero.
    lambda s: s.thinned(7, [replace(c, bias=False) for c in NON_FINITE], DTYPES, FACTORS),
    unit="elements",
    parts=[OUTPUT, INPUT, WEIGHT],
)
def non_finite(candidate: Candidate, case: Case, dtype: str, name: str) -> Errors:
    """One number of a tensor is set to NaN, Inf or 1. Results that it is a factor of must be NaN,
    Inf or finite; all others keep their bits. NaN or Inf times a zero of the padding may be either,
    as with nn.Conv2d, which depends on dtype and CPU."""
    p, factor, kind = Problem.positive(case, candidate.seed), FACTORS[name], getattr(torch, dtype)
    zeros = p.map(lambda t: np.full_like(t, -0.0))
    index = tuple(np.random.default_rng(candidate.seed).integers(0, getattr(p, factor).shape))

    def with_value(value: float, p: Problem) -> Problem:
        changed = getattr(p, factor).copy()
        changed[index] = value
        return replace(p, **{factor: changed})

    with np.errstate(invalid="ignore"):
        of_inf_input = expected(with_value(math.inf, p))  # NaN where it meets a zero of the padding
    spreads = candidate.declared("spreads_non_finite")
    bases = {
        "among positive numbers": p,
        "among -0.0": replace(p, **{factor: getattr(zeros, factor)}),
        "times -0.0": replace(zeros, **{factor: getattr(p, factor)}),
    }
    for words, base in bases.items():
        before = arrays(candidate.results(base, kind))
        of_inf = np.isnan if words == "times -0.0" else np.isposinf
        for value, right in (math.nan, np.isnan), (math.inf, of_inf), (1.0, np.isfinite):
            for name, y in arrays(candidate.results(with_value(value, base), kind)).items():
                reference = of_inf_input[quantity := name.partition(" without")[0]]
                hit, padding = np.isinf(reference), np.isnan(reference)
                equal = y == before[name]
                same = equal & (np.signbit(y) == np.signbit(before[name]))
                good = np.where(hit, right(y), same)
                good |= padding & (equal | np.isnan(y) & (value != 1))
                if spreads:  # within an image, or within a filter's gradient
                    near = (hit | padding).any(tuple(range(1, y.ndim)), keepdims=True)
                    near = near | ~near.any() | np.isfinite(y)
                    good = (value == 1) | np.where(hit, ~np.isfinite(y), near)
                wrong = int((~good).sum())
                text = f"{value} {words} makes {wrong} of {y.size} numbers of the {name} wrong"
                yield CaseError(wrong, text, quantity)
