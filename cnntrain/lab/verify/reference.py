"""Comparison of a use of a layer with ``nn.Conv2d``, and helpers for such uses."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

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

    name: str
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
        for tensor, expected in zip(found, right, strict=True):
            largest = expected.abs().max().item()
            assert_close(tensor, expected, rtol=self.tolerance, atol=self.tolerance * largest)

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
        USES[name] = Use(name, function, required, slow, tolerance, options)
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
