"""Checks of a convolution: the backend under test, measurements, and the results of a check."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cnntrain.lab.verify.cases import BIAS, INPUT, OUTPUT, WEIGHT, Array, Case, Expected, Problem

WITHOUT = " without gradients"
Results = dict[str, Tensor | None]  # quantity -> what the backend computed

# Limits of an algorithm that its class may declare, with defaults; see docs/convolutions.md.
DECLARED: dict[str, Any] = {
    "rounding_budget": 4.0,  # largest error of a float32 sum, in units of sqrt(K) 2^-24 sum|x||w|
    "half_roundings": 1,  # roundings to bfloat16 or float16, in units of 2^-8 or 2^-11 sum|x||w|
    "exact_on_integers": True,  # sums of small integers have no error
    "third_derivatives": True,  # second derivatives can be differentiated again
    "spreads_non_finite": False,  # NaN or Inf may reach other results of the same image
}


@dataclass(frozen=True)
class Candidate:
    """The backend under test and the options of the verification."""

    backend: Callable[..., nn.Conv2d]
    cases: int
    seed: int
    short: bool
    device: torch.device

    @property
    def kind(self) -> Any:
        """The class, without the options of a ``functools.partial``."""
        return self.backend.func if isinstance(self.backend, partial) else self.backend

    @property
    def name(self) -> str:
        return getattr(self.kind, "__name__", str(self.kind))

    def declared(self, name: str) -> Any:
        """A limit of the algorithm."""
        return getattr(self.kind, name, DECLARED[name])

    @property
    def import_statement(self) -> str:
        """Python that defines the backend again, as `backend`."""
        module = self.kind.__module__
        known = vars(sys.modules[module]).items()  # a class made by a function has another name
        name = next((name for name, value in known if value is self.kind), self.name)
        statement = f"from {module} import {name} as backend"
        if isinstance(self.backend, partial) and self.backend.keywords:
            statement += "; from functools import partial; "
            statement += f"backend = partial(backend, **{dict(self.backend.keywords)!r})"
        return statement

    def thinned(self, step: int, *lists: Iterable[Any], full: int = 1) -> Iterator[tuple]:
        """Each full-th combination of the lists, or in the short form each step-th. Steps divide no
        list's length, so that any two values of two lists occur together."""
        return itertools.islice(itertools.product(*lists), 0, None, step if self.short else full)

    def layer(self, p: Problem, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
        """A new layer with the problem's weight and bias."""
        positional = (p.case.in_channels, p.case.out_channels, p.case.kernel_size)
        layer = self.backend(*positional, **p.case.options()).to(self.device, dtype)
        self.load(layer, p)
        return layer

    def load(self, layer: nn.Conv2d, p: Problem) -> None:
        with torch.no_grad():
            layer.weight.copy_(self.tensor(p.w, layer.weight.dtype))
            if p.b is not None:
                if layer.bias is None:
                    raise TypeError("the layer has no bias")
                layer.bias.copy_(self.tensor(p.b, layer.weight.dtype))

    def tensor(self, values: Array, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def inputs(self, p: Problem, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """x and g, the gradient of the output."""
        return self.tensor(p.x, dtype), self.tensor(p.g, dtype)

    def results(self, p: Problem, dtype: torch.dtype = torch.float64) -> Results:
        """Results of a new layer, and its output once more without gradients."""
        layer, (x, g) = self.layer(p, dtype), self.inputs(p, dtype)
        found = results(layer, x, g)
        with torch.no_grad():
            return {**found, OUTPUT + WITHOUT: layer(x)}


def results(layer: nn.Conv2d, x: Tensor, g: Tensor) -> Results:
    """Output, and the gradients of <g, output>; x and g keep their strides."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    return collected(layer, x, y)


def parameters(layer: nn.Conv2d) -> list[Tensor]:
    """Weight and, if there is one, bias."""
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


def collected(layer: nn.Conv2d, x: Tensor, y: Tensor) -> Results:
    """Output and accumulated gradients."""
    found = {OUTPUT: y.detach(), INPUT: x.grad, WEIGHT: layer.weight.grad}
    return found if layer.bias is None else {**found, BIAS: layer.bias.grad}


class CaseError(NamedTuple):
    """An error measured on one case."""

    error: float
    text: str = ""  # description for the report
    line: str = ""  # of the report, for checks with several
    note: str = ""  # an optional use that is not supported


CaseErrors = Iterator[CaseError]


def deviation(
    found: Tensor | None,
    expected: Array,
    scale: Array | float | None = None,
    dtype: torch.dtype = torch.float64,
) -> CaseError:
    """The largest error in units of `scale`: by default the largest expected number, at least 1.
    Infinite for NaN, and for a wrong shape or dtype."""
    if found is None:
        return CaseError(math.inf, "is missing")
    if tuple(found.shape) != expected.shape:
        return CaseError(math.inf, f"has shape {tuple(found.shape)}, not {expected.shape}")
    if found.dtype != dtype:
        return CaseError(math.inf, f"is {found.dtype}, not {dtype}")
    values = array(found)
    if np.array_equal(values, expected):
        return CaseError(0.0)
    if scale is None:
        scale = max(1.0, float(abs(expected).max()))
    error = abs(values - expected) / scale
    error[np.isnan(error)] = np.inf
    index = np.unravel_index(int(np.argmax(error)), error.shape)
    text = f"is {values[index]:.9g} at {tuple(map(int, index))}, not {expected[index]:.9g}"
    return CaseError(float(error[index]), text)


def compare(
    found: Results,
    expected: Expected,
    scale: dict[str, Any] | float | None = None,
    dtype: torch.dtype = torch.float64,
    line: str = "",
) -> CaseErrors:
    """The deviation of each quantity. `line` is formatted with the quantity."""
    for name in [*expected, *(name for name in found if name not in expected)]:
        quantity = name.removesuffix(WITHOUT)
        if quantity in expected:
            right = expected.get(name, expected[quantity])
            unit = scale[quantity] if isinstance(scale, dict) else scale
            error, text, *_ = deviation(found.get(name), right, unit, dtype)
            yield CaseError(error, f"{name} {text}", line.format(quantity))


def array(t: Tensor) -> Array:
    return t.detach().cpu().double().numpy()


def arrays(found: Results) -> Expected:
    return {q: array(t) for q, t in found.items() if t is not None}


@dataclass
class CheckResult:
    """A line of the report.

    Attributes:
        budget: the largest allowed error.
        unit: of error and budget.
        cases, failed: number of cases, and of those whose error exceeds the budget.
        error: the largest error; infinite after an exception.
        failure: the smallest failed case and its error; empty if all passed.
        rerun: a line of Python that repeats it.
        notes: optional uses that are not supported.
    """

    name: str
    budget: float
    unit: str
    cases: int = 0
    failed: int = 0
    error: float = 0.0
    failure: str = ""
    rerun: str = ""
    smallest: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failed

    def add(self, candidate: Candidate, arguments: tuple, measured: CaseError) -> None:
        """Count a case, and describe it if it is the smallest that failed."""
        self.cases += 1
        self.error = max(self.error, measured.error)
        if not measured.error > self.budget:
            self.notes += [measured.note] if measured.note else []
            return
        self.failed += 1
        case, *words = arguments
        if isinstance(case, Case):
            size, call = case.elements, case.call(candidate.name)
        else:
            size, call = 0, case.replace("Conv2d", candidate.name, 1)
        if not self.failure or size < self.smallest:
            self.smallest = size
            self.failure = ", ".join([call, *words]) + f": {measured.text}"
            given = ", ".join(map(repr, (self.name, *arguments)))
            imports = f"{candidate.import_statement}; from cnntrain.lab.verify import Case, rerun"
            self.rerun = f"{imports}; rerun(backend, {given}, seed={candidate.seed})"


@dataclass(frozen=True)
class Check:
    """A function that measures cases, and the lines of the report that it fills.

    Attributes:
        cases: the arguments of `measure`: a Case, a tuple of a Case and strings, or a string.
        measure: yields errors; any exception fails the case.
    """

    lines: tuple[str, ...]
    cases: Callable[[Candidate], Iterable[Any]]
    measure: Callable[..., CaseErrors]
    budget: Callable[[Candidate], float]
    unit: str

    def run(self, candidate: Candidate) -> list[CheckResult]:
        found = {name: CheckResult(name, self.budget(candidate), self.unit) for name in self.lines}
        for arguments in self.arguments(candidate):
            for name, measured in self.worst(candidate, arguments).items():
                found[name].add(candidate, arguments, measured)
        return list(found.values())

    def arguments(self, candidate: Candidate) -> Iterator[tuple]:
        for case in self.cases(candidate):
            yield case if isinstance(case, tuple) else (case,)

    def worst(self, candidate: Candidate, arguments: tuple) -> dict[str, CaseError]:
        """The largest error of each line in one case."""
        worst: dict[str, CaseError] = {}
        try:
            for measured in self.measure(candidate, *arguments):
                name = measured.line or self.lines[0]
                if name not in worst or measured.error > worst[name].error:
                    worst[name] = measured
        except (Exception, SystemExit) as error:
            text = str(error).strip().split("\n")[0]
            raised = CaseError(math.inf, f"{type(error).__name__}: {text}")
            worst.update({n: raised for n in self.lines if n not in worst or len(self.lines) == 1})
        return worst


# Options of checks on integers. The results of an algorithm that divides are rounded first.
EXACT: dict[str, Any] = {
    "budget": lambda candidate: 0.0 if candidate.declared("exact_on_integers") else 0.49,
    "unit": "absolute",
}


def check(
    *lines: str,
    cases: Callable[[Candidate], Iterable[Any]],
    budget: float | Callable[[Candidate], float] = 0.0,
    unit: str = "",
) -> Callable[[Callable[..., CaseErrors]], Check]:
    """Decorator: makes a Check of a function that measures a case. The default unit is the largest
    expected number, or, if the budget is 0, 1 for a failure."""
    limit = budget if callable(budget) else lambda candidate: budget
    return lambda measure: Check(
        lines, cases, measure, limit, unit or ("relative" if budget else "failures")
    )
