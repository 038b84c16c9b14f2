"""Uses of a layer that a backend need not support: transforms, compilation, export, other dtypes.

`cnntrain verify` tries these and the required ones. An unsupported use is a note of the report, a
wrong number a failure.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

from cnntrain.lab.verify.check import Candidate, CaseError, CaseErrors, check
from cnntrain.lab.verify.compilers import (
    compile_layer,
    compile_transforms,
    cubic_loss,
    export,
    export_any_batch,
    export_any_size,
    symbolic_trace,
    trace,
)
from cnntrain.lab.verify.interface import importable
from cnntrain.lab.verify.probes import (
    GRADCHECK_FAILED,
    REQUIRED,
    Backend,
    Parameters,
    Probe,
    attempt,
    checkpointing,
    copies,
    for_gradcheck,
    functional,
    gradients,
    layers_and_input,
    parameters_of,
)


class Unsupported(Exception):
    """A result is right, and not of the kind that was asked for."""


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


def vmap_inputs(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    many = torch.stack([x, -x, x + 1], dim=2)  # (3, 4, 3 inputs, 3, 7)
    each = torch.stack([reference(many[:, :, i]) for i in range(3)], dim=1)
    assert_close(vmap(layer, in_dims=2, out_dims=1)(many), each)
    assert_close(vmap(layer, in_dims=2, out_dims=1, chunk_size=2)(many), each)
    assert_close(vmap(vmap(layer, in_dims=1))(many), each)


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


def meta(backend: Backend) -> None:
    layer, reference, x = layers_and_input(backend)
    assert layer.to("meta")(x.to("meta")).shape == reference(x).shape


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


OPTIONAL: dict[str, Probe] = {
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
    "the meta device": meta,
    "`use_deterministic_algorithms`, bitwise the same each time": repeatable,
    "saves input and weight for the backward, no more": saved_for_backward,
}
PROBES = OPTIONAL | REQUIRED
SLOW = [  # not in the short form; most import PyTorch's compiler
    *(second_derivatives, forward_mode, reverse_mode, vmap_of_grad, complex_numbers),
    *(compile_layer, compile_transforms, export, export_any_batch, export_any_size, trace),
    *(symbolic_trace, distributed_tensors, checkpointing, repeatable),
]


@check(
    "uses of nn.Conv2d",
    cases=lambda c: [f"Conv2d, {u}" for u, p in PROBES.items() if not (c.short and p in SLOW)],
)
def uses(candidate: Candidate, use: str) -> CaseErrors:
    probe = PROBES[use := use.removeprefix("Conv2d, ")]
    try:
        reason, counts = attempt(probe, candidate.backend), use in REQUIRED
    except AssertionError as error:
        reason, counts = str(error).strip().split("\n")[0], True
    # Rounded results are converted to integers as they are; pickle needs an importable class.
    counts &= candidate.declared("exact_on_integers") or probe is not integers
    counts &= importable(candidate) or probe is not copies
    yield CaseError(float(bool(reason) and counts), reason, note=reason and f"{use}: {reason}")
