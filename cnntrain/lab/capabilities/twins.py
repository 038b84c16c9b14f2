"""What the probes work with: a backend's convolution and its twin, an ``nn.Conv2d``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Backend = Callable[..., nn.Conv2d]  # called like nn.Conv2d
Parameters = dict[str, Tensor]

# Nothing that is the same in height and width, groups, dilation; and an output of 2 x 2, because
# compilers unroll a loop over its positions.
OPTIONS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 6,
    "kernel_size": (2, 3),
    "stride": (1, 2),
    "dilation": (1, 2),
    "groups": 2,
}


class Cannot(Exception):
    """A backend gave no wrong number, and not what was asked for either."""


def twins(
    backend: Backend,
    dtype: torch.dtype = torch.float64,
    size: tuple[int, int] = (3, 7),
    **options: Any,
) -> tuple[nn.Conv2d, nn.Conv2d, Tensor]:
    """A backend's convolution, an ``nn.Conv2d`` with its weights, and an input (3, C, *size).

    All three are the same at every call.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return (torch.complex(values, values.flip(0)) if dtype.is_complex else values).to(dtype)

    ours, reference = (conv(**(OPTIONS | options)).to(dtype) for conv in (backend, nn.Conv2d))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(randn(*parameter.shape))
    ours.load_state_dict(reference.state_dict())
    return ours, reference, randn(3, reference.in_channels, *size)


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor) -> list[Tensor]:
    """The output y and the gradients of sum |y|^2 with respect to x and others."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return [y, *torch.autograd.grad(y.abs().square().sum(), (x, *others))]


def call(conv: nn.Conv2d) -> Callable[[Parameters, Tensor], Tensor]:
    """conv as a function of its parameters and its input."""
    return lambda parameters, x: functional_call(conv, parameters, (x,))


def loss(conv: nn.Conv2d) -> Callable[[Parameters, Tensor], Tensor]:
    """sum y^3 as a function of parameters and input: no second derivative of it is constant."""
    return lambda parameters, x: call(conv)(parameters, x).pow(3).sum()


def parameters_of(conv: nn.Conv2d) -> Parameters:
    return {name: value.detach() for name, value in conv.named_parameters()}


def function_and_inputs(conv: nn.Conv2d, x: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """conv as a function of tensors, and the tensors: what ``gradcheck`` takes."""
    parameters = parameters_of(conv)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return call(conv)(dict(zip(parameters, values, strict=True)), x)

    return function, [t.clone().requires_grad_() for t in (x, *parameters.values())]
