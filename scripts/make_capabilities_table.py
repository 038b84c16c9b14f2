"""Capability table of the convolution backends in docs/convolutions.md.

    python scripts/make_capabilities_table.py                         # rewrites the table
    python scripts/make_capabilities_table.py --print mypkg.MyConv2d  # prints it, with this class

Each row is a probe: one use of a backend, whose numbers are compared with those of ``nn.Conv2d``. A
wrong number ends the script with an AssertionError. Probes that `cnntrain verify` runs too are in
`cnntrain.lab.verify.probes`.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from torch import Tensor, distributed, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

from cnntrain.conv import BACKENDS
from cnntrain.lab.verify.probes import (
    GRADCHECK_FAILED,
    REQUIRED,
    Backend,
    Parameters,
    Probe,
    attempt,
    for_gradcheck,
    functional,
    gradients,
    layers_and_input,
    meta,
    parameters_of,
    vmap_inputs,
)

PAGE = Path(__file__).parents[1] / "docs/convolutions.md"
BEGIN, END = "<!-- capabilities -->\n", "<!-- /capabilities -->"
# im2col computes a batch of 64 of this layer in parts. The output is small, because compilers
# unroll a loop over its positions.
LARGE: dict[str, Any] = {"in_channels": 576, "kernel_size": 4, "stride": 4, "dilation": 1}
LARGE["size"] = (8, 9)


class Unsupported(Exception):
    """A result is right, and not of the kind that was asked for."""


def cubic_loss(conv: nn.Conv2d) -> Callable[[Parameters, Tensor], Tensor]:
    """sum y^3 as a function of parameters and input: its second derivatives are not constant."""
    return lambda parameters, x: functional(conv)(parameters, x).pow(3).sum()


def ensemble(conv: nn.Conv2d) -> list[Parameters]:
    return [{k: factor * v for k, v in parameters_of(conv).items()} for factor in (1.0, -0.5, 2.0)]


def stacked(models: list[Parameters]) -> Parameters:
    return {name: torch.stack([model[name] for model in models]) for name in models[0]}


def second_derivatives(backend: Backend) -> None:
    layer, _, x = layers_and_input(backend)
    function, inputs = for_gradcheck(layer, x[:1])
    assert gradgradcheck(function, inputs, raise_exception=False), GRADCHECK_FAILED


def forward_mode(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    assert_close(jacfwd(layer)(x), jacobian(reference, x))
    point = parameters_of(reference), x
    for model in ensemble(reference):
        tangent = jvp(cubic_loss(layer), point, (model, 2 * x))[1]
        dparameters, dx = grad(cubic_loss(reference), (0, 1))(*point)
        slope = sum((dparameters[name] * model[name]).sum() for name in model)
        assert_close(tangent, slope + (dx * 2 * x).sum())


def reverse_mode(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    assert_close(jacrev(layer)(x), jacobian(reference, x))
    expected = jacrev(jacrev(cubic_loss(reference)))(parameters_of(reference), x[:1])
    assert_close(hessian(cubic_loss(layer))(parameters_of(layer), x[:1]), expected)


def batched_gradients(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    x.requires_grad_()
    y, expected = layer(x), reference(x)
    many = torch.stack([expected.detach(), expected.detach().cos()])
    each = [torch.autograd.grad(expected, x, g, retain_graph=True)[0] for g in many]
    (batched,) = torch.autograd.grad(y, x, many, is_grads_batched=True)
    assert_close(batched, torch.stack(each))


def vmap_weights(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    call, expected = functional(layer), functional(reference)
    models, inputs = ensemble(reference), torch.stack([x, -x, x + 1], dim=1)
    all_pairs = torch.stack(
        [torch.stack([expected(model, inputs[:, i]) for i in range(3)]) for model in models]
    )
    stack = stacked(models)
    assert_close(vmap(call, (0, None))(stack, x), all_pairs[:, 0])
    pairs = vmap(call, (0, 1))(stack, inputs)
    assert_close(pairs, torch.stack([all_pairs[i, i] for i in range(3)]))
    assert_close(vmap(vmap(call, (None, 1)), (0, None))(stack, inputs), all_pairs)
    for name, values in stack.items():  # the weight alone, the bias alone
        one = parameters_of(reference)
        each = torch.stack([expected(one | {name: value}, x) for value in values])
        assert_close(vmap(lambda v, n=name, p=one: call(p | {n: v}, x))(values), each)


def vmap_of_grad(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    models = ensemble(reference)
    call, expected = (grad(cubic_loss(conv), argnums=(0, 1)) for conv in (layer, reference))
    each_sample, dx = vmap(call, (None, 0))(models[0], x)
    for n in range(3):
        values = {name: g[n] for name, g in each_sample.items()}, dx[n]
        assert_close(values, expected(models[0], x[n]))
    each_model, dx = vmap(call, (0, None))(stacked(models), x)
    for i, model in enumerate(models):
        assert_close(({name: g[i] for name, g in each_model.items()}, dx[i]), expected(model, x))


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


def complex_numbers(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend, torch.complex128)
    expected = gradients(reference, x, *reference.parameters())
    assert_close(gradients(layer, x, *layer.parameters()), expected)
    function, inputs = for_gradcheck(layer, x[:1])
    assert gradcheck(function, inputs, raise_exception=False), GRADCHECK_FAILED


def integers(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    whole = {name: (9 * value).long() for name, value in parameters_of(reference).items()}
    y, expected = (functional(conv)(whole, (9 * x).long()) for conv in (layer, reference))
    assert_close(y, expected, rtol=0, atol=0)


def channels_last_output(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert_close(y, reference(x))
    if not y.is_contiguous(memory_format=torch.channels_last):
        raise Unsupported(f"strides {y.stride()} for size {list(y.shape)}")


def subclasses(backend: Backend) -> None:
    class Image(Tensor):
        pass

    layer, reference, x = layers_and_input(backend)
    y = layer(x.as_subclass(Image))
    assert_close(y.as_subclass(Tensor), reference(x))
    if type(y) is not Image:
        raise Unsupported(f"a {type(y).__name__} from an Image")


def distributed_tensors(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    expected = reference(x)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name, value in list(layer.named_parameters()):
            replicated = distribute_tensor(value.detach(), mesh, [Replicate()])
            layer.register_parameter(name, nn.Parameter(replicated))
        y = layer(distribute_tensor(x, mesh, [Shard(0)]))
        assert_close(y.full_tensor(), expected)
    finally:
        distributed.destroy_process_group()


def meta_and_fake(backend: Backend) -> None:
    meta(backend)
    layer, reference, x = layers_and_input(backend)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(x.shape, dtype=x.dtype)).shape == reference(x).shape


def repeatable(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        once, *again = (gradients(layer, x, *layer.parameters()) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(before)
    assert_close(once, gradients(reference, x, *reference.parameters()))
    for other in again:
        assert_close(other, once, rtol=0, atol=0)


def saved_for_backward(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend, padding=1)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x.requires_grad_())
    assert_close(y, reference(x))
    known = [t.untyped_storage().data_ptr() for t in (x, *layer.parameters())]
    more = [list(t.shape) for t in saved if t.untyped_storage().data_ptr() not in known]
    if more:
        raise Unsupported(f"tensors of these sizes are saved as well: {more}")


PROBES: dict[str, Probe] = {
    "second derivatives": second_derivatives,
    "`jvp`, `jacfwd`": forward_mode,
    "`jacrev`, `hessian`": reverse_mode,
    "`autograd.grad(is_grads_batched=True)`": batched_gradients,
    "`vmap` over inputs: any dimension, in chunks, nested": vmap_inputs,
    "`vmap` over weights, biases, both, with inputs, nested": vmap_weights,
    "`vmap` of `grad`: each sample's, each model's": vmap_of_grad,
    "`torch.compile(fullgraph=True)`, forward and backward": compile_layer,
    "`torch.compile` of `vmap`, of `jvp`": compile_transforms,
    "`torch.export`": export,
    "`torch.export` for batches of 1 to 64": export_any_batch,
    "`torch.export` for any batch, height and width": export_any_size,
    "`torch.jit.trace`, saved": trace,
    "`torch.fx.symbolic_trace`": symbolic_trace,
    "complex numbers": complex_numbers,
    "integers": integers,
    "`channels_last` outputs for such inputs": channels_last_output,
    "tensor subclasses": subclasses,
    "`DTensor`": distributed_tensors,
    "`meta` and fake tensors": meta_and_fake,
    "`use_deterministic_algorithms`, bitwise the same each time": repeatable,
    "saves input and weight for the backward, no more": saved_for_backward,
} | REQUIRED

# Why the backends of cnntrain do not support a use, and what to do instead.
LIMITS: dict[Probe, str] = {
    batched_gradients: "passes by custom functions; use `torch.func.vjp` and `vmap`",
    compile_transforms: "dynamo takes no custom function there; works uncompiled",
    export_any_size: "a loop over output positions is part of the graph",
    distributed_tensors: "PyTorch has no sharding rule for `unfold`; use `native`",
    trace: "TorchScript cannot save Python; use `torch.export`",
    symbolic_trace: "sizes are checked; make the class a leaf of the tracer",
    channels_last_output: "outputs are contiguous",
}


def table(backends: Mapping[str, Backend], probes: Mapping[str, Probe] = PROBES) -> str:
    """A Markdown table: a row for each probe, a column for each backend.

    Raises:
        AssertionError: a number is wrong.
    """
    rows = [["", *(f"`{name}`" for name in backends), "why not"], ["---"] * (len(backends) + 2)]
    for name, probe in probes.items():
        reasons = [attempt(probe, backend) for backend in backends.values()]
        why = LIMITS.get(probe, max(reasons)) if any(reasons) else ""
        rows.append([name, *("no" if reason else "yes" for reason in reasons), why])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(page: Path, content: str) -> None:
    """Replace what is between the markers of a Markdown file."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{page} has no lines {BEGIN.strip()} and {END.strip()}")
    page.write_text(before + begin + content + end + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--print", nargs="*", metavar="CLASS", help="with columns for these classes"
    )
    classes = parser.parse_args().print
    if classes is None:
        write(PAGE, table(BACKENDS))
    else:
        print(table(BACKENDS | {name.rpartition(".")[2]: get_class(name) for name in classes}))


if __name__ == "__main__":
    main()
