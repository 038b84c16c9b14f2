"""What a check is: cases, a measurement, and a budget that no case may exceed."""

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

from cnntrain.lab.verify.cases import Case
from cnntrain.lab.verify.oracles import BIAS, INPUT, OUTPUT, WEIGHT, Array, Problem, Truth

WITHOUT = " without gradients"
Results = dict[str, Tensor | None]  # quantity -> what the backend makes of it


class Wrong(Exception):
    """Something is wrong in a way that no number tells."""


@dataclass(frozen=True)
class Subject:
    """The backend that is checked, and how thoroughly."""

    backend: Callable[..., nn.Conv2d]
    cases: int
    seed: int
    short: bool
    device: torch.device

    @property
    def kind(self) -> Any:
        """The class, without the options that a config adds to it."""
        return self.backend.func if isinstance(self.backend, partial) else self.backend

    @property
    def exact(self) -> bool:
        """Whether sums of whole numbers have no error at all."""
        return getattr(self.kind, "exact_on_integers", True)

    @property
    def rounding_budget(self) -> float:
        return float(getattr(self.kind, "rounding_budget", 4.0))

    @property
    def importable(self) -> bool:
        """Whether pickle finds the class by its name; not what a function returned."""
        module = sys.modules.get(self.kind.__module__)
        return getattr(module, getattr(self.kind, "__qualname__", ""), None) is self.kind

    @property
    def imports(self) -> str:
        """Python that makes the backend again, under this name."""
        module = self.kind.__module__
        known = vars(sys.modules[module]).items()  # a class from a function has another name there
        name = next((name for name, value in known if value is self.kind), self.name)
        options = dict(self.backend.keywords) if isinstance(self.backend, partial) else {}
        made = f"from {module} import {name} as backend"
        if options:
            made += f"; from functools import partial; backend = partial(backend, **{options!r})"
        return made

    @property
    def name(self) -> str:
        return getattr(self.kind, "__name__", str(self.kind))

    def thinned(self, step: int, *lists: Iterable[Any], full: int = 1) -> Iterator[tuple]:
        """All combinations, or each full-th; of the short form each step-th: numbers that divide no
        length, so that each two of any two lists meet."""
        return itertools.islice(itertools.product(*lists), 0, None, step if self.short else full)

    def layer(self, case: Case, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
        layer = self.backend(
            case.in_channels, case.out_channels, case.kernel_size, **case.options()
        )
        return layer.to(self.device, dtype)

    def loaded(self, p: Problem, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
        """A layer with the problem's weight and bias."""
        layer = self.layer(p.case, dtype)
        self.load(layer, p)
        return layer

    def load(self, layer: nn.Conv2d, p: Problem) -> None:
        with torch.no_grad():
            layer.weight.copy_(self.tensor(p.w, layer.weight.dtype))
            if p.b is not None:
                if layer.bias is None:
                    raise Wrong("has no bias")
                layer.bias.copy_(self.tensor(p.b, layer.weight.dtype))

    def tensor(self, values: Array, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def inputs(self, p: Problem, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """x and g, the gradient of the output."""
        return self.tensor(p.x, dtype), self.tensor(p.g, dtype)

    def results(self, p: Problem, dtype: torch.dtype = torch.float64) -> Results:
        """What a new layer makes of a problem, and its output once more without gradients."""
        layer, (x, g) = self.loaded(p, dtype), self.inputs(p, dtype)
        found = results(layer, x, g)
        with torch.no_grad():
            return {**found, OUTPUT + WITHOUT: layer(x)}


def results(layer: nn.Conv2d, x: Tensor, g: Tensor) -> Results:
    """Output, and the gradients of <g, output>; x and g are given with the strides they have."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    return collected(layer, x, y)


def parameters(layer: nn.Conv2d) -> list[Tensor]:
    """Weight and bias; the latter only if there is one."""
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


def collected(layer: nn.Conv2d, x: Tensor, y: Tensor) -> Results:
    found = {OUTPUT: y.detach(), INPUT: x.grad, WEIGHT: layer.weight.grad}
    return found if layer.bias is None else {**found, BIAS: layer.bias.grad}


class Finding(NamedTuple):
    """One measurement. `line` counts only where a check has several."""

    error: float
    text: str  # what there is to say about it, should it be too large
    line: str = ""
    note: str = ""  # what cannot be done, and need not


def deviation(
    found: Tensor | None,
    expected: Array,
    scale: Array | float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Finding:
    """The largest error as a multiple of `scale`: by default of the largest number expected, or of
    1 where all are smaller. Infinite if there is a nan, or another shape or dtype."""
    if found is None:
        return Finding(math.inf, "is missing")
    if tuple(found.shape) != expected.shape:
        return Finding(math.inf, f"has shape {tuple(found.shape)}, not {expected.shape}")
    if found.dtype != dtype:
        return Finding(math.inf, f"is {found.dtype}, not {dtype}")
    values = array(found)
    if np.array_equal(values, expected):
        return Finding(0.0, "")
    if scale is None:
        scale = max(1.0, float(abs(expected).max()))
    off = abs(values - expected) / scale
    index = np.unravel_index(int(np.argmax(np.where(np.isnan(off), np.inf, off))), off.shape)
    text = f"is {values[index]:.9g} at {tuple(map(int, index))}, not {expected[index]:.9g}"
    return Finding(math.inf if np.isnan(off[index]) else float(off[index]), text)


def compare(
    found: Results,
    truth: Truth,
    scale: dict[str, Any] | float | None = None,
    dtype: torch.dtype = torch.float64,
    line: str = "",
) -> Iterator[Finding]:
    """Each quantity against what it should be. `line` is formatted with the quantity."""
    for name in [*truth, *(name for name in found if name not in truth)]:
        quantity = name.removesuffix(WITHOUT)
        if quantity in truth:
            expected = truth.get(name, truth[quantity])
            unit = scale[quantity] if isinstance(scale, dict) else scale
            error, text, *_ = deviation(found.get(name), expected, unit, dtype)
            yield Finding(error, f"{name} {text}", line.format(quantity))


def array(t: Tensor) -> Array:
    return t.detach().cpu().double().numpy()


def truth_of(found: Results) -> Truth:
    """A backend's results as what others have to agree with."""
    return {q: array(t) for q, t in found.items() if t is not None}


@dataclass
class Line:
    """A line of the report.

    Attributes:
        unit: of error and budget.
        cases, failed: how many cases there were, and how many of them exceeded the budget.
        error: the worst error. Infinite if there was an exception, or a result that no number can
            be compared with.
        failure: the smallest case that failed and what is wrong there; empty if there is none.
        rerun: a line of Python that shows it again.
        notes: what a layer cannot do, and need not.
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

    def add(self, subject: Subject, arguments: tuple, finding: Finding) -> None:
        self.cases += 1
        self.error = max(self.error, finding.error)
        if not finding.error > self.budget:
            self.notes += [finding.note] if finding.note else []
            return
        self.failed += 1
        case, *words = arguments
        if not self.failure or case.elements < self.smallest:
            self.smallest = case.elements
            shown = ", ".join([case.call(subject.name), *words])
            self.failure = f"{shown}: {finding.text}"
            given = [self.name, *arguments]
            self.rerun = (
                f"{subject.imports}; from cnntrain.lab.verify import {type(case).__name__}, rerun; "
                f"rerun(backend, {', '.join(map(repr, given))}, seed={subject.seed})"
            )


@dataclass(frozen=True)
class Check:
    """Some lines of the report, from the same cases.

    Attributes:
        cases: the arguments of `measure`: a Case, or a tuple of one and words that say more.
        measure: yields errors, or raises: any exception is a failure of the case, no more.
    """

    lines: tuple[str, ...]
    cases: Callable[[Subject], Iterable[Any]]
    measure: Callable[..., Iterator[Finding]]
    budget: Callable[[Subject], float]
    unit: str

    def run(self, subject: Subject) -> list[Line]:
        lines = {name: Line(name, self.budget(subject), self.unit) for name in self.lines}
        for arguments in self.cases(subject):
            arguments = arguments if isinstance(arguments, tuple) else (arguments,)
            for name, finding in self.worst(subject, arguments).items():
                lines[name].add(subject, arguments, finding)
        return list(lines.values())

    def worst(self, subject: Subject, arguments: tuple) -> dict[str, Finding]:
        worst: dict[str, Finding] = {}
        try:
            for finding in self.measure(subject, *arguments):
                name = finding.line or self.lines[0]
                if name not in worst or finding.error > worst[name].error:
                    worst[name] = finding
        except (Exception, SystemExit) as error:  # a backend that exits has not passed
            text = str(error).strip().split("\n")[0]
            if not isinstance(error, Wrong):
                text = f"{type(error).__name__}: {text}"
            raised = Finding(math.inf, text)
            worst.update({n: raised for n in self.lines if n not in worst or len(self.lines) == 1})
        return worst


# Of checks on whole numbers: an algorithm that divides is right when its results are rounded.
EXACT: dict[str, Any] = {
    "budget": lambda subject: 0.0 if subject.exact else 0.49,
    "unit": "absolute",
}


def check(
    *lines: str,
    cases: Callable[[Subject], Iterable[Any]],
    budget: float | Callable[[Subject], float] = 0.0,
    unit: str = "",
) -> Callable[[Callable[..., Iterator[Finding]]], Check]:
    """Makes a check of a function that measures a case. Without a unit, errors are relative to the
    largest number expected, or, where the budget is 0, 1 for a failure."""
    limit = budget if callable(budget) else lambda subject: budget
    return lambda measure: Check(
        lines, cases, measure, limit, unit or ("relative" if budget else "failures")
    )
