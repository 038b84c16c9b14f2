"""Faults of rounding, and of NaN, Inf and -0.0, each with the line that reports it."""

import itertools

import torch
from faults import (
    Correct,
    Fault,
    Faults,
    InTheInputsType,
    KernelPositions,
    grouped,
    kernel_positions,
)
from torch import nn

from cnntrain.conv import Conv2d
from cnntrain.conv.module import Algorithm

faults = Faults()


class OneByOne(Algorithm):
    """Each product is added to a sum in the type of the input."""

    def forward(self, x, w, geometry):
        size = geometry.output_size(x.shape[2:], w.shape[2:])
        filters = w.unflatten(0, (geometry.groups, -1))
        y = x.new_zeros(len(x), *filters.shape[:2], size[0] * size[1])
        for i, j, met in kernel_positions(w.shape[2:], size, geometry):
            pixels = grouped(x[met], geometry)
            for c in range(w.shape[1]):
                y += filters[:, :, c, i, j, None] * pixels[:, :, None, c]
        return y.view(len(x), len(w), *size)

    def grad_input(self, g, w, input_size, geometry):
        filters = w.unflatten(0, (geometry.groups, -1))
        dx = g.new_zeros(len(g), geometry.groups, w.shape[1], *input_size)
        gradients = g.unflatten(1, (geometry.groups, -1))
        for i, j, met in kernel_positions(w.shape[2:], g.shape[2:], geometry):
            for o in range(filters.shape[1]):
                dx[met] += filters[:, o, :, i, j, None, None] * gradients[:, :, o, None]
        return dx.flatten(1, 2)

    def grad_weight(self, g, x, kernel_size, geometry):
        """Position by position, the images of one position at once."""
        (sh, sw), (dh, dw), (kh, kw) = geometry.stride, geometry.dilation, kernel_size
        gradients = g.unflatten(1, (geometry.groups, -1, 1)).movedim(
            0, -1
        )  # (G, O/G, 1, OH, OW, N)
        pixels = x.unflatten(1, (geometry.groups, -1)).movedim(0, 2)  # (G, C/G, N, H, W)
        sums = g.new_zeros(geometry.groups, gradients.shape[1], pixels.shape[1] * kh * kw)
        for r, q in itertools.product(*map(range, g.shape[2:])):
            rows = slice(r * sh, r * sh + dh * (kh - 1) + 1, dh)
            columns = slice(q * sw, q * sw + dw * (kw - 1) + 1, dw)
            under = pixels[..., rows, columns].movedim(2, -1).flatten(1, 3)  # (G, K, N)
            sums += gradients[:, :, 0, r, q] @ under.mT
        return sums.view(g.shape[1], -1, kh, kw)


class Blocks(Algorithm):
    """Up to `most` blocks of the products, each an exact sum that is rounded to the input's type
    before it is added to the others."""

    def __init__(self, most):
        self.most = most

    def forward(self, x, w, geometry):
        blocks = self.cut(w.transpose(0, 1))
        return sum(
            KernelPositions().forward(x, block.transpose(0, 1), geometry) for block in blocks
        )

    def grad_input(self, g, w, input_size, geometry):
        filters = w.unflatten(0, (geometry.groups, -1)).transpose(0, 1)
        blocks = (block.transpose(0, 1).flatten(0, 1) for block in self.cut(filters))
        return sum(KernelPositions().grad_input(g, block, input_size, geometry) for block in blocks)

    def grad_weight(self, g, x, kernel_size, geometry):
        return sum(
            KernelPositions().grad_weight(block, x, kernel_size, geometry) for block in self.cut(g)
        )

    def cut(self, t):
        """The tensor block by block along its first dimension, zeros elsewhere."""
        for part in torch.arange(len(t)).chunk(self.most):
            block = torch.zeros_like(t)
            block[part] = t[part]
            yield block


class OutputRows(Blocks):
    """The weight gradient by output rows."""

    def grad_weight(self, g, x, kernel_size, geometry):
        blocks = (block.movedim(0, 2) for block in self.cut(g.movedim(2, 0)))
        return sum(
            KernelPositions().grad_weight(block, x, kernel_size, geometry) for block in blocks
        )


class TapByTap(KernelPositions):
    """A product with a float32 sum for each position of the kernel, added in the input's type, as
    are the weight gradients of the images."""

    forward = KernelPositions.forward.__wrapped__
    grad_input = KernelPositions.grad_input.__wrapped__
    grad_weight = KernelPositions.grad_weight.__wrapped__


WAYS = {
    "OneByOne": OneByOne(),
    "Blocks": Blocks(8),
    "TwoBlocks": Blocks(2),
    "OutputRows": OutputRows(8),
    "TapByTap": TapByTap(),
}


def adds_in(dtype, way):
    """An algorithm that is sound but for one type."""

    def method(name):
        def call(self, a, b, *how):
            return getattr(way if a.dtype == dtype else KernelPositions(), name)(a, b, *how)

        return call

    names = ("forward", "grad_input", "grad_weight")
    return type("Adding", (InTheInputsType,), {name: method(name) for name in names})()


class UnderAutocast(Correct):
    """Correct, but under autocast."""

    faulty: Algorithm

    def _conv_forward(self, input, weight, bias):
        self.algorithm = self.faulty if torch.is_autocast_enabled("cpu") else Correct.algorithm
        return super()._conv_forward(input, weight, bias)


def enter_half_types():
    """Each way of adding, in each half type and in each of the three functions."""
    for dtype, way in itertools.product((torch.bfloat16, torch.float16), [*WAYS, "UnderAutocast"]):
        if way == "UnderAutocast":
            layer = type(way, (UnderAutocast,), {"faulty": adds_in(dtype, Blocks(8))})
        else:
            layer = type(way, (Conv2d,), {"algorithm": adds_in(dtype, WAYS[way])})
        kind = str(dtype).removeprefix("torch.")
        for quantity in ("output", "input gradient", "weight gradient"):
            name = f"{way}, {quantity}, {kind}"
            faults[name] = Fault(layer, (f"{quantity}, {kind}",))


enter_half_types()


@faults.caught_by("output, bfloat16")
class AddsTorchsConvolutions(nn.Conv2d):
    """Of the odd channels and of the even ones."""

    def forward(self, input):
        odd = (torch.arange(self.weight.shape[1]) % 2)[:, None, None].to(self.weight.dtype)
        parts = self._conv_forward(input, self.weight * odd, None)
        return parts + self._conv_forward(input, self.weight * (1 - odd), self.bias)


# NaN, Inf and negative zeros.


def everything_times_zero(y, t):
    """Adds 0 times the whole input: 0 unless it has NaN or Inf."""
    return y + 0 * t.sum((1, 2, 3), keepdim=True)


@faults.caught_by("output, NaN, Inf and -0.0")
class WholeImageTimesZero(KernelPositions):
    """As a product of spectra or with a Toeplitz matrix."""

    def forward(self, x, w, geometry):
        return everything_times_zero(super().forward(x, w, geometry), x)


@faults.caught_by("output, NaN, Inf and -0.0")
class RowTimesZero(KernelPositions):
    """A row of the output by a banded matrix, in depthwise layers alone."""

    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        if w.shape[1] > 1:
            return y
        rows = 0 * x[:, :, :: geometry.stride[0]][:, :, : y.shape[2]].sum(3, keepdim=True)
        return y + rows.repeat_interleave(len(w) // x.shape[1], 1)


@faults.caught_by("output, NaN, Inf and -0.0")
class GroupsOfABlockDiagonalWeight(KernelPositions):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        pixels = x[..., : y.shape[2], : y.shape[3]] if geometry.groups > 1 else None
        return (
            y if pixels is None or pixels.shape[2:] != y.shape[2:] else y + 0 * pixels.sum(1, True)
        )


@faults.caught_by("output, NaN, Inf and -0.0")
class ZeroTakesItsSignFromElsewhere(KernelPositions):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        above = x.flatten(1).nan_to_num().sum(1) > 0
        return torch.where((y == 0) & above[:, None, None, None], -y, y)


@faults.caught_by("output, NaN, Inf and -0.0")
class NotANumberBecomesZero(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x.nan_to_num(0, torch.inf, -torch.inf), w, geometry)


@faults.caught_by("output, NaN, Inf and -0.0")
class ZerosAreSkipped(KernelPositions):
    """A sparse product: zero times Inf is 0."""

    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        return y if x.any() else torch.zeros_like(y)


@faults.caught_by("input gradient, NaN, Inf and -0.0")
class GradientPaddedWithZeros(KernelPositions):
    """As a convolution of the padded output gradient with the flipped filters."""

    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        border = torch.ones_like(dx[0, 0], dtype=torch.bool)
        border[1:-1, 1:-1] = False
        factors = 0 * w.unflatten(0, (geometry.groups, -1)).sum((1, 3, 4)).flatten()
        return dx + factors[:, None, None] * border if w.shape[2] > 1 else dx


@faults.caught_by("input gradient, NaN, Inf and -0.0")
class GradientSpreadWithZeros(KernelPositions):
    """Zeros between the pixels in place of a stride."""

    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        return dx + 0 * w.sum() if geometry.stride != (1, 1) else dx


@faults.caught_by("input gradient, NaN, Inf and -0.0")
class GradientOfTheWholeImageTimesZero(KernelPositions):
    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        return everything_times_zero(dx, g) if geometry.groups > 1 else dx


@faults.caught_by("weight gradient, NaN, Inf and -0.0")
class PixelsBetweenWindowsTimesZero(KernelPositions):
    """A correlation with the output gradient, zeros between its pixels."""

    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw + 0 * x.sum() if geometry.stride != (1, 1) else dw


@faults.caught_by("weight gradient, NaN, Inf and -0.0")
class OtherFiltersTimesZero(KernelPositions):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g, x, kernel_size, geometry) + 0 * g.sum()


@faults.caught_by("weight gradient, NaN, Inf and -0.0")
class ImagesWithNaNAreSkipped(KernelPositions):
    def grad_weight(self, g, x, kernel_size, geometry):
        good = x.isfinite().all(3).all(2).all(1)
        return super().grad_weight(g[good], x[good], kernel_size, geometry)
