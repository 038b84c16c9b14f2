"""Convolutions and their gradients by other means than PyTorch's, for others to be checked by.

PyTorch's own convolution in float64 on a CPU is im2col itself, so it is none of these. All take a
Problem and return what each quantity should be:

- `loops`: the definition, number by number, in Python.
- `scipys`: scipy.signal's correlate and convolve.
- `taps`: a sum over the kernel's positions. Fast, and exact for whole numbers.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import scipy.signal
import torch

from cnntrain.conv.geometry import Geometry
from cnntrain.conv.oracle import seven_loops
from cnntrain.lab.verify.cases import Case, pair

OUTPUT, INPUT, WEIGHT, BIAS = QUANTITIES = (
    "output",
    "input gradient",
    "weight gradient",
    "bias gradient",
)
NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
Array = np.ndarray
Truth = dict[str, Array]  # quantity -> what it should be; without a bias there is no BIAS


@dataclass(frozen=True)
class Problem:
    """A case with numbers: x of the case's input shape, w, b (None: no bias), and g, the gradient
    of the output."""

    case: Case
    x: Array
    w: Array
    b: Array | None
    g: Array

    @classmethod
    def normal(cls, case: Case, seed: int) -> Problem:
        """Normally distributed numbers, a function of case and seed."""
        return cls._filled(case, _generator(case, seed).standard_normal)

    @classmethod
    def positive(cls, case: Case, seed: int) -> Problem:
        """Uniform in [0, 1): as after a ReLU, where rounding errors do not cancel."""
        return cls._filled(case, _generator(case, seed).random)

    @classmethod
    def integers(cls, case: Case, seed: int, most: int = 21) -> Problem:
        """Whole numbers from -most to most."""
        draw = _generator(case, seed).integers
        return cls._filled(case, lambda size: draw(-most, most + 1, size).astype(float))

    @classmethod
    @lru_cache(10_000)
    def small(cls, case: Case, seed: int, weights: int) -> Problem:
        """Whole numbers from -2 to 2: no dtype rounds sums of some hundred products. Weight and
        bias depend on their shapes and `weights`, the other numbers on the case and `seed`."""
        draw = np.random.default_rng([weights, *case.weight_shape]).integers
        w, b = (draw(-2, 3, size).astype(float) for size in (case.weight_shape, case.out_channels))
        return replace(cls.integers(case, seed, 2), w=w, b=b if case.bias else None)

    @classmethod
    def wide(cls, case: Case, seed: int, factor: str) -> Problem:
        """Whole numbers from -1 to 1; of one of "xwg", from -4095 to 4095."""
        values = getattr(cls.integers(case, seed, 4095), factor)
        return cls.integers(case, seed, 1).with_(**{factor: values})

    def with_(self, **numbers: Array) -> Problem:
        """With other numbers for some of x, w, b and g."""
        changed: dict[str, Any] = dict(numbers)
        return replace(self, **changed)

    @cached_property
    def truth(self) -> Truth:
        return taps(self)

    @classmethod
    def _filled(cls, case: Case, draw: Callable[[Any], Array]) -> Problem:
        shapes = (case.input_shape, case.weight_shape, (case.out_channels,), case.output_shape)
        x, w, b, g = map(draw, shapes)
        return cls(case, x, w, b if case.bias else None, g)

    def map(self, function: Callable[[Array], Array]) -> Problem:
        """The same case, each number made another."""
        b = None if self.b is None else function(self.b)
        return Problem(self.case, function(self.x), function(self.w), b, function(self.g))

    @property
    def steps(self) -> tuple[int, int, int, int]:
        """Stride and dilation, (down, right) each."""
        return *pair(self.case.stride), *pair(self.case.dilation)

    def padded(self) -> Array:
        """x (N, C, H', W')"""
        planes, source = _batched(self.x), sources(self.case)
        pixels = planes.reshape(*planes.shape[:2], math.prod(planes.shape[2:]))
        return np.append(pixels, np.zeros_like(pixels[..., :1]), axis=2)[..., source]

    def unpadded(self, dx: Array) -> Array:
        """The gradient of x, from that of padded(): each pixel sums up that of its copies."""
        if self.case.padding_mode == "zeros":
            (top, _), (left, _) = self.case.pads
            height, width = self.case.size[-2:]
            return dx[..., top : top + height, left : left + width].reshape(self.x.shape)
        n, c, *_ = dx.shape
        pixels = np.zeros((math.prod(self.case.size[-2:]), n * c), dx.dtype)
        source = sources(self.case).ravel()
        np.add.at(pixels, source, dx.reshape(n * c, source.size).T)
        return pixels.T.reshape(self.x.shape)

    def from_padded(self, y: Array, dx: Array, dw: Array) -> Truth:
        """From what an oracle worked out on the padded input."""
        found = {OUTPUT: y.reshape(self.g.shape), INPUT: self.unpadded(dx), WEIGHT: dw}
        if self.b is not None:
            found[OUTPUT] = found[OUTPUT] + self.b[:, None, None]
            found[BIAS] = _batched(self.g).sum((0, 2, 3))
        return found


@lru_cache(10_000)
def sources(case: Case) -> Array:
    """Which pixel each pixel of the padded plane is a copy of: (H', W'), -1 for a zero."""
    height, width = case.size[-2:]
    plane = np.arange(height * width).reshape(height, width)
    if case.padding_mode == "zeros":
        return np.pad(plane, case.pads, constant_values=-1)
    return np.pad(plane, case.pads, NUMPY_MODES[case.padding_mode])  # type: ignore[call-overload]


def loops(p: Problem) -> Truth:
    """The seven loops; and since every product w x in an output's sum adds g w to the gradient of
    its pixel and g x to that of its weight, the same loops once more for the gradients."""
    x, g, o = p.padded(), _batched(p.g), p.case.out_channels
    sh, sw, dh, dw = p.steps
    how = Geometry((sh, sw), (dh, dw), p.case.groups)
    y = seven_loops(torch.from_numpy(x), torch.from_numpy(p.w), None, how)
    pixels, weights, gradients = x.tolist(), p.w.tolist(), g.tolist()
    pixels_g, weights_g = np.zeros_like(x).tolist(), np.zeros_like(p.w).tolist()
    _, channels, kh, kw = p.w.shape
    for n, out, r, q in itertools.product(*map(range, g.shape)):
        first, down, right = out // (o // p.case.groups) * channels, r * sh, q * sw
        gradient = gradients[n][out][r][q]
        for c, i, j in itertools.product(range(channels), range(kh), range(kw)):
            row, column = down + i * dh, right + j * dw
            pixels_g[n][first + c][row][column] += gradient * weights[out][c][i][j]
            weights_g[out][c][i][j] += gradient * pixels[n][first + c][row][column]
    return p.from_padded(np.array(y), np.array(pixels_g), np.array(weights_g))


def scipys(p: Problem) -> Truth:
    """scipy.signal on planes: dilation is a kernel with zeros between its taps, stride a gradient
    with zeros between its pixels."""
    x, g = p.padded(), _batched(p.g)
    sh, sw, dh, dw = p.steps
    kernels, gradients = _spread(p.w, dh, dw), _spread(g, sh, sw)
    # What the windows cover: a stride may leave a remainder at the bottom and on the right.
    height, width = (a + b - 1 for a, b in zip(gradients.shape[2:], kernels.shape[2:], strict=True))
    y, x_g, w_g = np.zeros(g.shape), np.zeros_like(x), np.zeros_like(p.w)
    for n, out, c, channel in _connections(x.shape[0], p):
        plane = x[n, channel, :height, :width]
        y[n, out] += scipy.signal.correlate(plane, kernels[out, c], "valid", "direct")[::sh, ::sw]
        x_g[n, channel, :height, :width] += scipy.signal.convolve(
            gradients[n, out], kernels[out, c], "full", "direct"
        )
        w_g[out, c] += scipy.signal.correlate(plane, gradients[n, out], "valid", "direct")[
            ::dh, ::dw
        ]
    return p.from_padded(y, x_g, w_g)


def taps(p: Problem) -> Truth:
    """For each of the kernel's kh * kw positions, the products with the pixels that it meets."""
    x, g, groups, (sh, sw, dh, dw) = p.padded(), _batched(p.g), p.case.groups, p.steps
    (n, o, oh, ow), c = g.shape, x.shape[1]
    gradients = g.reshape(n, groups, o // groups, oh * ow)
    y, x_g, w_g = np.zeros_like(gradients), np.zeros_like(x), np.zeros_like(p.w)
    for i, j in np.ndindex(*p.w.shape[2:]):
        met = (..., _run(i * dh, sh, oh), _run(j * dw, sw, ow))
        pixels = x[met].reshape(n, groups, c // groups, oh * ow)
        tap = p.w[:, :, i, j].reshape(groups, o // groups, c // groups)
        y += tap @ pixels
        x_g[met] += (tap.swapaxes(1, 2) @ gradients).reshape(n, c, oh, ow)
        w_g[:, :, i, j] = (gradients @ pixels.swapaxes(2, 3)).sum(0).reshape(o, c // groups)
    return p.from_padded(y, x_g, w_g)


def _generator(case: Case, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(repr(case).encode())])


def _batched(t: Array) -> Array:
    return t if t.ndim == 4 else t[None]


def _run(first: int, step: int, count: int) -> slice:
    return slice(first, first + step * (count - 1) + 1, step)


def _spread(t: Array, down: int, right: int) -> Array:
    """Zeros between the pixels of the last two dimensions."""
    *others, height, width = t.shape
    spread = np.zeros((*others, down * (height - 1) + 1, right * (width - 1) + 1), t.dtype)
    spread[..., ::down, ::right] = t
    return spread


def _connections(batch: int, p: Problem) -> Iterator[tuple[int, int, int, int]]:
    """Image, filter, channel of the filter, and the channel of the input that this one meets."""
    filters, channels = p.case.out_channels // p.case.groups, p.w.shape[1]
    for n, o, c in itertools.product(range(batch), range(p.case.out_channels), range(channels)):
        yield n, o, c, o // filters * channels + c
