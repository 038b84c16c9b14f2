"""Layers to run checks on: small ones, those of known networks, sizes with special code paths."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cnntrain.lab.verify.cases import INPUT, OUTPUT, QUANTITIES, Case, Problem, listed
from cnntrain.lab.verify.check import (
    EXACT,
    Candidate,
    CaseErrors,
    Check,
    Results,
    check,
    compare,
    parameters,
    results,
)
from cnntrain.lab.verify.numerics import expected

DTYPES = ["float32", "bfloat16", "float16", "float64"]

SMALL_LAYERS, WIDE_LAYERS, THREADED_LAYERS = map(listed, ("small", "wide", "threaded"))
NON_FINITE = SMALL_LAYERS + listed("non_finite")
EMPTY_BATCHES = [
    *(replace(c, size=(0, *c.size[-2:])) for c in SMALL_LAYERS if c.padding_mode == "zeros"),
    *(Case(3, 2, 3, (0, 5, 6), padding=1, padding_mode=m) for m in ("replicate", "circular")),
]


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

    def new_parameters(self, p: Problem) -> dict[str, Tensor]:
        given = {"weight": p.w, "bias": p.b}
        return {n: self.candidate.tensor(t, self.dtype) for n, t in given.items() if t is not None}

    def compare(self, found: Results, p: Problem, *quantities: str) -> CaseErrors:
        """With all quantities of the problem, or with some."""
        right = {q: t for q, t in expected(p).items() if not quantities or q in quantities}
        yield from compare(found, right, 1.0, self.dtype)

    def call(self, x: Tensor, g: Tensor, gradients: bool = True) -> Results:
        """Output, and if wanted the gradients of input and parameters."""
        with torch.set_grad_enabled(gradients):
            y = self.layer(x)
        leaves = [x, *parameters(self.layer)]
        found = (y, *(torch.autograd.grad(y, leaves, g) if gradients else ()))
        return dict(zip(QUANTITIES, found, strict=False))

    def differentiated(
        self, y: Tensor, inputs: Iterable[Tensor], p: Problem, **options: Any
    ) -> CaseErrors:
        """The output and its gradients by autograd.grad."""
        g = self.candidate.tensor(p.g, self.dtype)
        gradients = torch.autograd.grad(y, list(inputs), g, **options)
        return self.compare(dict(zip(expected(p), (y, *gradients), strict=True)), p)

    def one_pass(self, p: Problem | None = None, mode: str = "train") -> CaseErrors:
        """Output and gradients in a mode."""
        p = p or self.p
        (x, g), layer = self.inputs(p), self.layer
        if layer.training == mode.startswith("eval"):  # calling `train` may clear a cache
            layer.train(not layer.training)
        for t in parameters(layer):
            t.requires_grad_(mode != "frozen")
        if MODES[mode] == (OUTPUT,):
            with without_gradients(mode):
                found: Results = {OUTPUT: layer(x.detach())}
        else:
            found = results(layer, x, g)
        yield from self.compare(found, p, *MODES[mode])

    def passes(self, *problems: Problem) -> CaseErrors:
        """All problems in one mode, then in the next."""
        few = ["train", "no_grad", "eval and inference_mode"]
        for mode, p in itertools.product(few if self.candidate.short else UNFROZEN, problems):
            yield from self.one_pass(p, mode)


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


def without_gradients(mode: str) -> Any:
    return torch.inference_mode() if mode.endswith("inference_mode") else torch.no_grad()


def small_layers(
    *words: Iterable[str], step: int = 1, full: int = 1
) -> Callable[[Candidate], Iterable[Any]]:
    """Each small layer in each dtype with all words, thinned."""
    return lambda candidate: candidate.thinned(step, SMALL_LAYERS, DTYPES, *words, full=full)


def layer_check(
    line: str, cases: Callable[[Candidate], Iterable[Any]] | None = None, exact: bool = True
) -> Callable[[Callable[..., CaseErrors]], Check]:
    """Decorator: makes a Check of a function of an `IntegerLayer` and words.

    Args:
        cases: by default all small layers in all dtypes, without words.
        exact: the errors are those of results, not 1 for a failure.
    """

    def enter(measure: Callable[..., CaseErrors]) -> Check:
        def on_layer(candidate: Candidate, case: Case, dtype: str, *words: str) -> CaseErrors:
            return measure(IntegerLayer(candidate, case, dtype), *words)

        options = EXACT if exact else {}
        return check(line, cases=cases or small_layers(), **options)(on_layer)

    return enter
