"""Autograd functions of a convolution: derivatives of every order from three functions.

A convolution is bilinear in input and weight. Three functions define it, each the derivative of the
other two:

    forward(x, w)       y  = x * w
    grad_input(g, w)    dx with  <g, x * w> = <dx, x>
    grad_weight(g, x)   dw with  <g, x * w> = <dw, w>

So an `Algorithm` that computes them has derivatives of every order, in reverse and in forward mode.
Only required gradients are computed; the backward keeps x and w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from cnntrain.conv.geometry import Pair
from cnntrain.conv.torch_compat import gradient_is_needed

# A constant, as torch.compile traces no call of is_autocast_available in torch 2.11.
AUTOCAST_DEVICES = [
    name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name)
]

# In this module `how` is a Geometry, an Algorithm, and the zeros at each side of the input. The
# Functions pad, so that the backward keeps the unpadded input.


def convolve(x: Tensor, w: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """y = x * w + bias (N, O, OH, OW), differentiable in x, w and bias."""
    return (_Forward if is_compiling() else Forward).apply(x, w, bias, *how)


if torch.__version__ < "2.15":
    # Traced by torch.compile of torch 2.11, these Functions have gradients of zero.
    convolve = torch.compiler.disable(convolve)


def grad_input(g: Tensor, w: Tensor, input_size: Pair, *how: Any) -> Tensor:
    """dx (N, C, H, W), differentiable in g and w."""
    return (_GradInput if is_compiling() else GradInput).apply(g, w, input_size, *how)


def grad_weight(g: Tensor, x: Tensor, kernel_size: Pair, *how: Any) -> Tensor:
    """dw (O, C/groups, kh, kw), differentiable in g and x."""
    return (_GradWeight if is_compiling() else GradWeight).apply(g, x, kernel_size, *how)


class _Product(Function):
    """Linear in its first two inputs, a and b; the third is the bias, or the size of the result."""

    # Where vmap puts groups: 0 in a weight, 1 in images. One of b and the result is a weight.
    channels_of_b = 0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        a, b, third = inputs[:3]
        ctx.how = inputs[3:]
        ctx.size = None if isinstance(third, Tensor) else third
        ctx.shape = output.shape
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)  # no products with undefined, that is zero, gradients

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Tensor:
        (a, b), (da, db, dbias, *_) = ctx.saved_tensors, tangents
        terms = [] if da is None else [cls.apply(da, b, ctx.size, *ctx.how)]
        terms += [] if db is None else [cls.apply(a, db, ctx.size, *ctx.how)]
        terms += [] if dbias is None else [dbias.view(-1, 1, 1)]
        return sum(terms[1:], terms[0]).expand(ctx.shape)

    @classmethod
    def vmap(cls, info: Any, dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        """B convolutions with B weights are one convolution with B times the groups, so that an
        algorithm receives no batched tensors and may write in place."""
        (a, b, third, geometry, *others), (a_dim, b_dim, third_dim, *_) = inputs, dims
        has_bias, result_dim = isinstance(third, Tensor), 1 - cls.channels_of_b
        if result_dim == 1 and b_dim is None and not (has_bias and third_dim is not None):
            result_dim = 0  # one weight: B times the images
            a = a.movedim(a_dim, 0).flatten(0, 1)
        else:
            a, b = _join(a, a_dim, 1, info), _join(b, b_dim, cls.channels_of_b, info)
            third = _join(third, third_dim, 0, info) if has_bias else third
            geometry = replace(geometry, groups=geometry.groups * info.batch_size)
        result = cls.apply(a, b, third, geometry, *others)
        return result.unflatten(result_dim, (info.batch_size, -1)), result_dim


class Forward(_Product):
    """y = x * w + bias"""

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, bias: Tensor | None, geometry: Any, algorithm: Any, zeros: Any
    ) -> Tensor:
        y = _run(algorithm.padded_forward, x, w, bias, geometry, zeros)
        return y.clone() if is_compiling() and bias is None else y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple:
        dx = dw = db = None
        if g is not None:
            x, w = ctx.saved_tensors
            if _required(ctx, 0):
                dx = grad_input(g, w.conj_physical(), x.shape[-2:], *ctx.how)
            if _required(ctx, 1):
                dw = grad_weight(g, x.conj_physical(), w.shape[-2:], *ctx.how)
            if _required(ctx, 2):
                db = g.sum((0, 2, 3))
        return dx, dw, db, None, None, None


class GradInput(_Product):
    """dx, the input gradient: linear in g and in w."""

    @staticmethod
    def forward(
        g: Tensor, w: Tensor, input_size: Pair, geometry: Any, algorithm: Any, zeros: Any
    ) -> Tensor:
        return _run(algorithm.padded_grad_input, g, w, input_size, geometry, zeros)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple:
        dg = dw = None
        if h is not None:
            g, w = ctx.saved_tensors
            if _required(ctx, 0):
                dg = convolve(h, w.conj_physical(), None, *ctx.how)
            if _required(ctx, 1):
                dw = grad_weight(g.conj_physical(), h, w.shape[-2:], *ctx.how)
        return dg, dw, None, None, None, None


class GradWeight(_Product):
    """dw, the weight gradient: linear in g and in x."""

    channels_of_b = 1

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, kernel_size: Pair, geometry: Any, algorithm: Any, zeros: Any
    ) -> Tensor:
        return _run(algorithm.padded_grad_weight, g, x, kernel_size, geometry, zeros)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple:
        dg = dx = None
        if h is not None:
            g, x = ctx.saved_tensors
            if _required(ctx, 0):
                dg = convolve(x.conj_physical(), h, None, *ctx.how)
            if _required(ctx, 1):
                dx = grad_input(g.conj_physical(), h, x.shape[-2:], *ctx.how)
        return dg, dx, None, None, None, None


# torch.compile rejects a Function with a forward mode; these have none.


class _Forward(Forward):
    jvp = Function.jvp


class _GradInput(GradInput):
    jvp = Function.jvp


class _GradWeight(GradWeight):
    jvp = Function.jvp


def _join(t: Tensor, batched: int | None, channels: int, info: Any) -> Tensor:
    """Merges the vmapped dimension (None: the same tensor B times) into the channels' one."""
    size = info.batch_size
    t = t.expand(size, *t.shape) if batched is None else t.movedim(batched, 0)
    return t.movedim(0, channels).flatten(channels, channels + 1)


def _required(ctx: Any, i: int) -> bool:
    return ctx.needs_input_grad[i] and (is_compiling() or gradient_is_needed(ctx, i))


def autocasts(device: str) -> bool:
    """Whether torch.autocast is on for this type of device."""
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def _run(method: Callable[..., Tensor], a: Tensor, b: Tensor, *how: Any) -> Tensor:
    """The result of an algorithm in the dtype of its inputs, in memory that they do not share.

    The next layer may write in place. Autograd allows that if the output of a Function is no view,
    and does not notice if it is an input, as that of a 1x1 convolution with weight one might be.
    """
    if autocasts(a.device.type):  # a backward may be called under autocast
        with torch.autocast(a.device.type, enabled=False):
            result = method(a, b, *how)
    else:
        result = method(a, b, *how)
    if is_compiling():
        return result
    return result.clone() if _share_memory(result, a, b) else result.data


def _share_memory(result: Tensor, *inputs: Tensor) -> bool:
    try:
        storage = result.untyped_storage().data_ptr()
        return any(t.untyped_storage().data_ptr() == storage for t in inputs)
    except RuntimeError:  # a tensor subclass without storage
        return True
