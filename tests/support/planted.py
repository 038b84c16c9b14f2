"""Faults to be planted one by one in a small sound backend, a sum over the kernel's taps."""

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import nn

from cnntrain.conv import Conv2d
from cnntrain.conv.autograd import Algorithm
from cnntrain.conv.geometry import crop, pad, padded
from cnntrain.lab.verify import verify


def in_32_bits(method):
    """A sum of half types in float32, rounded once."""

    @functools.wraps(method)
    def wide(self, a, b, *how):
        dtype = torch.promote_types(a.dtype, torch.float32)
        return method(self, a.to(dtype), b.to(dtype), *how).to(a.dtype)

    return wide


class InTheInputsType(Algorithm):
    """An algorithm that is given half types as they are, not converted to float32."""

    def padded_forward(self, x, w, bias, geometry, zeros):
        y = self.forward(pad(x, zeros), w, geometry)
        return y if bias is None else y + bias[:, None, None]

    def padded_grad_input(self, g, w, input_size, geometry, zeros):
        return crop(self.grad_input(g, w, padded(input_size, zeros), geometry), zeros).clone()

    def padded_grad_weight(self, g, x, kernel_size, geometry, zeros):
        return self.grad_weight(g, pad(x, zeros), kernel_size, geometry)


class Taps(InTheInputsType):
    """y, dx and dw as sums over the kernel's positions."""

    @in_32_bits
    def forward(self, x, w, geometry):
        size = geometry.output_size(x.shape[2:], w.shape[2:])
        filters = w.unflatten(0, (geometry.groups, -1))  # (groups, O/groups, C/groups, kh, kw)
        y = x.new_zeros(len(x), *filters.shape[:2], math.prod(size))
        for i, j, met in taps(w.shape[2:], size, geometry):
            y += filters[..., i, j] @ grouped(x[met], geometry)
        return y.view(len(x), len(w), *size)

    @in_32_bits
    def grad_input(self, g, w, input_size, geometry):
        filters = w.unflatten(0, (geometry.groups, -1)).transpose(1, 2)
        dx = g.new_zeros(len(g), w.shape[1] * geometry.groups, *input_size)
        for i, j, met in taps(w.shape[2:], g.shape[2:], geometry):
            dx[met] += (filters[..., i, j] @ grouped(g, geometry)).view(dx[met].shape)
        return dx

    @in_32_bits
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = g.new_zeros(g.shape[1], x.shape[1] // geometry.groups, *kernel_size)
        for i, j, met in taps(kernel_size, g.shape[2:], geometry):
            products = grouped(g, geometry) @ grouped(x[met], geometry).mT
            dw[:, :, i, j] = products.sum(0).view(dw.shape[:2])
        return dw


def grouped(t, geometry):
    """(N, C, H, W) -> (N, groups, C/groups, H * W)"""
    return t.flatten(2).unflatten(1, (geometry.groups, -1))


def taps(kernel, output, geometry):
    """The kernel's positions, and where their pixels are in an input."""
    (sh, sw), (dh, dw), (oh, ow) = geometry.stride, geometry.dilation, output
    for i, j in itertools.product(*map(range, kernel)):
        rows = slice(i * dh, i * dh + sh * (oh - 1) + 1, sh)
        yield i, j, (..., rows, slice(j * dw, j * dw + sw * (ow - 1) + 1, sw))


class Sound(Conv2d):
    algorithm = Taps()


class Faults(dict[str, tuple[type[nn.Conv2d], str]]):
    """A table of layers with a fault, each with the line of the report that has to show it."""

    def caught_by(self, line: str) -> Callable[[type], type]:
        """Enters a layer, or an algorithm as the layer that it makes."""

        def enter(kind: type) -> type:
            layer = kind
            if issubclass(kind, Algorithm):
                layer = type(kind.__name__, (Conv2d,), {"algorithm": kind()})
            self[kind.__name__] = layer, line
            return kind

        return enter

    def check(self, name: str) -> None:
        backend, line = self[name]
        report = verify(backend, short=True, only=line, cases=40)
        (found,) = report.lines
        assert found.name == line
        assert not report.passed
        assert found.error > found.budget
        assert found.failure.startswith(f"{name}(")
