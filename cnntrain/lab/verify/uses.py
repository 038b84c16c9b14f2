"""Uses of a layer beside forward and backward: transforms, compilation, export, other dtypes.

A wrong number is a failure; an unsupported use is one if any training program may need it, and else
a note of the report.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from cnntrain.lab.verify.check import Candidate, CaseError, Check, Errors
from cnntrain.lab.verify.interface import USES, compiled, exported, gradients, parameters_of, use

# im2col computes a batch of 64 of this layer in parts.
LARGE = {"in_channels": 576, "kernel_size": 4, "stride": 4, "dilation": 1, "size": (8, 9)}
FLOAT32 = {"dtype": torch.float32}


class Unsupported(Exception):
    """A result is right, and not of the kind that was asked for."""


def cubic_loss(conv: nn.Conv2d) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """sum y^3 as a function of parameters and input: its second derivatives are not constant."""
    return lambda parameters, x: functional_call(conv, parameters, x).pow(3).sum()


def ensemble(conv: nn.Conv2d) -> dict[str, Tensor]:
    """Parameters of three models, stacked."""
    factors = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    stacked = parameters_of(conv).items()
    return {name: torch.stack([factor * value for factor in factors]) for name, value in stacked}


@use("`jvp`, `jacfwd`", slow=True)
def forward_mode(conv: nn.Conv2d, x: Tensor) -> Any:
    tangents = {name: 2 * value.cos() for name, value in parameters_of(conv).items()}
    return jacfwd(conv)(x), jvp(cubic_loss(conv), (parameters_of(conv), x), (tangents, 2 * x))


@use("`jacrev`, `hessian`", slow=True)
def reverse_mode(conv: nn.Conv2d, x: Tensor) -> Any:
    return jacrev(conv)(x), hessian(cubic_loss(conv))(parameters_of(conv), x[:1])


@use("`autograd.grad(is_grads_batched=True)`")
def batched_gradients(conv: nn.Conv2d, x: Tensor) -> Any:
    y = conv(x.requires_grad_())
    many = torch.stack([y.detach(), y.detach().cos()])
    return torch.autograd.grad(y, x, many, is_grads_batched=True)


@use("`vmap` over inputs: any dimension, in chunks, nested")
def vmap_inputs(conv: nn.Conv2d, x: Tensor) -> Any:
    many = torch.stack([x, -x, x + 1], dim=2)  # (3, 4, 3 inputs, 3, 7)
    chunks = vmap(conv, in_dims=2, out_dims=1, chunk_size=2)(many)
    return vmap(conv, in_dims=2, out_dims=1)(many), chunks, vmap(vmap(conv, in_dims=1))(many)


@use("`vmap` over weights, biases, both, with inputs, nested")
def vmap_weights(conv: nn.Conv2d, x: Tensor) -> Any:
    call = partial(functional_call, conv)
    models, inputs = ensemble(conv), torch.stack([x, -x, x + 1], dim=1)
    one = parameters_of(conv)
    alone = [vmap(lambda v, n=name: call(one | {n: v}, x))(models[name]) for name in models]
    pairs = vmap(call, (0, 1))(models, inputs)
    every = vmap(vmap(call, (None, 1)), (0, None))(models, inputs)
    return vmap(call, (0, None))(models, x), pairs, every, alone


@use("`vmap` of `grad`: each sample's, each model's", slow=True)
def vmap_of_grad(conv: nn.Conv2d, x: Tensor) -> Any:
    call = grad(cubic_loss(conv), argnums=(0, 1))
    return vmap(call, (None, 0))(parameters_of(conv), x), vmap(call, (0, None))(ensemble(conv), x)


@use("`torch.compile(fullgraph=True)`, forward and backward", slow=True, options=LARGE)
def compile_layer(conv: nn.Conv2d, x: Tensor) -> Any:
    function, results = compiled(conv, conv), []
    for n in (3, 2, 64, 5):  # the second size is compiled for any size
        x = x[torch.arange(n) % len(x)]
        with torch.compiler.set_stance("default" if n < 4 else "fail_on_recompile"):
            results.append(gradients(function, x, *conv.parameters()))
    return results


@use("`torch.compile` of `vmap`, of `jvp`", slow=True)
def compile_transforms(conv: nn.Conv2d, x: Tensor) -> Any:
    tangent = compiled(lambda x: jvp(conv, (x,), (2 * x,)), conv)(x)
    each = vmap(grad(cubic_loss(conv)), (None, 0))
    return tangent, compiled(each, conv)(parameters_of(conv), x)


@use("`torch.export`", slow=True)
def export(conv: nn.Conv2d, x: Tensor) -> Any:
    return exported(conv, x)(x)


@use("`torch.export` for batches of 1 to 64", slow=True, options=LARGE)
def export_any_batch(conv: nn.Conv2d, x: Tensor) -> Any:
    program = exported(conv, x, {0: torch.export.Dim("batch", min=1, max=64)})
    x = x.repeat(22, 1, 1, 1)
    return [program(x[:n]) for n in (3, 1, 64)]


@use(
    "`torch.export` for any batch, height and width",
    slow=True,
    options={"stride": 2, "size": (9, 21)},
)
def export_any_size(conv: nn.Conv2d, x: Tensor) -> Any:
    names = {0: "batch", 2: "height", 3: "width"}
    sizes = {i: torch.export.Dim(name, min=1 + 6 * (i > 0), max=64) for i, name in names.items()}
    program = exported(conv, x, sizes)
    return [program(x[:n, :, :h, :w]) for n, h, w in [(3, 9, 21), (1, 8, 7), (2, 7, 20)]]


@use("complex numbers", slow=True, options={"dtype": torch.complex128})
def complex_numbers(conv: nn.Conv2d, x: Tensor) -> Any:
    return gradients(conv, x, *conv.parameters())


@use("integers")
def integers(conv: nn.Conv2d, x: Tensor) -> Any:
    whole = {name: (9 * value).long() for name, value in parameters_of(conv).items()}
    return functional_call(conv, whole, (9 * x).long())


@use("`channels_last` outputs for such inputs")
def channels_last_output(conv: nn.Conv2d, x: Tensor) -> Any:
    y = conv(x.contiguous(memory_format=torch.channels_last))
    if not y.is_contiguous(memory_format=torch.channels_last):
        raise Unsupported(f"strides {y.stride()} for size {list(y.shape)}")
    return y


@use("the meta device")
def meta(conv: nn.Conv2d, x: Tensor) -> Any:
    return list(conv.to("meta")(x.to("meta")).shape)


@use("saves input and weight for the backward, no more", options={"padding": 1})
def saved_for_backward(conv: nn.Conv2d, x: Tensor) -> Any:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = conv(x.requires_grad_())
    known = [t.untyped_storage().data_ptr() for t in (x, *conv.parameters())]
    more = [list(t.shape) for t in saved if t.untyped_storage().data_ptr() not in known]
    if more:
        raise Unsupported(f"tensors of these sizes are saved as well: {more}")
    return y


@use("`layer(input=x)`", required=True)
def by_keyword(conv: nn.Conv2d, x: Tensor) -> Any:
    return conv(input=x)


@use("autocast to bfloat16 and float16", required=True, tolerance=2**-6, options=FLOAT32)
def autocast(conv: nn.Conv2d, x: Tensor) -> Any:
    results: list[Tensor] = []
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):  # the backward too: it would cast a product in float32
            results += gradients(conv, x, *conv.parameters())
    return results


@use("a part without autocast", required=True, tolerance=2**-16, options=FLOAT32)
def without_autocast(conv: nn.Conv2d, x: Tensor) -> Any:
    with torch.autocast("cpu"), torch.autocast("cpu", enabled=False):
        return gradients(conv, x, *conv.parameters())


@use("`checkpoint`, saved-tensor hooks", required=True, slow=True)
def checkpointing(conv: nn.Conv2d, x: Tensor) -> Any:
    results: list[Any] = []
    for reentrant in (True, False):
        y = checkpoint(conv, x.requires_grad_(), use_reentrant=reentrant)
        y.square().sum().backward()
        results += [y, *(t.grad.clone() for t in (x, *conv.parameters()) if t.grad is not None)]
    with torch.autograd.graph.save_on_cpu():
        return results + gradients(conv, x, *conv.parameters())


@use("hooks of modules and tensors", required=True)
def hooks(conv: nn.Conv2d, x: Tensor) -> Any:
    seen: list[Tensor | None] = []
    conv.register_forward_hook(lambda _module, _inputs, y: seen.append(y))
    conv.register_full_backward_hook(lambda _module, dx, dy: seen.extend((*dx, *dy)))
    conv.weight.register_hook(lambda g: 2 * g)
    conv(x.requires_grad_()).square().sum().backward()
    return [*seen, conv.weight.grad]


@use("`weight_norm`", required=True)
def weight_norm(conv: nn.Conv2d, x: Tensor) -> Any:
    return gradients(parametrizations.weight_norm(conv), x, *conv.parameters())


@use("`spectral_norm`", required=True)
def spectral_norm(conv: nn.Conv2d, x: Tensor) -> Any:
    torch.manual_seed(0)  # it starts from a random vector
    return gradients(parametrizations.spectral_norm(conv), x, *conv.parameters())


@Check(
    "uses of nn.Conv2d",
    cases=lambda c: [f"Conv2d, {name}" for name, u in USES.items() if not (c.short and u.slow)],
)
def uses(candidate: Candidate, name: str) -> Errors:
    tried = USES[name := name.removeprefix("Conv2d, ")]
    try:
        reason, counts = tried.attempt(candidate.backend), tried.required
    except AssertionError as error:
        reason, counts = str(error).strip().split("\n")[0], True
    # Rounded results are converted to integers as they are.
    counts &= candidate.declared("exact_on_integers") or tried is not integers
    yield CaseError(bool(reason) and counts, reason, note=reason and f"{name}: {reason}")
