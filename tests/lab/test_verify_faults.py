"""Wrong numbers, fault by fault, and the check that catches them. The short form has to do."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted import Faults, Sound, Taps
from torch.autograd.function import once_differentiable

from cnntrain.lab.verify import verify


def test_the_sound_backend_passes():
    report = verify(Sound, short=True, cases=40)
    assert report.passed, [line.failure for line in report.lines if not line.passed]
    assert len(report.lines) == 60
    assert all(line.cases for line in report.lines)


faults = Faults()


# Wrong pixels meet wrong weights.


@faults.caught_by("output, seven loops")
class FlippedKernel(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w.flip(2, 3), geometry)

    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g, w.flip(2, 3), input_size, geometry)

    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g, x, kernel_size, geometry).flip(2, 3)


@faults.caught_by("input gradient, seven loops")
class FlippedInTheInputGradient(Taps):
    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g, w.flip(2, 3), input_size, geometry)


@faults.caught_by("output, random layers")
class SquareKernelsTransposed(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w.mT if w.shape[2] == w.shape[3] else w, geometry)


@faults.caught_by("weight gradient, random layers")
class WeightGradientTransposed(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw.mT.reshape(dw.shape)


@faults.caught_by("output, seven loops")
class StrideSwapped(Taps):
    def forward(self, x, w, geometry):
        geometry = replace(geometry, stride=geometry.stride[::-1])
        return super().forward(x, w, geometry)


@faults.caught_by("output, scipy.signal")
class DilationSwapped(Taps):
    def forward(self, x, w, geometry):
        wrong = replace(geometry, dilation=geometry.dilation[::-1])
        y = super().forward(F.pad(x, (0, 9, 0, 9)), w, wrong)
        oh, ow = geometry.output_size(x.shape[2:], w.shape[2:])
        return y[:, :, :oh, :ow]


@faults.caught_by("output, scipy.signal")
class DilationIgnored(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, replace(geometry, dilation=(1, 1)))
        oh, ow = geometry.output_size(x.shape[2:], w.shape[2:])
        return y[:, :, :oh, :ow]


@faults.caught_by("weight gradient, scipy.signal")
class DilationIgnoredInTheWeightGradient(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g, x, kernel_size, replace(geometry, dilation=(1, 1)))


@faults.caught_by("input gradient, seven loops")
class StrideIgnoredInTheInputGradient(Taps):
    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g, w, input_size, replace(geometry, stride=(1, 1)))


@faults.caught_by("input gradient, random layers")
class LastRowNotReached(Taps):
    """The input gradient where the windows end, if the stride leaves a remainder."""

    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        used = geometry.stride[0] * (g.shape[2] - 1) + geometry.dilation[0] * (w.shape[2] - 1) + 1
        if used < input_size[0]:
            dx[:, :, used - 1] = 0
        return dx


@faults.caught_by("input gradient, random layers")
class RemainderNotZero(Taps):
    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        used = geometry.stride[1] * (g.shape[3] - 1) + geometry.dilation[1] * (w.shape[3] - 1) + 1
        dx[:, :, :, used:] = dx[:, :, :, used - 1 : used]
        return dx


@faults.caught_by("output, random layers")
class PointwiseStrideIgnored(Taps):
    def forward(self, x, w, geometry):
        if w.shape[2:] != (1, 1):
            return super().forward(x, w, geometry)
        oh, ow = geometry.output_size(x.shape[2:], (1, 1))
        return super().forward(x[:, :, :oh, :ow], w, replace(geometry, stride=(1, 1)))


@faults.caught_by("output, seven loops")
class KernelAsLargeAsTheInput(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        return y + x[:, :1, :1, :1] if x.shape[2:] == w.shape[2:] else y


@faults.caught_by("output, random layers")
class LongKernels(Taps):
    """Unrolled by hand for up to six taps."""

    def forward(self, x, w, geometry):
        w = w.clone()
        w[:, :, 6:] = 0
        return super().forward(x, w, geometry)


@faults.caught_by("output, random layers")
class StrideBeyondTheKernel(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        if geometry.stride[0] > w.shape[2] > 1:
            y[:, :, -1] = 0
        return y


# Groups.


@faults.caught_by("output, seven loops")
class GroupsInReverse(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        return y.unflatten(1, (geometry.groups, -1)).flip(1).flatten(1, 2)


@faults.caught_by("output, random layers")
class GroupsInterleaved(Taps):
    """The order of a depthwise multiplier's outputs."""

    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        return y.unflatten(1, (geometry.groups, -1)).transpose(1, 2).flatten(1, 2)


@faults.caught_by("input gradient, scipy.signal")
class GroupsMixedInTheInputGradient(Taps):
    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        return dx.unflatten(1, (geometry.groups, -1)).transpose(1, 2).flatten(1, 2)


@faults.caught_by("weight gradient, small integers")
class GroupsShareAWeightGradient(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw.roll(1, 0) if geometry.groups > 2 else dw


@faults.caught_by("output, sizes")
class ManyGroups(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        y[:, 64:] *= geometry.groups <= 64
        return y


# The batch.


@faults.caught_by("weight gradient, seven loops")
class WeightGradientOfTheLastImage(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g[-1:], x[-1:], kernel_size, geometry)


@faults.caught_by("weight gradient, small integers")
class WeightGradientAveraged(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g, x, kernel_size, geometry) / max(len(x), 1)


@faults.caught_by("weight gradient, random layers")
class BatchOfOne(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw * 2 if len(x) == 1 else dw


@faults.caught_by("output, small integers")
class ImagesInReverse(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w, geometry).flip(0)


@faults.caught_by("empty batch")
class EmptyBatchIsAnError(Taps):
    def forward(self, x, w, geometry):
        return torch.cat(
            [super(EmptyBatchIsAnError, self).forward(i[None], w, geometry) for i in x]
        )


@faults.caught_by("empty batch")
class EmptyBatchIsNotANumber(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw if len(x) else dw / len(x)


# Sizes.


@faults.caught_by("output, random layers")
class OddHeights(Taps):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        if x.shape[2] % 2:
            y[:, :, -1] *= 2
        return y


@faults.caught_by("output, sizes")
class MoreThan32Channels(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, torch.cat([w[:, :32], 0 * w[:, 32:]], 1), geometry)


@faults.caught_by("weight gradient, sizes")
class MoreThan256Filters(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        dw[256:] = 0
        return dw


@faults.caught_by("weight gradient, sizes")
class MoreThan64Images(Taps):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g[:64], x[:64], kernel_size, geometry)


@faults.caught_by("input gradient, sizes")
class MoreThan128Columns(Taps):
    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        dx[..., 128:] = 0
        return dx


@faults.caught_by("output, sizes")
class BlocksOf4096Windows(Taps):
    """The last block, if it isn't whole, is left out."""

    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        if y[:, 0].numel() > 4096:
            y[-1, :, -1, -1] = 0
        return y


# Precision.


@faults.caught_by("output, float32")
class BFloat16Inside(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x.bfloat16().to(x.dtype), w.bfloat16().to(x.dtype), geometry)


@faults.caught_by("weight gradient, float32")
class TensorFloat32Inside(Taps):
    """Ten bits of mantissa, as of float16, and the range of float32."""

    def grad_weight(self, g, x, kernel_size, geometry):
        if g.dtype == torch.float32:
            g = (g.view(torch.int32) & ~0x1FFF).view(torch.float32)
        return super().grad_weight(g, x, kernel_size, geometry)


@faults.caught_by("output, bfloat16")
class NoBFloat16(Taps):
    def forward(self, x, w, geometry):
        if x.dtype == torch.bfloat16:
            raise NotImplementedError
        return super().forward(x, w, geometry)


@faults.caught_by("weight gradient, float16")
class OverflowsInFloat16(Taps):
    """Scaled up for the sake of small numbers."""

    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g * 1024, x, kernel_size, geometry) / 1024


@faults.caught_by("output, small integers")
class Float16Sums(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w, geometry).half().to(x.dtype)


@faults.caught_by("output, random layers")
class Float64InFloat32(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x.float(), w.float(), geometry).to(x.dtype)


@faults.caught_by("output, random layers")
class AnswersInFloat32(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w, geometry).float()


@faults.caught_by("output, large and small numbers")
class Saturates(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x.clamp(-1000, 1000), w, geometry)


@faults.caught_by("output, large and small numbers")
class LargeWeightsClipped(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w.clamp(-1000, 1000), geometry)


@faults.caught_by("input gradient, large and small numbers")
class GradientsClipped(Taps):
    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g.clamp(-1000, 1000), w, input_size, geometry)


@faults.caught_by("output, large and small numbers")
class SmallWeightsPruned(Taps):
    def forward(self, x, w, geometry):
        return super().forward(x, w * (w.abs() > 1e-4), geometry)


# Derivatives that do not belong to the output.


@faults.caught_by("input gradient, random layers")
class AnotherConvolutionsGradient(Taps):
    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g, w.roll(1, 2), input_size, geometry)


@faults.caught_by("weight gradient, random layers")
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


@faults.caught_by("second derivatives")
class WrongSecondDerivatives(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, ConstantGradient.apply(weight), bias)


class OnceDifferentiable(torch.autograd.Function):
    forward = ConstantGradient.forward
    backward = staticmethod(once_differentiable(lambda ctx, g: g))


@faults.caught_by("second derivatives")
class NoSecondDerivatives(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(OnceDifferentiable.apply(input), weight, bias)


@faults.caught_by("output, seven loops")
class BiasTwice(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, None if bias is None else 2 * bias)


@faults.caught_by("bias gradient, random layers")
class BiasGradientAveraged(Sound):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, None)
        if bias is None:
            return y
        share = bias / max(y.numel() // len(bias), 1)
        return y + (share + (bias - share).detach())[:, None, None]


@faults.caught_by("output, random layers")
class NoBiasWithoutABatch(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias if input.dim() == 4 else None)


@faults.caught_by("output, random layers")
class BatchDimensionStays(Sound):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input if input.dim() == 4 else input[None], weight, bias)


@faults.caught_by("bias gradient, small integers")
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


@faults.caught_by("output, seven loops")
class SameOnTheWrongSide(Pads):
    def padding_of(self, x):
        left, right, top, bottom = padding = self._reversed_padding_repeated_twice
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, (right, left, bottom, top) if self.padding == "same" else padding, mode)


@faults.caught_by("output, seven loops")
class PaddingSwapped(Sound):
    def _conv_forward(self, input, weight, bias):
        layer = copy.copy(self)
        if not isinstance(self.padding, str):
            layer.padding = self.padding[::-1]
            left, right, top, bottom = self._reversed_padding_repeated_twice
            layer._reversed_padding_repeated_twice = [top, bottom, left, right]
        return Sound._conv_forward(layer, input, weight, bias)


@faults.caught_by("output, scipy.signal")
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


@faults.caught_by("output, seven loops")
class ReflectsTheBorderToo(PadsInNumpy):
    mode, numpy_mode = "reflect", "symmetric"


@faults.caught_by("output, seven loops")
class ReplicatesByWrapping(PadsInNumpy):
    mode, numpy_mode = "replicate", "wrap"


@faults.caught_by("input gradient, random layers")
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


@faults.caught_by("output, random layers")
class PaddingIsNotZero(Sound):
    def _conv_forward(self, input, weight, bias):
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or not any(self.padding):
            return super()._conv_forward(input, weight, bias)
        height, width = self.padding
        layer = copy.copy(self)
        layer.padding = (0, 0)
        x = F.pad(input, (width, width, height, height), value=1e-6)
        return Sound._conv_forward(layer, x, weight, bias)


@faults.caught_by("output, random layers")
class OutputSizeRoundedUp(Sound):
    def _conv_forward(self, input, weight, bias):
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        more = [
            -(size + 2 * p) % s
            for size, p, s in zip(input.shape[-2:], self.padding, self.stride, strict=True)
        ]
        return super()._conv_forward(F.pad(input, (0, more[1], 0, more[0])), weight, bias)


@faults.caught_by("output, random layers")
class SmallInputsRefused(Sound):
    """Though the padding makes the kernel fit."""

    def _conv_forward(self, input, weight, bias):
        if input.shape[-1] < self.kernel_size[1]:
            raise RuntimeError("the kernel is larger than the input")
        return super()._conv_forward(input, weight, bias)


@faults.caught_by("output, random layers")
class OnlyZeroPadding(Sound):
    def _conv_forward(self, input, weight, bias):
        if self.padding_mode != "zeros":
            raise NotImplementedError(self.padding_mode)
        return super()._conv_forward(input, weight, bias)


@pytest.mark.parametrize("name", faults)
def test_fault_is_caught(name):
    faults.check(name)
