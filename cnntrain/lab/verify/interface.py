"""Comparison of a layer's interface and uses with those of ``nn.Conv2d``."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from cnntrain.lab.verify.cases import OUTPUT, Case, Problem
from cnntrain.lab.verify.check import (
    Candidate,
    CaseError,
    CaseErrors,
    check,
    compare,
    results,
)
from cnntrain.lab.verify.layers import EMPTY_BATCHES, SMALL_LAYERS
from cnntrain.lab.verify.numerics import FLOAT64, expected

STYLES = ["by position", "by keyword", "in float64"]


@check("constructor and initial weights", cases=lambda _: itertools.product(SMALL_LAYERS, STYLES))
def constructor(candidate: Candidate, case: Case, style: str) -> CaseErrors:
    """Attributes, initial weights, and the number of random numbers drawn: with the same seed, the
    layers made afterwards are the same too."""
    positions = (case.in_channels, case.out_channels, case.kernel_size)
    every = {**vars(Case(*positions, case.size)), **case.options()}
    del every["size"]
    arguments, options = {
        "by position": ((*positions, *list(every.values())[3:]), {}),
        "by keyword": ((), every),
        "in float64": (positions, {**case.options(), "dtype": torch.float64}),
    }[style]

    def made(kind: Callable[..., nn.Conv2d]) -> tuple[nn.Conv2d, Tensor]:
        torch.manual_seed(candidate.seed)
        return kind(*arguments, **options, device=candidate.device), torch.rand(3)

    (right, then), (found, found_then) = made(nn.Conv2d), made(candidate.backend)
    if not isinstance(found, nn.Conv2d):
        raise TypeError(f"{type(found).__name__} is not derived from nn.Conv2d")
    for name in [*nn.Conv2d.__constants__, "training"]:
        wanted, value = getattr(right, name), getattr(found, name, None)
        yield CaseError(float(value != wanted), f"{name} is {value}, not {wanted}")
    other = "initial weights other than nn.Conv2d's for the same seed"
    assert_close(found.state_dict(), right.state_dict(), rtol=0, atol=0,
                 msg=lambda text: f"{other}: {' '.join(text.split())}")  # fmt: skip
    for name, values in found.named_parameters():
        yield CaseError(float(not values.requires_grad), f"{name} is not trained")
    found.load_state_dict(right.state_dict())
    right.load_state_dict(found.state_dict())
    text = "the random numbers after it are others than after nn.Conv2d"
    yield CaseError(float(not torch.equal(then, found_then)), text)


def importable(candidate: Candidate) -> bool:
    """Whether pickle finds the class by its name."""
    kind = candidate.kind
    module = sys.modules.get(kind.__module__)
    return getattr(module, getattr(kind, "__qualname__", ""), None) is kind


@check(
    "copies and pickles",
    cases=lambda c: itertools.product(SMALL_LAYERS, ["deepcopy", "pickle"][: 1 + importable(c)]),
    budget=FLOAT64,
)
def copies(candidate: Candidate, case: Case, word: str) -> CaseErrors:
    p, q = (Problem.normal(case, candidate.seed + i) for i in range(2))
    layer, (x, g) = candidate.layer(p), candidate.inputs(p)
    results(layer, x, g)  # layers are usually copied after their first call
    again = copy.deepcopy(layer) if word == "deepcopy" else pickle.loads(pickle.dumps(layer))
    yield CaseError(float(type(again) is not type(layer)), f"is a {type(again).__name__}")
    yield from compare(results(again, x, g), expected(p))
    candidate.load(again, q)
    yield from compare(results(layer, x, g), expected(p))
    yield from compare(results(again, x, g), expected(replace(p, w=q.w, b=q.b)))


@check("empty batch", cases=lambda _: EMPTY_BATCHES, unit="relative")
def empty_batch(candidate: Candidate, case: Case) -> CaseErrors:
    """An empty output, and zero gradients of weight and bias."""
    p = Problem.normal(case, candidate.seed)
    yield from compare(candidate.results(p), expected(p))
    with torch.no_grad():
        y = candidate.layer(p)(candidate.tensor(p.x))
    yield from compare({OUTPUT: y}, {OUTPUT: p.g})


INVALID_CALLS = Path(__file__).with_name("invalid_calls.txt").read_text().splitlines()


@check("errors that nn.Conv2d raises", cases=lambda _: INVALID_CALLS)
def errors(candidate: Candidate, call: str) -> CaseErrors:
    """An exception of nn.Conv2d's type or a subclass, or AttributeError in place of TypeError."""

    def raised(kind: Callable[..., nn.Conv2d]) -> type[BaseException] | None:
        try:
            with candidate.device:
                eval(call, {"Conv2d": kind, "torch": torch})
        except (Exception, SystemExit) as error:
            return type(error)
        return None

    right, found = raised(nn.Conv2d), raised(candidate.backend)
    allowed = (TypeError, AttributeError) if right is TypeError else right
    same = issubclass(found, allowed) if found and allowed else found is right
    names = [kind.__name__ if kind else "nothing" for kind in (found, right)]
    yield CaseError(float(not same), "raises {}, not {}".format(*names))


Backend = Callable[..., nn.Conv2d]
Parameters = dict[str, Tensor]
# Height and width, groups and dilation all differ. The output is 2 x 2, because compilers unroll a
# loop over its positions.
OPTIONS: dict[str, Any] = {"in_channels": 4, "out_channels": 6, "kernel_size": (2, 3)}
OPTIONS |= {"stride": (1, 2), "dilation": (1, 2), "groups": 2}


class Unsupported(Exception):
    """A result is right, and not of the kind that was asked for."""


class Reference(nn.Conv2d):
    """``nn.Conv2d``, which no use compiles or exports."""


@dataclass(frozen=True, eq=False)
class Use:
    """A use of a layer.

    Attributes:
        function: takes a layer and its input, and returns the numbers to compare.
        required: by any training program: unsupported counts as a failure.
        slow: not in the short form; most import PyTorch's compiler.
        tolerance: in units of a tensor's largest number; 0: ``torch.testing.assert_close``'s.
        options: of the layer, other than OPTIONS, and `dtype` and `size` of the input.
    """

    function: Callable[[nn.Conv2d, Tensor], Any]
    required: bool
    slow: bool
    tolerance: float
    options: dict[str, Any]

    def __call__(self, backend: Backend) -> None:
        """Raises AssertionError for a wrong number, another exception if it is unsupported."""
        layer, reference, x = layers_and_input(backend, **self.options)
        found, right = (self.function(conv, x.clone()) for conv in (layer, reference))
        if not self.tolerance:
            return assert_close(found, right)
        for tensor, wanted in zip(found, right, strict=True):
            atol = self.tolerance * wanted.abs().max().item()
            assert_close(tensor, wanted, rtol=self.tolerance, atol=atol)

    def attempt(self, backend: Backend) -> str:
        """'' if the backend supports the use, else the reason in one line.

        Raises:
            AssertionError: a number is wrong.
        """
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                self(backend)
        except AssertionError:
            raise
        except Exception as error:
            return textwrap.shorten(f"{type(error).__name__}: {error}", 100).replace("|", r"\|")
        return ""


USES: dict[str, Use] = {}


def use(
    name: str,
    *,
    required: bool = False,
    slow: bool = False,
    tolerance: float = 0,
    **options: Any,
) -> Callable[[Callable[[nn.Conv2d, Tensor], Any]], Use]:
    """Decorator: enters a function into USES."""

    def enter(function: Callable[[nn.Conv2d, Tensor], Any]) -> Use:
        USES[name] = Use(function, required, slow, tolerance, options)
        return USES[name]

    return enter


def layers_and_input(
    backend: Backend,
    dtype: torch.dtype = torch.float64,
    size: tuple[int, int] = (3, 7),
    **options: Any,
) -> tuple[nn.Conv2d, nn.Conv2d, Tensor]:
    """The backend's layer, an ``nn.Conv2d`` with equal weights, and an input (3, C, *size)."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return (torch.complex(values, values.flip(0)) if dtype.is_complex else values).to(dtype)

    layer, reference = (conv(**(OPTIONS | options)).to(dtype) for conv in (backend, Reference))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(randn(*parameter.shape))
    layer.load_state_dict(reference.state_dict())
    return layer, reference, randn(3, reference.in_channels, *size)


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor) -> list[Tensor]:
    """The output y, and the gradients of sum |y|^2 with respect to x and `others`."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return [y, *torch.autograd.grad(y.abs().square().sum(), (x, *others))]


def functional(conv: nn.Conv2d) -> Callable[[Parameters, Tensor], Tensor]:
    """The layer as a function of its parameters and its input."""
    return lambda parameters, x: functional_call(conv, parameters, (x,))


def parameters_of(conv: nn.Conv2d) -> Parameters:
    return {name: value.detach() for name, value in conv.named_parameters()}


def compiled(function: Callable, conv: nn.Conv2d) -> Callable:
    """In one graph; by a backend that needs no C++ compiler."""
    if isinstance(conv, Reference):
        return function
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def exported(conv: nn.Conv2d, x: Tensor, dynamic: dict[int, Any] | None = None) -> Callable:
    """A saved and loaded program, whose dimensions `dynamic` may change."""
    if isinstance(conv, Reference):
        return conv
    shapes = None if dynamic is None else (dynamic,)
    file = io.BytesIO()
    torch.export.save(torch.export.export(conv, (x,), dynamic_shapes=shapes), file)
    file.seek(0)
    return torch.export.load(file).module()
