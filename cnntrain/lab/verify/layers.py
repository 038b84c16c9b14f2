"""Layers to run checks on: small ones, those of known networks, sizes with special code paths."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cnntrain.lab.verify.cases import INPUT, OUTPUT, QUANTITIES, Case, Expected, Problem, listed
from cnntrain.lab.verify.check import Candidate, Check, Errors, Results, collected, compare
from cnntrain.lab.verify.numerics import expected

DTYPES = ["float32", "bfloat16", "float16", "float64"]
SMALL_LAYERS = listed("small")
NON_FINITE = SMALL_LAYERS + listed("non_finite")


def size_cases(short: bool) -> list[Case]:
    """Sizes at which implementations switch algorithms, mostly one dimension at a time: powers of
    two and their neighbours, many groups, large kernels, more than 64 MiB of im2col columns."""
    step = 3 if short else 1
    batches = [n + i for n in (16, 32, 64, 128) for i in (0, -1, 1)]
    sides = [n + i for n in (128, 64, 129, 256, 32) for i in (0, -1, 1)]
    channels = [n + i for n in (64, 128, 256, 32) for i in (0, -1, 1)]
    between = [40, 70, 131, 300] if short else [40, 70, 131, 300, 513, 1025]
    cases = [
        *(Case(2, 3, 3, (n, 5, 6), padding=1) for n in batches),
        *(Case(3, 4, 1, (n, 3, 4)) for n in batches[::step]),
        *(Case(4, 4, 3, (n, 5, 4), groups=4) for n in batches[::step]),
        *(Case(4, 6, (2, 3), (n, 5, 4), stride=2, groups=2) for n in batches[::step]),
        *(Case(1, 2, 3, (1, n, n + 1), padding=1) for n in sides[::step]),
        *(Case(2, 2, 3, (1, 5, n), stride=2) for n in sides),
        *(Case(2, 2, (3, 2), (1, n, 5), dilation=2) for n in sides),
        *(Case(2, 2, 3, (1, n, 6), padding=1, groups=2) for n in sides[::step]),
        *(Case(n, 3, 3, (2, 4, 5), padding=1) for n in channels),
        *(Case(3, n, 3, (2, 4, 5), stride=2) for n in channels),
        *(Case(n, n, 1, (2, 4, 4)) for n in channels[::step]),
        *(Case(n, n, 3, (1, 4, 4), padding=1) for n in channels[::step]),
        *(Case(n, n, 3, (2, 4, 4), padding=1, groups=n) for n in channels[::step]),
        *(Case(2, 3, k, (2, k + 4, k + 5)) for k in range(6, 17)),
        *(Case(1, 2, (k, 18 - k), (2, 20, 23), 2, k // 2) for k in range(7, 17, 1 + short)),
        *(Case(2 * n, 4 * n, 3, (2, 5, 5), padding=1, groups=n) for n in (6, 8, 12, 16)),
        *(Case(3 * n, 2 * n, (2, 3), (2, 5, 5), stride=2, groups=n) for n in (5, 7, 9, 16)),
        *(Case(n, m * n, 3, (3, 5, 6), padding=1, groups=n) for n in (3, 8, 32) for m in (2, 3)),
        *(Case(2, 3, (3, 2), (n, 4, 5), padding=1) for n in between),
        *(Case(n, 4, (3, 2), (2, 4, 5), padding=1) for n in between),
        *(Case(4, n, 3, (2, 5, 6), stride=(2, 1)) for n in between),
        *(Case(n, n // 2, 1, (2, 4, 5), stride=2) for n in between),
        *(Case(n, 2 * n, 3, (2, 5, 4), groups=n, stride=2) for n in between),
        *(Case(2, 3, 3, (1, n, 3), padding=1) for n in between),
        *(Case(2, 3, 3, (1, 5, n), stride=(1, 2), dilation=2, padding=2) for n in between),
        *listed("sizes"),
    ]
    return cases if short else [*cases, *network_layers(short), *listed("large_sizes")]


def network_layers(short: bool) -> list[Case]:
    """Layers for rounding errors: those of known networks, and sums long enough to show addition in
    a half type. Windows cover every pixel."""
    return listed("networks") + ([] if short else listed("large_networks"))


class IntegerLayer:
    """A layer in some dtype whose parameters, inputs and gradients are small integers.

    Every dtype holds their sums exactly, and implementations may have a code path for each.
    """

    def __init__(self, candidate: Candidate, case: Case, dtype: str) -> None:
        self.candidate, self.case, self.dtype = candidate, case, getattr(torch, dtype)
        self.p = self.problem()
        self.layer = candidate.layer(self.p, self.dtype)

    def problem(self, other: int = 0, weights: int = 0, **options: Any) -> Problem:
        """Other numbers, and other options of the case."""
        case, seed = replace(self.case, **options), self.candidate.seed
        return Problem.small(case, seed + other, seed + weights)

    def inputs(self, p: Problem | None = None) -> tuple[Tensor, Tensor]:
        """x, which requires a gradient, and g."""
        x, g = self.candidate.inputs(p or self.p, self.dtype)
        return x.requires_grad_(), g

    def compare(self, found: Results, right: Problem | Expected, *quantities: str) -> Errors:
        """With all expected quantities, or with some."""
        right = expected(right) if isinstance(right, Problem) else right
        right = {q: t for q, t in right.items() if not quantities or q in quantities}
        yield from compare(found, right, 1.0, self.dtype)

    def collected(self, x: Tensor, y: Tensor) -> Results:
        return collected(self.layer, x, y)

    def call(self, x: Tensor, g: Tensor, gradients: bool = True) -> Results:
        """Output, and if wanted the gradients of input and parameters."""
        with torch.set_grad_enabled(gradients):
            y = self.layer(x)
        leaves = [x, *self.layer.parameters()]
        found = (y, *(torch.autograd.grad(y, leaves, g) if gradients else ()))
        return dict(zip(QUANTITIES, found, strict=False))

    def differentiated(self, y: Tensor, inputs: list[Tensor], p: Problem) -> Errors:
        """The output and its gradients by autograd.grad."""
        g = self.candidate.tensor(p.g, self.dtype)
        gradients = torch.autograd.grad(y, inputs, g, retain_graph=True)
        return self.compare(dict(zip(expected(p), (y, *gradients), strict=True)), p)

    def forward(self, x: Tensor, mode: str) -> Tensor:
        """The output in a mode."""
        if self.layer.training == mode.startswith("eval"):  # calling `train` may clear a cache
            self.layer.train(not self.layer.training)
        self.layer.requires_grad_(mode != "frozen")
        with CONTEXTS.get(mode.removeprefix("eval and "), contextlib.nullcontext)():
            return self.layer(x)

    def one_pass(self, p: Problem | None = None, mode: str = "train") -> Errors:
        """Output and gradients in a mode."""
        p = p or self.p
        x, g = self.inputs(p)
        if MODES[mode] == (OUTPUT,):
            found: Results = {OUTPUT: self.forward(x.detach(), mode)}
        else:
            self.layer.zero_grad()
            y = self.forward(x, mode)
            y.backward(g)
            found = self.collected(x, y)
        yield from self.compare(found, p, *MODES[mode])

    def passes(self, *problems: Problem) -> Errors:
        """All problems in one mode, then in the next."""
        few = ["train", "no_grad", "eval and inference_mode"]
        for mode, p in itertools.product(few if self.candidate.short else UNFROZEN, problems):
            yield from self.one_pass(p, mode)


CONTEXTS: dict[str, Any] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
MODES = {
    "train": QUANTITIES,
    "eval": QUANTITIES,
    "no_grad": (OUTPUT,),
    "inference_mode": (OUTPUT,),
    "eval and no_grad": (OUTPUT,),
    "eval and inference_mode": (OUTPUT,),
    "frozen": (OUTPUT, INPUT),
}
UNFROZEN = [mode for mode in MODES if mode != "frozen"]


def layer_check(
    line: str,
    *words: Iterable[str],
    step: int = 1,
    full: int = 1,
    cases: Callable[[Candidate], Iterable[Any]] | None = None,
    exact: bool = True,
) -> Callable[[Callable[..., Errors]], Check]:
    """Decorator: makes a Check of a function of an `IntegerLayer` and words.

    Args:
        words, step, full: each small layer in each dtype with all words, `Candidate.thinned`.
        cases: others.
        exact: the errors are those of results, not 1 for a failure. The results of an algorithm
            that divides are rounded first.
    """

    def small_layers(candidate: Candidate) -> Iterable[Any]:
        return candidate.thinned(step, SMALL_LAYERS, DTYPES, *words, full=full)

    def budget(candidate: Candidate) -> float:
        return 0.49 if exact and not candidate.declared("exact_on_integers") else 0.0

    def enter(measure: Callable[..., Errors]) -> Check:
        def on_layer(candidate: Candidate, case: Case, dtype: str, *words: str) -> Errors:
            return measure(IntegerLayer(candidate, case, dtype), *words)

        unit = "absolute" if exact else "failures"
        return Check(line, cases or small_layers, budget, unit)(on_layer)

    return enter
