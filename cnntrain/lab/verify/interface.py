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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from cnntrain.lab.verify.cases import OUTPUT, Case, Problem
from cnntrain.lab.verify.check import Candidate, CaseError, Check, Errors, compare, results
from cnntrain.lab.verify.layers import SMALL_LAYERS
from cnntrain.lab.verify.numerics import FLOAT64, expected

STYLES = ["by position", "by keyword", "in float64"]


@Check("constructor and initial weights", cases=lambda _: itertools.product(SMALL_LAYERS, STYLES))
def constructor(candidate: Candidate, case: Case, style: str) -> Errors:
    """Attributes, initial weights, and the number of random numbers drawn: with the same seed, the
    layers made afterwards are the same too."""
    every = dict(vars(case))
    del every["size"]
    positions = (*every.values(),)
    arguments, options = {
        "by position": (positions, {}),
        "by keyword": ((), every),
        "in float64": (positions[:3], {**case.options(), "dtype": torch.float64}),
    }[style]

    def made(kind: Callable[..., nn.Conv2d]) -> tuple[nn.Conv2d, Tensor]:
        torch.manual_seed(candidate.seed)
        return kind(*arguments, **options, device=candidate.device), torch.rand(3)

    (right, then), (found, found_then) = made(nn.Conv2d), made(candidate.backend)
    if not isinstance(found, nn.Conv2d):
        raise TypeError(f"{type(found).__name__} is not derived from nn.Conv2d")
    for name in [*nn.Conv2d.__constants__, "training"]:
        wanted, value = getattr(right, name), getattr(found, name, None)
        yield CaseError(value != wanted, f"{name} is {value}, not {wanted}")
    other = "initial weights other than nn.Conv2d's for the same seed"
    assert_close(found.state_dict(), right.state_dict(), rtol=0, atol=0,
                 msg=lambda text: f"{other}: {' '.join(text.split())}")  # fmt: skip
    for name, values in found.named_parameters():
        yield CaseError(not values.requires_grad, f"{name} is not trained")
    found.load_state_dict(right.state_dict())
    right.load_state_dict(found.state_dict())
    text = "the random numbers after it are others than after nn.Conv2d"
    yield CaseError(not torch.equal(then, found_then), text)


def importable(candidate: Candidate) -> bool:
    """Whether pickle finds the class by its name."""
    kind = candidate.kind
    module = sys.modules.get(kind.__module__)
    return getattr(module, getattr(kind, "__qualname__", ""), None) is kind


@Check(
    "copies and pickles",
    cases=lambda c: itertools.product(SMALL_LAYERS, ["deepcopy", "pickle"][: 1 + importable(c)]),
    limit=FLOAT64,
    unit="relative",
)
def copies(candidate: Candidate, case: Case, word: str) -> Errors:
    p, q = (Problem.normal(case, candidate.seed + i) for i in range(2))
    layer, (x, g) = candidate.layer(p), candidate.inputs(p)
    results(layer, x, g)  # layers are usually copied after their first call
    again = copy.deepcopy(layer) if word == "deepcopy" else pickle.loads(pickle.dumps(layer))
    yield CaseError(type(again) is not type(layer), f"is a {type(again).__name__}")
    yield from compare(results(again, x, g), expected(p))
    candidate.load(again, q)
    yield from compare(results(layer, x, g), expected(p))
    yield from compare(results(again, x, g), expected(replace(p, w=q.w, b=q.b)))


EMPTY_BATCHES = [
    *(replace(c, size=(0, *c.size[-2:])) for c in SMALL_LAYERS if c.padding_mode == "zeros"),
    *(Case(3, 2, 3, (0, 5, 6), padding=1, padding_mode=m) for m in ("replicate", "circular")),
]


@Check("empty batch", cases=lambda _: EMPTY_BATCHES, unit="relative")
def empty_batch(candidate: Candidate, case: Case) -> Errors:
    """An empty output, and zero gradients of weight and bias."""
    p = Problem.normal(case, candidate.seed)
    yield from compare(candidate.results(p), expected(p))
    with torch.no_grad():
        y = candidate.layer(p)(candidate.tensor(p.x))
    yield from compare({OUTPUT: y}, {OUTPUT: p.g})


INVALID_CALLS = Path(__file__).with_name("invalid_calls.txt").read_text().splitlines()


@Check("errors that nn.Conv2d raises", cases=lambda _: INVALID_CALLS)
def errors(candidate: Candidate, call: str) -> Errors:
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
    yield CaseError(not same, "raises {}, not {}".format(*names))


Backend = Callable[..., nn.Conv2d]
# Height and width, groups and dilation all differ. The output is 2 x 2, because compilers unroll a
# loop over its positions.
OPTIONS: dict[str, Any] = {"in_channels": 4, "out_channels": 6, "kernel_size": (2, 3)}
OPTIONS |= {"stride": (1, 2), "dilation": (1, 2), "groups": 2}
OPTIONS |= {"dtype": torch.float64, "size": (3, 7)}  # of the input


class Reference(nn.Conv2d):
    """``nn.Conv2d``, which no use compiles or exports."""


@dataclass(frozen=True, eq=False)
class Use:
    """A use of a layer: a function of the layer and its input, whose results are compared."""

    function: Callable[[nn.Conv2d, Tensor], Any]
    required: bool = False  # by any training program: unsupported counts as a failure
    slow: bool = False  # not in the short form; most import PyTorch's compiler
    tolerance: float = 0  # in units of a tensor's largest number; 0: that of assert_close
    options: dict[str, Any] = field(default_factory=dict)  # other than OPTIONS

    def attempt(self, backend: Backend) -> str:
        """'' if the backend supports the use, else the reason in one line.

        Raises:
            AssertionError: a number is wrong.
        """
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                layer, reference, x = layers_and_input(backend, self.options)
                found, right = (self.function(conv, x.clone()) for conv in (layer, reference))
                if not self.tolerance:
                    assert_close(found, right)
                    return ""
                for tensor, wanted in zip(found, right, strict=True):
                    atol = self.tolerance * wanted.abs().max().item()
                    assert_close(tensor, wanted, rtol=self.tolerance, atol=atol)
        except AssertionError:
            raise
        except Exception as error:
            return textwrap.shorten(f"{type(error).__name__}: {error}", 100).replace("|", r"\|")
        return ""


USES: dict[str, Use] = {}


def use(name: str, **options: Any) -> Callable[[Callable[[nn.Conv2d, Tensor], Any]], Use]:
    """Decorator: enters a function into USES."""

    def enter(function: Callable[[nn.Conv2d, Tensor], Any]) -> Use:
        return USES.setdefault(name, Use(function, **options))

    return enter


def layers_and_input(backend: Backend, options: dict) -> tuple[nn.Conv2d, nn.Conv2d, Tensor]:
    """The backend's layer, an ``nn.Conv2d`` with equal weights, and an input (3, C, *size)."""
    options = OPTIONS | options
    dtype, image = options.pop("dtype"), options.pop("size")
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return (torch.complex(values, values.flip(0)) if dtype.is_complex else values).to(dtype)

    layer, reference = (conv(**options).to(dtype) for conv in (backend, Reference))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(randn(*parameter.shape))
    layer.load_state_dict(reference.state_dict())
    return layer, reference, randn(3, reference.in_channels, *image)


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor) -> list[Tensor]:
    """The output y, and the gradients of sum |y|^2 with respect to x and `others`."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return [y, *torch.autograd.grad(y.abs().square().sum(), (x, *others))]


def parameters_of(conv: nn.Conv2d) -> dict[str, Tensor]:
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
    file = io.BytesIO()
    torch.export.save(torch.export.export(conv, (x,), dynamic_shapes=dynamic and (dynamic,)), file)
    file.seek(0)
    return torch.export.load(file).module()
