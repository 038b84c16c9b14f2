"""Injected faults: tables of wrong convolutions, most of them variants of one correct algorithm."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from cnntrain.conv import Conv2d
from cnntrain.conv.geometry import crop, pad, padded
from cnntrain.conv.module import Algorithm
from cnntrain.lab.verify import CheckResult
from cnntrain.lab.verify.check import Candidate
from cnntrain.lab.verify.suite import CHECKS, settings_restored

# Kinds of faults, and parts of the names of lines that may report them.
LINES = {
    1: ["sizes", "small integers"],  # sizes at which implementations switch
    2: ["parameters changed between calls"],  # a weight kept between calls
    3: ["modes in any order"],  # the first call decides
    4: ["memory formats and strides", "no state between calls"],  # in one dtype only
    5: ["no state between calls", "results share no memory", "no tensors kept"],  # outputs reused
    6: ["no state between calls"],  # options read once
    7: ["NaN, Inf and -0.0"],
    8: ["second derivatives"],
    9: ["12-bit integers", ", bfloat16", ", float16", "random layers"],  # narrow sums
    10: ["memory formats and strides"],
    11: ["global state unchanged"],
    12: ["no tensors kept after a call"],
    13: ["threads", "no state between calls"],
    14: ["uses of nn.Conv2d", "copies and pickles", ", bfloat16", ", float16"],
}


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


class KernelPositions(InTheInputsType):
    """y, dx and dw as sums over the kernel's positions."""

    @in_32_bits
    def forward(self, x, w, geometry):
        size = geometry.output_size(x.shape[2:], w.shape[2:])
        filters = w.unflatten(0, (geometry.groups, -1))  # (groups, O/groups, C/groups, kh, kw)
        y = x.new_zeros(len(x), *filters.shape[:2], math.prod(size))
        for i, j, met in kernel_positions(w.shape[2:], size, geometry):
            y += filters[..., i, j] @ grouped(x[met], geometry)
        return y.view(len(x), len(w), *size)

    @in_32_bits
    def grad_input(self, g, w, input_size, geometry):
        filters = w.unflatten(0, (geometry.groups, -1)).transpose(1, 2)
        dx = g.new_zeros(len(g), w.shape[1] * geometry.groups, *input_size)
        for i, j, met in kernel_positions(w.shape[2:], g.shape[2:], geometry):
            dx[met] += (filters[..., i, j] @ grouped(g, geometry)).view(dx[met].shape)
        return dx

    @in_32_bits
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = g.new_zeros(g.shape[1], x.shape[1] // geometry.groups, *kernel_size)
        for i, j, met in kernel_positions(kernel_size, g.shape[2:], geometry):
            products = grouped(g, geometry) @ grouped(x[met], geometry).mT
            dw[:, :, i, j] = products.sum(0).view(dw.shape[:2])
        return dw


def grouped(t, geometry):
    """(N, C, H, W) -> (N, groups, C/groups, H * W)"""
    return t.flatten(2).unflatten(1, (geometry.groups, -1))


def kernel_positions(kernel, output, geometry):
    """The kernel's positions, and where their pixels are in an input."""
    (sh, sw), (dh, dw), (oh, ow) = geometry.stride, geometry.dilation, output
    for i, j in itertools.product(*map(range, kernel)):
        rows = slice(i * dh, i * dh + sh * (oh - 1) + 1, sh)
        yield i, j, (..., rows, slice(j * dw, j * dw + sw * (ow - 1) + 1, sw))


class Correct(Conv2d):
    algorithm = KernelPositions()


class Fault(NamedTuple):
    layer: type[nn.Conv2d]
    lines: tuple[str, ...]  # parts of names of the report's lines, one of which must fail


class Faults(dict[str, Fault]):
    """A table of convolutions with a fault."""

    def caught_by(self, *lines: str) -> Callable[[type], type]:
        """Decorator: enters a layer, or an algorithm as the layer that it makes."""

        def enter(kind: type) -> type:
            layer = kind
            if issubclass(kind, Algorithm):
                layer = type(kind.__name__, (Conv2d,), {"algorithm": kind()})
                layer.__module__ = kind.__module__
            self[kind.__name__] = Fault(layer, lines)
            return kind

        return enter


def first_failure(layer: type[nn.Conv2d], *lines: str, cases: int = 40) -> CheckResult | None:
    """The first failed case of the short form, of the lines whose names contain one of `lines`."""
    candidate = Candidate(layer, cases, 0, True, torch.device("cpu"))
    with settings_restored():
        for part, check in itertools.product(lines, CHECKS):
            if not any(part in name for name in check.lines):
                continue
            for arguments in check.arguments(candidate):
                for name, measured in check.worst(candidate, arguments).items():
                    result = CheckResult(name, check.budget(candidate), check.unit)
                    result.add(candidate, arguments, measured)
                    if part in name and not result.passed:
                        return result
    return None
