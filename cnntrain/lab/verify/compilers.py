"""Uses of a layer with torch.compile, torch.export, torch.jit and torch.fx."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

from cnntrain.lab.verify.probes import (
    Backend,
    Parameters,
    functional,
    gradients,
    layers_and_input,
    parameters_of,
)

# im2col computes a batch of 64 of this layer in parts. The output is small, because compilers
# unroll a loop over its positions.
LARGE: dict[str, Any] = {"in_channels": 576, "kernel_size": 4, "stride": 4, "dilation": 1}
LARGE["size"] = (8, 9)


def cubic_loss(conv: nn.Conv2d) -> Callable[[Parameters, Tensor], Tensor]:
    """sum y^3 as a function of parameters and input: its second derivatives are not constant."""
    return lambda parameters, x: functional(conv)(parameters, x).pow(3).sum()


def compiled(function: Callable) -> Callable:
    """In one graph; by a backend that needs no C++ compiler."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def compile_layer(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend, **LARGE)
    function = compiled(layer)
    for n in (3, 2, 64, 5):  # the second size is compiled for any size
        x = x[torch.arange(n) % len(x)]
        with torch.compiler.set_stance("default" if n < 4 else "fail_on_recompile"):
            values = gradients(function, x, *layer.parameters())
        assert_close(values, gradients(reference, x, *reference.parameters()))


def compile_transforms(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    tangent = compiled(lambda x: jvp(layer, (x,), (2 * x,)))(x)
    assert_close(tangent, jvp(reference, (x,), (2 * x,)))
    each, expected = (vmap(grad(cubic_loss(conv)), (None, 0)) for conv in (layer, reference))
    parameters = parameters_of(reference)
    assert_close(compiled(each)(parameters, x), expected(parameters, x))


def export(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), file)
    file.seek(0)
    assert_close(torch.export.load(file).module()(x), reference(x))


def export_any_batch(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend, **LARGE)
    any_batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(layer, (x,), dynamic_shapes=any_batch).module()
    x = x.repeat(22, 1, 1, 1)
    for n in (3, 1, 64):
        assert_close(program(x[:n]), reference(x[:n]))


def export_any_size(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend, stride=2)
    names = {0: "batch", 2: "height", 3: "width"}
    any_size = {i: torch.export.Dim(name, min=1 + 6 * (i > 0), max=64) for i, name in names.items()}
    x = x.repeat(1, 1, 3, 3)
    program = torch.export.export(layer, (x,), dynamic_shapes=(any_size,)).module()
    for n, height, width in [(3, 9, 21), (1, 8, 7), (2, 7, 20)]:
        part = x[:n, :, :height, :width]
        assert_close(program(part), reference(part))


def trace(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    traced = torch.jit.trace(layer, x)
    assert_close(traced(x[:2]), reference(x[:2]))
    torch.jit.save(traced, io.BytesIO())


def symbolic_trace(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    assert_close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), reference(x))
