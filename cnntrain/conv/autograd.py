"""A convolution and its derivatives.

A convolution is bilinear in input and weight. Three functions say everything about it, and each
is the derivative of the other two:

    forward(x, w)       y  = x * w
    grad_input(g, w)    dx = what makes  <g, x * w> = <dx, x>
    grad_weight(g, x)   dw = what makes  <g, x * w> = <dw, w>

So an algorithm that computes these three has derivatives of every order, by the chain of calls
below, and nothing is computed that nobody asked for. For the backward, x and w are kept and
nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.autograd import Function

from cnntrain.conv.geometry import Geometry, Pair


class Algorithm(ABC):
    """One way to compute a convolution, its input gradient and its weight gradient.

    Shapes: x (N, C, H, W), already padded; w (O, C/groups, kh, kw); g, y (N, O, OH, OW). Sizes,
    dtypes and devices have been checked before; inputs may have any strides and are not changed.
    None of the three needs to be differentiable itself.
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


class Forward(Function):
    """y = x * w"""

    @staticmethod
    def forward(x: Tensor, w: Tensor, geometry: Geometry, algorithm: Algorithm) -> Tensor:
        return algorithm.forward(x, w, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, w, ctx.geometry, ctx.algorithm = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        (x, w), how = ctx.saved_tensors, (ctx.geometry, ctx.algorithm)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = GradInput.apply(g, w, _plane(x), *how)
        if ctx.needs_input_grad[1]:
            dw = GradWeight.apply(g, x, _plane(w), *how)
        return dx, dw, None, None

    @staticmethod
    def vmap(
        info: Any, dims: tuple, x: Tensor, w: Tensor, geometry: Geometry, algorithm: Algorithm
    ) -> tuple[Tensor, int]:
        x_dim, w_dim, *_ = dims
        if w_dim is None:
            y = Forward.apply(x.movedim(x_dim, 0).flatten(0, 1), w, geometry, algorithm)
            return y.unflatten(0, (info.batch_size, -1)), 0
        x, w = _join(x, x_dim, 1, info), _join(w, w_dim, 0, info)
        y = Forward.apply(x, w, _grouped(geometry, info), algorithm)
        return y.unflatten(1, (info.batch_size, -1)), 1


class GradInput(Function):
    """dx, the input gradient: linear in g and in w."""

    @staticmethod
    def forward(
        g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry, algorithm: Algorithm
    ) -> Tensor:
        return algorithm.grad_input(g, w, input_size, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        g, w, _, ctx.geometry, ctx.algorithm = inputs
        ctx.save_for_backward(g, w)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple:
        (g, w), how = ctx.saved_tensors, (ctx.geometry, ctx.algorithm)
        dg = dw = None
        if ctx.needs_input_grad[0]:
            dg = Forward.apply(h, w, *how)
        if ctx.needs_input_grad[1]:
            dw = GradWeight.apply(g, h, _plane(w), *how)
        return dg, dw, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        dims: tuple,
        g: Tensor,
        w: Tensor,
        input_size: Pair,
        geometry: Geometry,
        algorithm: Algorithm,
    ) -> tuple[Tensor, int]:
        g_dim, w_dim, *_ = dims
        if w_dim is None:
            g = g.movedim(g_dim, 0).flatten(0, 1)
            dx = GradInput.apply(g, w, input_size, geometry, algorithm)
            return dx.unflatten(0, (info.batch_size, -1)), 0
        g, w = _join(g, g_dim, 1, info), _join(w, w_dim, 0, info)
        dx = GradInput.apply(g, w, input_size, _grouped(geometry, info), algorithm)
        return dx.unflatten(1, (info.batch_size, -1)), 1


class GradWeight(Function):
    """dw, the weight gradient: linear in g and in x."""

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry, algorithm: Algorithm
    ) -> Tensor:
        return algorithm.grad_weight(g, x, kernel_size, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        g, x, _, ctx.geometry, ctx.algorithm = inputs
        ctx.save_for_backward(g, x)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple:
        (g, x), how = ctx.saved_tensors, (ctx.geometry, ctx.algorithm)
        dg = dx = None
        if ctx.needs_input_grad[0]:
            dg = Forward.apply(x, h, *how)
        if ctx.needs_input_grad[1]:
            dx = GradInput.apply(g, h, _plane(x), *how)
        return dg, dx, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        dims: tuple,
        g: Tensor,
        x: Tensor,
        kernel_size: Pair,
        geometry: Geometry,
        algorithm: Algorithm,
    ) -> tuple[Tensor, int]:
        g_dim, x_dim, *_ = dims
        g, x = _join(g, g_dim, 1, info), _join(x, x_dim, 1, info)
        dw = GradWeight.apply(g, x, kernel_size, _grouped(geometry, info), algorithm)
        return dw.unflatten(0, (info.batch_size, -1)), 0


# Under torch.vmap, B convolutions with B weights are one convolution with B times the groups, so
# an algorithm never meets a batched tensor and may write in place.


def _join(t: Tensor, batched: int | None, channels: int, info: Any) -> Tensor:
    """Merges the vmapped dimension (None: the same tensor B times) into the channels' one."""
    size = info.batch_size
    t = t.expand(size, *t.shape) if batched is None else t.movedim(batched, 0)
    return t.movedim(0, channels).flatten(channels, channels + 1)


def _grouped(geometry: Geometry, info: Any) -> Geometry:
    return replace(geometry, groups=geometry.groups * info.batch_size)


def _plane(t: Tensor) -> Pair:
    return t.shape[-2], t.shape[-1]
