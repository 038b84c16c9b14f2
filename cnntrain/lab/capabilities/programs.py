"""A convolution in a larger program: compilers, copies, checkpoints, hooks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from cnntrain.lab.capabilities.twins import Backend, Cannot, gradients, loss, parameters_of, twins

# A layer of which im2col computes a batch of 64 in parts; its output is small, because compilers
# unroll a loop over output positions.
LARGE: dict[str, Any] = {
    "in_channels": 32,
    "kernel_size": 12,
    "stride": 12,
    "dilation": 1,
    "size": (24, 25),
}


def compiled(function: Callable) -> Callable:
    """In one graph; without the C++ compiler, that not every machine has."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def compile_whole(backend: Backend) -> None:
    ours, reference, x = twins(backend, **LARGE)
    function = compiled(ours)
    for n in (3, 2, 64, 5):  # the second size is compiled for any size
        x = x[torch.arange(n) % len(x)]
        with torch.compiler.set_stance("default" if n < 4 else "fail_on_recompile"):
            mine = gradients(function, x, *ours.parameters())
        assert_close(mine, gradients(reference, x, *reference.parameters()))


def compile_transforms(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    tangent = compiled(lambda x: jvp(ours, (x,), (2 * x,)))(x)
    assert_close(tangent, jvp(reference, (x,), (2 * x,)))
    mine, theirs = (vmap(grad(loss(conv)), (None, 0)) for conv in (ours, reference))
    parameters = parameters_of(reference)
    assert_close(compiled(mine)(parameters, x), theirs(parameters, x))


def export(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    file = io.BytesIO()
    torch.export.save(torch.export.export(ours, (x,)), file)
    file.seek(0)
    assert_close(torch.export.load(file).module()(x), reference(x))


def export_any_batch(backend: Backend) -> None:
    ours, reference, x = twins(backend, **LARGE)
    any_batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(ours, (x,), dynamic_shapes=any_batch).module()
    x = x.repeat(22, 1, 1, 1)
    for n in (3, 1, 64):
        assert_close(program(x[:n]), reference(x[:n]))


def export_any_size(backend: Backend) -> None:
    ours, reference, x = twins(backend, stride=2)
    names = {0: "batch", 2: "height", 3: "width"}
    any_size = {i: torch.export.Dim(name, min=1 + 6 * (i > 0), max=64) for i, name in names.items()}
    x = x.repeat(1, 1, 3, 3)
    program = torch.export.export(ours, (x,), dynamic_shapes=(any_size,)).module()
    for n, height, width in [(3, 9, 21), (1, 8, 7), (2, 7, 20)]:
        part = x[:n, :, :height, :width]
        assert_close(program(part), reference(part))


def trace(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    traced = torch.jit.trace(ours, x)
    assert_close(traced(x[:2]), reference(x[:2]))
    torch.jit.save(traced, io.BytesIO())


def symbolic_trace(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    assert_close(torch.fx.symbolic_trace(nn.Sequential(ours))(x), reference(x))


def repeatable(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        once, *again = (gradients(ours, x, *ours.parameters()) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(before)
    assert_close(once, gradients(reference, x, *reference.parameters()))
    for other in again:
        assert_close(other, once, rtol=0, atol=0)


def copies(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (loaded, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours), f"{type(other).__name__} out of {type(ours).__name__}"
        assert_close(other(x), reference(x))


def kept_for_backward(backend: Backend) -> None:
    ours, reference, x = twins(backend, padding=1)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = ours(x.requires_grad_())
    assert_close(y, reference(x))
    known = [t.untyped_storage().data_ptr() for t in (x, *ours.parameters())]
    more = [list(t.shape) for t in kept if t.untyped_storage().data_ptr() not in known]
    if more:
        raise Cannot(f"tensors of these sizes are kept as well: {more}")


def checkpointing(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    theirs = gradients(reference, x, *reference.parameters())
    for reentrant in (True, False):
        y = checkpoint(ours, x.requires_grad_(), use_reentrant=reentrant)
        y.square().sum().backward()
        leaves = [x, *ours.parameters()]
        assert_close([y, *(leaf.grad for leaf in leaves)], theirs)
        for leaf in leaves:
            leaf.grad = None
    with torch.autograd.graph.save_on_cpu():
        assert_close(gradients(ours, x, *ours.parameters()), theirs)


def without_gradients(backend: Backend) -> None:
    ours, reference, x = twins(backend)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y = ours(x)
            assert not y.requires_grad, "an output that requires grad"
            assert_close(y, reference(x))


def hooks(backend: Backend) -> None:
    ours, reference, x = twins(backend)

    def run(conv: nn.Conv2d) -> list[Tensor | None]:
        seen: list[Tensor | None] = []
        conv.register_forward_hook(lambda _module, _inputs, y: seen.append(y))
        conv.register_full_backward_hook(lambda _module, dx, dy: seen.extend((*dx, *dy)))
        conv.weight.register_hook(lambda g: 2 * g)
        conv(x.clone().requires_grad_()).square().sum().backward()
        return [*seen, conv.weight.grad]

    assert_close(run(ours), run(reference))


def reparametrised(backend: Backend) -> None:
    for normalise in (parametrizations.weight_norm, parametrizations.spectral_norm):
        ours, reference, x = twins(backend)

        def run(conv: nn.Conv2d, x: Tensor = x, normalise: Any = normalise) -> list[Tensor]:
            torch.manual_seed(0)  # spectral_norm starts from a random vector
            normalise(conv)
            return gradients(conv, x, *conv.parameters())

        assert_close(run(ours), run(reference))
