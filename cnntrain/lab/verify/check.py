"""Checks of a convolution: the backend under test, measurements, and the results of a check."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cnntrain.lab.verify.cases import QUANTITIES, Case, Expected, Problem, corners, random_cases

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

    def random_cases(self) -> list[Case]:
        return list(random_cases(self.seed, self.cases))

    def some_cases(self) -> list[Case]:
        """Corners, and random cases other than `random_cases`."""
        others = random_cases(self.seed + 1, max(self.cases // 10, 1))
        return [*corners()[:: 3 if self.short else 1], *others]

    def layer(self, p: Problem, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
        """A new layer with the problem's weight and bias."""
        positional = (p.case.in_channels, p.case.out_channels, p.case.kernel_size)
        layer = self.backend(*positional, **p.case.options()).to(self.device, dtype)
        self.load(layer, p)
        return layer

    def load(self, layer: nn.Conv2d, p: Problem) -> None:
        with torch.no_grad():
            for name, values in self.parameters(p, layer.weight.dtype).items():
                layer.get_parameter(name).copy_(values)

    def parameters(self, p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
        given = {"weight": p.w, "bias": p.b}
        return {n: self.tensor(t, dtype) for n, t in given.items() if t is not None}

    def tensor(self, values: np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def inputs(self, p: Problem, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """x and g, the gradient of the output."""
        return self.tensor(p.x, dtype), self.tensor(p.g, dtype)

    def results(
        self, p: Problem, dtype: torch.dtype = torch.float64, autocast: torch.dtype | None = None
    ) -> Results:
        """Results of a new layer: in a dtype, and its output once more without gradients; or under
        autocast to another dtype."""
        layer, (x, g) = self.layer(p, dtype), self.inputs(p, dtype)
        if autocast is None:
            found = results(layer, x, g)
            with torch.no_grad():
                return {**found, "output without gradients": layer(x)}
        with torch.autocast(self.device.type, autocast):
            y = layer(x.requires_grad_())
        if y.dtype != autocast:
            raise TypeError(f"the output is {y.dtype} under autocast to {autocast}")
        y.backward(g.to(autocast))
        return {q: None if t is None else t.float() for q, t in collected(layer, x, y).items()}


def results(layer: nn.Conv2d, x: Tensor, g: Tensor) -> Results:
    """Output, and the gradients of <g, output>; x and g keep their strides."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    return collected(layer, x, y)


def collected(layer: nn.Conv2d, x: Tensor, y: Tensor) -> Results:
    """Output and accumulated gradients."""
    gradients = (t.grad for t in (x, *layer.parameters()))
    return dict(zip(QUANTITIES, (y.detach(), *gradients), strict=False))


class CaseError(NamedTuple):
    """An error measured on one case."""

    error: float  # or True for a failure
    text: str = ""  # description for the report
    part: str = ""  # quantity or other part of the check, where each has a line in the report
    note: str = ""  # an optional use that is not supported


Errors = Iterator[CaseError]


def compare(
    found: Results,
    expected: Expected,
    scale: dict[str, Any] | float | None = None,
    dtype: torch.dtype = torch.float64,
    allowed: dict[str, Any] | None = None,
) -> Errors:
    """The largest error of each quantity. Infinite for NaN, and for a wrong shape or dtype.

    Args:
        scale: unit of the errors: by default the largest expected number, at least 1.
        allowed: errors that are subtracted.
    """
    for name in dict.fromkeys([*expected, *found]):
        quantity = name.partition(" without")[0]
        if quantity in expected:
            unit = scale[quantity] if isinstance(scale, dict) else scale
            slack = allowed[quantity] if allowed else 0.0
            error, text = _deviation(found.get(name), expected[quantity], unit, dtype, slack)
            yield CaseError(error, f"{name} {text}", quantity)


def _deviation(
    found: Tensor | None, expected: np.ndarray, scale: Any, dtype: torch.dtype, allowed: Any
) -> tuple[float, str]:
    if found is None:
        return math.inf, "is missing"
    if tuple(found.shape) != expected.shape:
        return math.inf, f"has shape {tuple(found.shape)}, not {expected.shape}"
    if found.dtype != dtype:
        return math.inf, f"is {found.dtype}, not {dtype}"
    values = array(found)
    if np.array_equal(values, expected):
        return 0.0, ""
    scale = max(1.0, abs(expected).max()) if scale is None else scale
    error = np.maximum(abs(values - expected) - allowed, 0) / scale
    error[np.isnan(error)] = np.inf
    index = np.unravel_index(int(np.argmax(error)), error.shape)
    text = f"is {values[index]:.9g} at {tuple(map(int, index))}, not {expected[index]:.9g}"
    return float(error[index]), text


def array(t: Tensor) -> np.ndarray:
    return t.detach().cpu().double().numpy()


def arrays(found: Results) -> Expected:
    return {q: array(t) for q, t in found.items() if t is not None}


@dataclass
class CheckResult:
    """A line of the report."""

    name: str
    budget: float  # the largest allowed error
    unit: str  # of error and budget
    cases: int = 0
    failed: int = 0  # cases whose error exceeds the budget
    error: float = 0.0  # the largest; infinite after an exception
    failure: str = ""  # the smallest failed case and its error; empty if all passed
    rerun: str = ""  # a line of Python that repeats it
    smallest: int = 0  # numbers in input and weight of that case
    notes: list[str] = field(default_factory=list)  # optional uses that are not supported

    @property
    def passed(self) -> bool:
        return not self.failed

    def add(self, candidate: Candidate, arguments: tuple, measured: CaseError) -> None:
        """Count a case, and describe it if it is the smallest that failed."""
        self.cases += 1
        self.error = max(self.error, float(measured.error))
        if measured.error <= self.budget:
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


@dataclass
class Check:
    """Decorator of a function that measures a case: yields errors, and fails it by any exception.

    Attributes:
        line: of the report; formatted with the parts, where each has a line.
        cases: arguments of the function: Cases, strings, or tuples of a Case and strings.
        limit: the largest allowed error.
        unit: the default is 1 for a failure; "relative" is the largest expected number.
    """

    line: str
    cases: Callable[[Candidate], Iterable[Any]]
    limit: float | Callable[[Candidate], float] = 0.0
    unit: str = "failures"
    parts: Sequence[str] = QUANTITIES

    def __call__(self, measure: Callable[..., Errors]) -> Check:
        self.measure = measure
        return self

    def budget(self, candidate: Candidate) -> float:
        return self.limit(candidate) if callable(self.limit) else self.limit

    @property
    def lines(self) -> list[str]:
        return list(dict.fromkeys(map(self.line.format, self.parts)))

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
                name = self.line.format(measured.part)
                if name not in worst or measured.error > worst[name].error:
                    worst[name] = measured
        except (Exception, SystemExit) as error:
            text = str(error).strip().split("\n")[0]
            raised = CaseError(math.inf, f"{type(error).__name__}: {text}")
            lines = self.lines
            worst.update({n: raised for n in lines if n not in worst or len(lines) == 1})
        return worst
