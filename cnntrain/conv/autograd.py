"""A convolution and its derivatives.

A convolution is bilinear in input and weight. Three functions say everything about it, and each
is the derivative of the other two:

    forward(x, w)       y  = x * w
    grad_input(g, w)    dx = what makes  <g, x * w> = <dx, x>
    grad_weight(g, x)   dw = what makes  <g, x * w> = <dw, w>

So an algorithm that computes these three has derivatives of every order, in reverse and in forward
mode, by the chain of calls below, and nothing is computed that nobody asked for. For the backward,
x and w are kept and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from cnntrain.conv.function import keep, run, signed, upcast, wanted
from cnntrain.conv.geometry import Amounts, Geometry, Pair, crop, pad, padded


class Algorithm(ABC):
    """One way to compute a convolution, its input gradient and its weight gradient.

    Shapes: x (N, C, H, W), already padded; w (O, C/groups, kh, kw); g, y (N, O, OH, OW). Sizes,
    dtypes and devices have been checked before; inputs may have any strides and are not changed.
    Results are new tensors, of the inputs' dtype, which is never a half type. None of the three
    needs to be differentiable.
    """

    @abstractmethod
    def forward(self, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        """y (N, O, OH, OW), without bias."""

    @abstractmethod
    def grad_input(self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry) -> Tensor:
        """dx (N, C, H, W), where input_size is (H, W)."""

    @abstractmethod
    def grad_weight(self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry) -> Tensor:
        """dw (O, C/groups, kh, kw), where kernel_size is (kh, kw)."""

    # The same for an input that is to be padded with zeros. An algorithm that computes the batch in
    # parts may do better, and pad one part at a time. Half types (bfloat16, float16) are computed
    # in float32, and the result is rounded once.

    def padded_forward(
        self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        y = self.forward(pad(upcast(x), zeros), upcast(w), geometry)
        return (y if bias is None else y + bias[:, None, None]).to(x.dtype)

    def padded_grad_input(
        self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        dx = self.grad_input(upcast(g), upcast(w), padded(input_size, zeros), geometry)
        return (crop(dx, zeros).clone() if any(zeros) else dx).to(g.dtype)

    def padded_grad_weight(
        self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        dw = self.grad_weight(upcast(g), pad(upcast(x), zeros), kernel_size, geometry)
        return dw.to(g.dtype)

    def traceable(self) -> Algorithm:
        """The algorithm that is compiled or exported, and used for tensor subclasses: one that does
        the same with operators that hold for every size."""
        return self


# Here `how` is a Geometry, an Algorithm, and the zeros at each side of the input. It is padded
# within these functions, so that what is kept for the backward is the input as it was.


def convolve(x: Tensor, w: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """y = x * w + bias (N, O, OH, OW), differentiable in x, w and bias, as often as one likes."""
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
    @signed
    def forward(
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        algorithm: Algorithm,
        zeros: Amounts,
    ) -> Tensor:
        y = run(algorithm.padded_forward, x, w, bias, geometry, zeros)
        return y.clone() if is_compiling() and bias is None else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, w, _, *ctx.how = inputs
        ctx.size = output.shape
        keep(ctx, x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple:
        dx = dw = db = None
        if g is not None:
            x, w = ctx.saved_tensors
            if wanted(ctx, 0):
                dx = grad_input(g, w.conj_physical(), _plane(x), *ctx.how)
            if wanted(ctx, 1):
                dw = grad_weight(g, x.conj_physical(), _plane(w), *ctx.how)
            if wanted(ctx, 2):
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
            x = x.movedim(x_dim, 0).flatten(0, 1)
            y = convolve(x, w, bias, *how)
            return y.unflatten(0, (info.batch_size, -1)), 0
        x, w = _join(x, x_dim, 1, info), _join(w, w_dim, 0, info)
        bias = None if bias is None else _join(bias, bias_dim, 0, info)
        y = convolve(x, w, bias, *_grouped(how, info))
        return y.unflatten(1, (info.batch_size, -1)), 1


class _Gradient(Function):
    """What the two gradients have in common: both are linear in g, and in the other factor."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        g, factor, ctx.size, *ctx.how = inputs
        keep(ctx, g, factor)

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
    @signed
    def forward(
        g: Tensor,
        w: Tensor,
        input_size: Pair,
        geometry: Geometry,
        algorithm: Algorithm,
        zeros: Amounts,
    ) -> Tensor:
        return run(algorithm.padded_grad_input, g, w, input_size, geometry, zeros)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple:
        dg = dw = None
        if h is not None:
            g, w = ctx.saved_tensors
            if wanted(ctx, 0):
                dg = convolve(h, w.conj_physical(), None, *ctx.how)
            if wanted(ctx, 1):
                dw = grad_weight(g.conj_physical(), h, _plane(w), *ctx.how)
        return dg, dw, None, None, None, None

    @staticmethod
    def vmap(info: Any, dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        (g, w, input_size, *how), (g_dim, w_dim, *_) = inputs, dims
        if w_dim is None:
            g = g.movedim(g_dim, 0).flatten(0, 1)
            dx = grad_input(g, w, input_size, *how)
            return dx.unflatten(0, (info.batch_size, -1)), 0
        g, w = _join(g, g_dim, 1, info), _join(w, w_dim, 0, info)
        dx = grad_input(g, w, input_size, *_grouped(how, info))
        return dx.unflatten(1, (info.batch_size, -1)), 1


class GradWeight(_Gradient):
    """dw, the weight gradient: linear in g and in x."""

    @staticmethod
    @signed
    def forward(
        g: Tensor,
        x: Tensor,
        kernel_size: Pair,
        geometry: Geometry,
        algorithm: Algorithm,
        zeros: Amounts,
    ) -> Tensor:
        return run(algorithm.padded_grad_weight, g, x, kernel_size, geometry, zeros)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple:
        dg = dx = None
        if h is not None:
            g, x = ctx.saved_tensors
            if wanted(ctx, 0):
                dg = convolve(x.conj_physical(), h, None, *ctx.how)
            if wanted(ctx, 1):
                dx = grad_input(g.conj_physical(), h, _plane(x), *ctx.how)
        return dg, dx, None, None, None, None

    @staticmethod
    def vmap(info: Any, dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        (g, x, kernel_size, *how), (g_dim, x_dim, *_) = inputs, dims
        g, x = _join(g, g_dim, 1, info), _join(x, x_dim, 1, info)
        dw = grad_weight(g, x, kernel_size, *_grouped(how, info))
        return dw.unflatten(0, (info.batch_size, -1)), 0


# torch.compile refuses a Function that has a forward mode, so it is given these, that have none.


class _Forward(Forward):
    jvp = Function.jvp


class _GradInput(GradInput):
    jvp = Function.jvp


class _GradWeight(GradWeight):
    jvp = Function.jvp


def _sum(*terms: Tensor | None) -> Tensor:
    return reduce(add, (term for term in terms if term is not None))


# Under torch.vmap, B convolutions with B weights are one convolution with B times the groups, so
# an algorithm never meets a batched tensor and may write in place.


def _join(t: Tensor, batched: int | None, channels: int, info: Any) -> Tensor:
    """Merges the vmapped dimension (None: the same tensor B times) into the channels' one."""
    size = info.batch_size
    t = t.expand(size, *t.shape) if batched is None else t.movedim(batched, 0)
    return t.movedim(0, channels).flatten(channels, channels + 1)


def _grouped(how: Any, info: Any) -> tuple:
    geometry, *others = how
    return replace(geometry, groups=geometry.groups * info.batch_size), *others


def _plane(t: Tensor) -> Pair:
    return t.shape[-2], t.shape[-1]
