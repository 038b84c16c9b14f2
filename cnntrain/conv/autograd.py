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
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from cnntrain.conv.geometry import Pair
from cnntrain.conv.torch_compat import gradient_is_needed

# In this module `how` is a Geometry, an Algorithm, and the zeros at each side of the input. The
# Functions pad, so that the backward keeps the unpadded input.


def convolve(x: Tensor, w: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """y = x * w + bias (N, O, OH, OW), differentiable in x, w and bias."""
    return (_Forward if is_compiling() else Forward).apply(x, w, bias, *how)


def grad_input(g: Tensor, w: Tensor, input_size: Pair, *how: Any) -> Tensor:
    """dx (N, C, H, W), differentiable in g and w."""
    return (_GradInput if is_compiling() else GradInput).apply(g, w, input_size, *how)


def grad_weight(g: Tensor, x: Tensor, kernel_size: Pair, *how: Any) -> Tensor:
    """dw (O, C/groups, kh, kw), differentiable in g and x."""
    return (_GradWeight if is_compiling() else GradWeight).apply(g, x, kernel_size, *how)


class Forward(Function):
    """y = x * w + bias"""

    @staticmethod
    def forward(x: Tensor, w: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        geometry, algorithm, zeros = how
        y = _run(algorithm.padded_forward, x, w, bias, geometry, zeros)
        return y.clone() if is_compiling() and bias is None else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, w, _, *ctx.how = inputs
        ctx.size = output.shape
        _save(ctx, x, w)

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

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x, w), (dx, dw, db, *_) = ctx.saved_tensors, tangents
        dy = _sum(
            None if dx is None else convolve(dx, w, None, *ctx.how),
            None if dw is None else convolve(x, dw, None, *ctx.how),
            None if db is None else db.view(-1, 1, 1),
        )
        return dy.expand(ctx.size)

    @staticmethod
    def vmap(info: Any, dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        (x, w, bias, *how), (x_dim, w_dim, bias_dim, *_) = inputs, dims
        if w_dim is None and bias_dim is None:
            y = convolve(x.movedim(x_dim, 0).flatten(0, 1), w, bias, *how)
            return y.unflatten(0, (info.batch_size, -1)), 0
        x, w = _join(x, x_dim, 1, info), _join(w, w_dim, 0, info)
        bias = None if bias is None else _join(bias, bias_dim, 0, info)
        y = convolve(x, w, bias, *_grouped(how, info))
        return y.unflatten(1, (info.batch_size, -1)), 1


class _Gradient(Function):
    """What the two gradients have in common: each is linear in g and in another factor."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        g, factor, ctx.size, *ctx.how = inputs
        _save(ctx, g, factor)

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Tensor:
        (g, factor), (dg, dfactor, *_) = ctx.saved_tensors, tangents
        return _sum(
            None if dg is None else cls.apply(dg, factor, ctx.size, *ctx.how),
            None if dfactor is None else cls.apply(g, dfactor, ctx.size, *ctx.how),
        )


class GradInput(_Gradient):
    """dx, the input gradient: linear in g and in w."""

    @staticmethod
    def forward(g: Tensor, w: Tensor, input_size: Pair, *how: Any) -> Tensor:
        geometry, algorithm, zeros = how
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

    @staticmethod
    def vmap(info: Any, dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        (g, w, input_size, *how), (g_dim, w_dim, *_) = inputs, dims
        if w_dim is None:
            dx = grad_input(g.movedim(g_dim, 0).flatten(0, 1), w, input_size, *how)
            return dx.unflatten(0, (info.batch_size, -1)), 0
        g, w = _join(g, g_dim, 1, info), _join(w, w_dim, 0, info)
        dx = grad_input(g, w, input_size, *_grouped(how, info))
        return dx.unflatten(1, (info.batch_size, -1)), 1


class GradWeight(_Gradient):
    """dw, the weight gradient: linear in g and in x."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, kernel_size: Pair, *how: Any) -> Tensor:
        geometry, algorithm, zeros = how
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

    @staticmethod
    def vmap(info: Any, dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        (g, x, kernel_size, *how), (g_dim, x_dim, *_) = inputs, dims
        g, x = _join(g, g_dim, 1, info), _join(x, x_dim, 1, info)
        dw = grad_weight(g, x, kernel_size, *_grouped(how, info))
        return dw.unflatten(0, (info.batch_size, -1)), 0


# torch.compile rejects a Function with a forward mode; these have none.


class _Forward(Forward):
    jvp = Function.jvp


class _GradInput(GradInput):
    jvp = Function.jvp


class _GradWeight(GradWeight):
    jvp = Function.jvp


def _sum(*terms: Tensor | None) -> Tensor:
    return reduce(add, (term for term in terms if term is not None))


# Under torch.vmap, B convolutions with B weights are one convolution with B times the groups, so
# that an algorithm receives no batched tensors and may write in place.


def _join(t: Tensor, batched: int | None, channels: int, info: Any) -> Tensor:
    """Merges the vmapped dimension (None: the same tensor B times) into the channels' one."""
    size = info.batch_size
    t = t.expand(size, *t.shape) if batched is None else t.movedim(batched, 0)
    return t.movedim(0, channels).flatten(channels, channels + 1)


def _grouped(how: Any, info: Any) -> tuple:
    geometry, *others = how
    return replace(geometry, groups=geometry.groups * info.batch_size), *others


def _save(ctx: Any, a: Tensor, b: Tensor) -> None:
    ctx.save_for_backward(a, b)
    ctx.save_for_forward(a, b)
    ctx.set_materialize_grads(False)  # no products with undefined, that is zero, gradients


def _required(ctx: Any, i: int) -> bool:
    return ctx.needs_input_grad[i] and (is_compiling() or gradient_is_needed(ctx, i))


def autocasts(device: str) -> bool:
    """Whether torch.autocast is on for this type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


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
