"""Each fault that a convolution can have is caught by `verify`, and by the check that it is for.

The faults are planted one by one in a small sound backend, a sum over the kernel's taps. The short
form has to do.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from cnntrain.conv import Conv2d
from cnntrain.conv.autograd import Algorithm
from cnntrain.lab.verify import verify


class Taps(Algorithm):
    """y, dx and dw as sums over the kernel's positions."""

    def forward(self, x, w, geometry):
        size = geometry.output_size(x.shape[2:], w.shape[2:])
        filters = w.unflatten(0, (geometry.groups, -1))  # (groups, O/groups, C/groups, kh, kw)
        y = x.new_zeros(len(x), *filters.shape[:2], math.prod(size))
        for i, j, met in taps(w.shape[2:], size, geometry):
            y += filters[..., i, j] @ grouped(x[met], geometry)
        return y.view(len(x), len(w), *size)

    def grad_input(self, g, w, input_size, geometry):
        filters = w.unflatten(0, (geometry.groups, -1)).transpose(1, 2)
        dx = g.new_zeros(len(g), w.shape[1] * geometry.groups, *input_size)
        for i, j, met in taps(w.shape[2:], g.shape[2:], geometry):
            dx[met] += (filters[..., i, j] @ grouped(g, geometry)).view(dx[met].shape)
        return dx

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


def test_the_sound_backend_passes():
    report = verify(Sound, short=True, cases=40)
    assert report.passed, [line.failure for line in report.lines if not line.passed]
    assert len(report.lines) == 40
    assert all(line.cases for line in report.lines)


FAULTS: dict[str, tuple[type[nn.Conv2d], str]] = {}


def fault(line: str) -> Callable[[type], type]:
    """Enters an algorithm or a layer with a fault that `line` of the report has to show."""

    def enter(kind: type) -> type:
        if issubclass(kind, Algorithm):
            FAULTS[kind.__name__] = type(kind.__name__, (Conv2d,), {"algorithm": kind()}), line
        else:
            FAULTS[kind.__name__] = kind, line
        return kind

    return enter


# Wrong pixels meet wrong weights.


@fault("output, seven loops")
class FlippedKernel(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w.flip(2, 3), geometry)

    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g, w.flip(2, 3), input_size, geometry)

    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g, x, kernel_size, geometry).flip(2, 3)


@fault("input gradient, seven loops")
class FlippedInTheInputGradient(Taps):
    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g, w.flip(2, 3), input_size, geometry)


@fault("output, random layers")
class SquareKernelsTransposed(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w.mT if w.shape[2] == w.shape[3] else w, geometry)


@fault("weight gradient, random layers")
class WeightGradientTransposed(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw.mT.reshape(dw.shape)


@fault("output, seven loops")
class StrideSwapped(Taps):
    def forward(self, x, w, geometry):
        geometry = replace(geometry, stride=geometry.stride[::-1])
        return super().forward(x, w, geometry)


@fault("output, scipy.signal")
class DilationSwapped(Taps):
    def forward(self, x, w, geometry):
        wrong = replace(geometry, dilation=geometry.dilation[::-1])
        y = super().forward(F.pad(x, (0, 9, 0, 9)), w, wrong)
        oh, ow = geometry.output_size(x.shape[2:], w.shape[2:])
        return y[:, :, :oh, :ow]


@fault("output, scipy.signal")
class DilationIgnored(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, replace(geometry, dilation=(1, 1)))
        oh, ow = geometry.output_size(x.shape[2:], w.shape[2:])
        return y[:, :, :oh, :ow]


@fault("weight gradient, scipy.signal")
class DilationIgnoredInTheWeightGradient(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g, x, kernel_size, replace(geometry, dilation=(1, 1)))


@fault("input gradient, seven loops")
class StrideIgnoredInTheInputGradient(Taps):
    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g, w, input_size, replace(geometry, stride=(1, 1)))


@fault("input gradient, random layers")
class LastRowNotReached(Taps):
    """The input gradient where the windows end, if the stride leaves a remainder."""

    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        used = geometry.stride[0] * (g.shape[2] - 1) + geometry.dilation[0] * (w.shape[2] - 1) + 1
        if used < input_size[0]:
            dx[:, :, used - 1] = 0
        return dx


@fault("input gradient, random layers")
class RemainderNotZero(Taps):
    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        used = geometry.stride[1] * (g.shape[3] - 1) + geometry.dilation[1] * (w.shape[3] - 1) + 1
        dx[:, :, :, used:] = dx[:, :, :, used - 1 : used]
        return dx


@fault("output, random layers")
class PointwiseStrideIgnored(Taps):
    def forward(self, x, w, geometry):
        if w.shape[2:] != (1, 1):
            return super().forward(x, w, geometry)
        oh, ow = geometry.output_size(x.shape[2:], (1, 1))
        return super().forward(x[:, :, :oh, :ow], w, replace(geometry, stride=(1, 1)))


@fault("output, seven loops")
class KernelAsLargeAsTheInput(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        return y + x[:, :1, :1, :1] if x.shape[2:] == w.shape[2:] else y


@fault("output, random layers")
class LongKernels(Taps):
    """Unrolled by hand for up to six taps."""

    def forward(self, x, w, geometry):
        w = w.clone()
        w[:, :, 6:] = 0
        return super().forward(x, w, geometry)


@fault("output, random layers")
class StrideBeyondTheKernel(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        if geometry.stride[0] > w.shape[2] > 1:
            y[:, :, -1] = 0
        return y


# Groups.


@fault("output, seven loops")
class GroupsInReverse(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        return y.unflatten(1, (geometry.groups, -1)).flip(1).flatten(1, 2)


@fault("groups equal concatenation")
class GroupsInterleaved(Taps):
    """The order of a depthwise multiplier's outputs."""

    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        return y.unflatten(1, (geometry.groups, -1)).transpose(1, 2).flatten(1, 2)


@fault("input gradient, scipy.signal")
class GroupsMixedInTheInputGradient(Taps):
    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        return dx.unflatten(1, (geometry.groups, -1)).transpose(1, 2).flatten(1, 2)


@fault("weight gradient, small integers")
class GroupsShareAWeightGradient(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw.roll(1, 0) if geometry.groups > 2 else dw


@fault("output, small integers")
class ManyGroups(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        y[:, 64:] *= geometry.groups <= 64
        return y


# The batch.


@fault("weight gradient, seven loops")
class WeightGradientOfTheLastImage(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g[-1:], x[-1:], kernel_size, geometry)


@fault("a split batch equals the whole")
class WeightGradientAveraged(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g, x, kernel_size, geometry) / max(len(x), 1)


@fault("weight gradient, random layers")
class BatchOfOne(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw * 2 if len(x) == 1 else dw


@fault("a split batch equals the whole")
class ImagesInReverse(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w, geometry).flip(0)


@fault("empty batch")
class EmptyBatchIsAnError(Taps):
    def forward(self, x, w, geometry):
        return torch.cat(
            [super(EmptyBatchIsAnError, self).forward(i[None], w, geometry) for i in x]
        )


@fault("empty batch")
class EmptyBatchIsNotANumber(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw if len(x) else dw / len(x)


# Sizes.


@fault("output, random layers")
class OddHeights(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        if x.shape[2] % 2:
            y[:, :, -1] *= 2
        return y


@fault("output, small integers")
class MoreThan32Channels(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, torch.cat([w[:, :32], 0 * w[:, 32:]], 1), geometry)


@fault("weight gradient, small integers")
class MoreThan256Filters(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        dw[256:] = 0
        return dw


@fault("weight gradient, small integers")
class MoreThan64Images(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g[:64], x[:64], kernel_size, geometry)


@fault("input gradient, small integers")
class MoreThan128Columns(Taps):
    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        dx[..., 128:] = 0
        return dx


@fault("output, small integers")
class BlocksOf4096Windows(Taps):
    """The last block, if it isn't whole, is left out."""

    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        if y[:, 0].numel() > 4096:
            y[-1, :, -1, -1] = 0
        return y


# Precision.


@fault("output, float32")
class BFloat16Inside(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x.bfloat16().to(x.dtype), w.bfloat16().to(x.dtype), geometry)


@fault("weight gradient, float32")
class TensorFloat32Inside(Taps):
    """Ten bits of mantissa, as of float16, and the range of float32."""

    def grad_weight(self, g, x, kernel_size, geometry):
        if g.dtype == torch.float32:
            g = (g.view(torch.int32) & ~0x1FFF).view(torch.float32)
        return super().grad_weight(g, x, kernel_size, geometry)


@fault("output, small integers")
class Float16Sums(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w, geometry).half().to(x.dtype)


@fault("output, random layers")
class Float64InFloat32(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x.float(), w.float(), geometry).to(x.dtype)


@fault("output, random layers")
class AnswersInFloat32(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w, geometry).float()


@fault("linear in the input")
class Saturates(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x.clamp(-1000, 1000), w, geometry)


@fault("linear in the weight")
class LargeWeightsClipped(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w.clamp(-1000, 1000), geometry)


@fault("gradients linear in the output's")
class GradientsClipped(Taps):
    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g.clamp(-1000, 1000), w, input_size, geometry)


@fault("linear in the weight")
class SmallWeightsPruned(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w * (w.abs() > 1e-4), geometry)


# Derivatives that do not belong to the output.


@fault("adjoint identity, input")
class AnotherConvolutionsGradient(Taps):
    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g, w.roll(1, 2), input_size, geometry)


@fault("adjoint identity, weight")
class WeightGradientTwice(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        return 2 * super().grad_weight(g, x, kernel_size, geometry)


class ConstantGradient(torch.autograd.Function):
    """The identity, but its gradient has no derivative."""

    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, g):
        return g.detach()


@fault("second derivatives")
class WrongSecondDerivatives(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, ConstantGradient.apply(weight), bias)


class OnceDifferentiable(torch.autograd.Function):
    forward = ConstantGradient.forward
    backward = staticmethod(once_differentiable(lambda ctx, g: g))


@fault("second derivatives")
class NoSecondDerivatives(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(OnceDifferentiable.apply(input), weight, bias)


@fault("output, seven loops")
class BiasTwice(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, None if bias is None else 2 * bias)


@fault("bias gradient, random layers")
class BiasGradientAveraged(Sound):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, None)
        if bias is None:
            return y
        share = bias / max(y.numel() // len(bias), 1)
        return y + (share + (bias - share).detach())[:, None, None]


@fault("output, random layers")
class NoBiasWithoutABatch(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias if input.dim() == 4 else None)


@fault("output, random layers")
class BatchDimensionStays(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input if input.dim() == 4 else input[None], weight, bias)


@fault("bias gradient, small integers")
class BiasDoesNotLearn(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, None if bias is None else bias.detach())


# Padding.


class Pads(Sound):
    """Pads by itself, in a way that `padding` says."""

    def _conv_forward(self, input, weight, bias):
        x = self.padding_of(input)
        plain = Sound(1, 1, 1, stride=self.stride, dilation=self.dilation, groups=self.groups)
        plain.kernel_size = self.kernel_size
        return plain._conv_forward(x, weight, bias)

    def padding_of(self, x: torch.Tensor) -> torch.Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode)


@fault("output, seven loops")
class SameOnTheWrongSide(Pads):
    def padding_of(self, x):
        left, right, top, bottom = padding = self._reversed_padding_repeated_twice
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, (right, left, bottom, top) if self.padding == "same" else padding, mode)


@fault("output, seven loops")
class PaddingSwapped(Sound):
    def _conv_forward(self, input, weight, bias):
        layer = copy.copy(self)
        if not isinstance(self.padding, str):
            layer.padding = self.padding[::-1]
            left, right, top, bottom = self._reversed_padding_repeated_twice
            layer._reversed_padding_repeated_twice = [top, bottom, left, right]
        return Sound._conv_forward(layer, input, weight, bias)


@fault("output, scipy.signal")
class CircularTheOtherWay(Sound):
    def _conv_forward(self, input, weight, bias):
        if self.padding_mode == "circular":
            input = input.roll(1, -1)
        return super()._conv_forward(input, weight, bias)


class PadsInNumpy(Sound):
    """With numpy's mode in place of the right one."""

    mode, numpy_mode = "", ""

    def _conv_forward(self, input, weight, bias):
        if self.padding_mode != self.mode:
            return super()._conv_forward(input, weight, bias)
        left, right, top, bottom = self._reversed_padding_repeated_twice
        index = np.arange(input[..., :, :].shape[-2] * input.shape[-1]).reshape(input.shape[-2:])
        index = np.pad(index, ((top, bottom), (left, right)), self.numpy_mode)
        layer = copy.copy(self)
        layer.padding, layer.padding_mode = (0, 0), "zeros"
        x = input.flatten(-2)[..., torch.from_numpy(index.copy())]
        return Sound._conv_forward(layer, x, weight, bias)


@fault("output, seven loops")
class ReflectsTheBorderToo(PadsInNumpy):
    mode, numpy_mode = "reflect", "symmetric"


@fault("output, seven loops")
class ReplicatesByWrapping(PadsInNumpy):
    mode, numpy_mode = "replicate", "wrap"


@fault("input gradient, random layers")
class GradientNotFoldedBack(Sound):
    """The copies that circular padding makes pass on no gradient."""

    def _conv_forward(self, input, weight, bias):
        if self.padding_mode != "circular":
            return super()._conv_forward(input, weight, bias)
        left, right, top, bottom = self._reversed_padding_repeated_twice
        x = input if input.dim() == 4 else input[None]
        padded = F.pad(x, (left, right, top, bottom), "circular").detach()
        padded[:, :, top : top + x.shape[2], left : left + x.shape[3]] = 0
        layer = copy.copy(self)
        layer.padding, layer.padding_mode = (0, 0), "zeros"
        y = Sound._conv_forward(layer, padded + F.pad(x, (left, right, top, bottom)), weight, bias)
        return y if input.dim() == 4 else y[0]


@fault("output, random layers")
class PaddingIsNotZero(Sound):
    def _conv_forward(self, input, weight, bias):
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or not any(self.padding):
            return super()._conv_forward(input, weight, bias)
        height, width = self.padding
        layer = copy.copy(self)
        layer.padding = (0, 0)
        x = F.pad(input, (width, width, height, height), value=1e-6)
        return Sound._conv_forward(layer, x, weight, bias)


@fault("output, random layers")
class OutputSizeRoundedUp(Sound):
    def _conv_forward(self, input, weight, bias):
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        more = [
            -(size + 2 * p) % s
            for size, p, s in zip(input.shape[-2:], self.padding, self.stride, strict=True)
        ]
        return super()._conv_forward(F.pad(input, (0, more[1], 0, more[0])), weight, bias)


@fault("output, random layers")
class SmallInputsRefused(Sound):
    """Though the padding makes the kernel fit."""

    def _conv_forward(self, input, weight, bias):
        if input.shape[-1] < self.kernel_size[1]:
            raise RuntimeError("the kernel is larger than the input")
        return super()._conv_forward(input, weight, bias)


@fault("output, random layers")
class OnlyZeroPadding(Sound):
    def _conv_forward(self, input, weight, bias):
        if self.padding_mode != "zeros":
            raise NotImplementedError(self.padding_mode)
        return super()._conv_forward(input, weight, bias)


# Memory.


def in_one_piece(t: torch.Tensor) -> torch.Tensor:
    """As whoever ignores strides reads it."""
    size, strides = t.shape, torch.empty(t.shape, device="meta").stride()
    last = sum((n - 1) * s for n, s in zip(size, strides, strict=True)) if t.numel() else -1
    room = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    return t.as_strided(size, strides) if last < room else t.contiguous()


@fault("memory formats and strides")
class InputStridesIgnored(Taps):
    def forward(self, x, w, geometry):
        return super().forward(in_one_piece(x), w, geometry)


@fault("memory formats and strides")
class WeightStridesIgnored(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, in_one_piece(w), geometry)


@fault("memory formats and strides")
class GradientStridesIgnored(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(in_one_piece(g), x, kernel_size, geometry)


@fault("memory formats and strides")
class StorageOffsetIgnored(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x.as_strided(x.shape, x.stride(), 0), w, geometry)


@fault("memory formats and strides")
class ExpandedGradientIsANumber(Taps):
    """What .sum().backward() gives, summed up as one number too few times."""

    def grad_input(self, g, w, input_size, geometry):
        if g.stride() == (0, 0, 0, 0):
            g = torch.zeros_like(g).index_fill(0, torch.tensor([0]), 1) * g
        return super().grad_input(g, w, input_size, geometry)


@fault("nothing changed in place")
class InputChanged(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        x.data.mul_(1.5)
        return y


@fault("nothing changed in place")
class GradientChanged(Taps):
    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        g.data.zero_()
        return dx


@fault("nothing changed in place")
class WeightFlippedInPlace(Taps):
    """And not back: right the first time."""

    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        w.data.copy_(w.data.flip(2, 3))
        return dx


@fault("results in memory of their own")
class OutputInOneBuffer(Taps):
    buffer = torch.empty(100_000, dtype=torch.float64)

    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        return self.buffer[: y.numel()].view(y.shape).copy_(y)


@fault("results in memory of their own")
class WeightGradientInOneBuffer(Taps):
    buffer = torch.empty(100_000, dtype=torch.float64)

    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return self.buffer[: dw.numel()].view(dw.shape).copy_(dw)


# What was before.


class Remembering(Sound):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.memory: dict[Any, Any] = {}


@fault("nothing remembered")
class InputRememberedByItsShape(Remembering):
    def _conv_forward(self, input, weight, bias):
        input = self.memory.setdefault(input.shape, input)
        return super()._conv_forward(input, weight, bias)


@fault("nothing remembered")
class WeightRemembered(Remembering):
    """As an unrolled filter matrix, made at the first call."""

    def _conv_forward(self, input, weight, bias):
        values = self.memory.setdefault("weight", weight.detach().clone())
        return super()._conv_forward(input, weight + (values.to(weight) - weight).detach(), bias)


@fault("nothing remembered")
class WeightRememberedByItsVersion(Remembering):
    def _conv_forward(self, input, weight, bias):
        key = weight.data_ptr(), weight._version, weight.dtype
        values = self.memory.setdefault(key, weight.detach().clone())
        return super()._conv_forward(input, weight + (values - weight).detach(), bias)


@fault("nothing remembered")
class LastInputKept(Taps):
    """For the backward, whichever output's it is."""

    def forward(self, x, w, geometry):
        self.x = x
        return super().forward(x, w, geometry)

    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(
            g, self.x if self.x.shape == x.shape else x, kernel_size, geometry
        )


@fault("nothing remembered")
class FirstOutputSize(Remembering):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        height, width = self.memory.setdefault("size", y.shape[-2:])
        return y[..., :height, :width]


@fault("nothing remembered")
class GradientsPileUp(Taps):
    """The buffer of the weight gradient is never cleared."""

    def __init__(self):
        self.sums = {}

    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        key = tuple(dw.shape), x.shape
        self.sums[key] = self.sums.get(key, 0) + dw
        return self.sums[key].clone()


@fault("nothing remembered")
class InputNotSavedProperly(torch.nn.Conv2d):
    """Kept beside autograd, which so cannot see that it was changed."""

    def _conv_forward(self, input, weight, bias):
        y = Sound._conv_forward(self, input, weight.detach(), bias)
        if not weight.requires_grad:
            return y
        zeros = Unsaved.apply(input.detach(), weight, self)
        return y + zeros

    algorithm = Taps()


class Unsaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, layer):
        ctx.x, ctx.layer = x, layer
        ctx.save_for_backward(w)
        return torch.zeros_like(Sound._conv_forward(layer, x, w, None))

    @staticmethod
    def backward(ctx, g):
        (w,) = ctx.saved_tensors
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            y = Sound._conv_forward(ctx.layer, ctx.x, w, None)
        return None, torch.autograd.grad(y, w, g)[0], None


@fault("the same bits, called again")
class AnotherOrderEachTime(Sound):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y * (1 + 1e-15 * torch.randn_like(y))


@fault("the same bits, called again")
class EvaluationIsAnother(Sound):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y if self.training else y.float().to(y.dtype)


@fault("global state left alone")
class TakesRandomNumbers(Sound):
    def _conv_forward(self, input, weight, bias):
        torch.rand(1)
        return super()._conv_forward(input, weight, bias)


@fault("global state left alone")
class TakesNumpysRandomNumbers(Sound):
    def _conv_forward(self, input, weight, bias):
        np.random.rand()  # noqa: NPY002
        return super()._conv_forward(input, weight, bias)


@fault("global state left alone")
class TurnsGradientsOff(Sound):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        torch.set_grad_enabled(False)
        return y


# Gradients that somebody asked for, or nobody.


@fault("gradients only where asked for")
class FrozenWeightLearns(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight.requires_grad_(), bias)


@fault("gradients only where asked for")
class WrongIfTheWeightIsFrozen(Sound):
    def _conv_forward(self, input, weight, bias):
        if not weight.requires_grad and input.requires_grad:
            input = input + (input - input.detach())
        return super()._conv_forward(input, weight, bias)


@fault("gradients only where asked for")
class WrongInInference(Sound):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y if torch.is_grad_enabled() else y.float().to(y.dtype)


@fault("gradients only where asked for")
class AlwaysRequiresAGradient(Sound):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        return y if y.requires_grad or not torch.is_grad_enabled() else y.requires_grad_()


@fault("input gradient, random layers")
class NoInputGradient(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input.detach(), weight, bias)


# The module.


@fault("constructor and initial weights")
class OtherInitialisation(Sound):
    def reset_parameters(self):
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)


@fault("constructor and initial weights")
class InitialisedTwice(Sound):
    """The same weights, and later layers get others."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        torch.rand(1)


@fault("constructor and initial weights")
class KeywordsOnly(Sound):
    def __init__(self, in_channels, out_channels, kernel_size, **options):
        super().__init__(in_channels, out_channels, kernel_size, **options)


@fault("constructor and initial weights")
class AlwaysFloat32(Sound):
    def __init__(self, *args: Any, dtype: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)


@fault("constructor and initial weights")
class FrozenFromTheStart(Sound):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weight.requires_grad_(False)


@fault("output, random layers")
class CannotBeMade(Sound):
    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3)


@fault("output, random layers")
class Exits(Sound):
    def _conv_forward(self, input, weight, bias):
        raise SystemExit(0)


@fault("state_dict exchange with nn.Conv2d")
class MoreState(Sound):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("calls", torch.zeros(1))


@fault("state_dict exchange with nn.Conv2d")
class LoadsTransposed(Sound):
    def _load_from_state_dict(self, state_dict, prefix, *rest):
        key = f"{prefix}weight"
        state_dict[key] = state_dict[key].flip(2)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@fault("copies and pickles")
class NotPicklable(Remembering):
    def _conv_forward(self, input, weight, bias):
        self.memory["last"] = lambda: input
        return super()._conv_forward(input, weight, bias)


@fault("copies and pickles")
class CopiesShareTheirWeight(Sound):
    def __deepcopy__(self, memo):
        return copy.copy(self)


@fault("copies and pickles")
class KeepsItsGraph(Remembering):
    def _conv_forward(self, input, weight, bias):
        self.memory["y"] = super()._conv_forward(input, weight, bias)
        return self.memory["y"].clone()


# Errors.


@fault("errors that nn.Conv2d raises")
class CastsItsInput(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input.to(weight.dtype), weight, bias)


@fault("errors that nn.Conv2d raises")
class UnknownOptionsIgnored(Sound):
    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("strides", None)
        super().__init__(*args, **options)


@fault("errors that nn.Conv2d raises")
class OtherExceptions(Sound):
    def _conv_forward(self, input, weight, bias):
        if isinstance(input, torch.Tensor) and input.shape[-3:-2] not in ((self.in_channels,), ()):
            raise ValueError("wrong number of channels")
        return super()._conv_forward(input, weight, bias)


@fault("errors that nn.Conv2d raises")
class OneChannelIsRepeated(Sound):
    def _conv_forward(self, input, weight, bias):
        if isinstance(input, torch.Tensor) and input.dim() == 4 and input.shape[1] == 1:
            input = input.expand(-1, self.in_channels, -1, -1)
        return super()._conv_forward(input, weight, bias)


@fault("errors that nn.Conv2d raises")
class TooSmallInputsGiveNothing(Sound):
    def _conv_forward(self, input, weight, bias):
        if isinstance(input, torch.Tensor) and input.dim() == 4 and min(input.shape[2:]) == 2:
            return input.new_zeros(len(input), self.out_channels, 0, 0)
        return super()._conv_forward(input, weight, bias)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name):
    backend, line = FAULTS[name]
    report = verify(backend, short=True, only=line, cases=40)
    assert [found.name for found in report.lines] == [line]
    assert not report.passed
    (found,) = report.lines
    assert found.failed > 0
    assert found.error > found.budget
    assert found.failure.startswith(f"{name}(")
