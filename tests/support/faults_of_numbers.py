"""Faults of numbers: wrong outputs and gradients, each with the line that reports it."""

import copy
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from faults import Correct, Faults, KernelPositions
from torch.autograd.function import once_differentiable

faults = Faults()


# Wrong pixels meet wrong weights.


@faults.caught_by("output, reference loops")
class FlippedKernel(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x, w.flip(2, 3), geometry)

    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g, w.flip(2, 3), input_size, geometry)

    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g, x, kernel_size, geometry).flip(2, 3)


@faults.caught_by("input gradient, reference loops")
class FlippedInTheInputGradient(KernelPositions):
    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g, w.flip(2, 3), input_size, geometry)


@faults.caught_by("output, random layers")
class SquareKernelsTransposed(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x, w.mT if w.shape[2] == w.shape[3] else w, geometry)


@faults.caught_by("weight gradient, random layers")
class WeightGradientTransposed(KernelPositions):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw.mT.reshape(dw.shape)


@faults.caught_by("output, reference loops")
class StrideSwapped(KernelPositions):
    def forward(self, x, w, geometry):
        geometry = replace(geometry, stride=geometry.stride[::-1])
        return super().forward(x, w, geometry)


@faults.caught_by("output, scipy.signal")
class DilationSwapped(KernelPositions):
    def forward(self, x, w, geometry):
        wrong = replace(geometry, dilation=geometry.dilation[::-1])
        y = super().forward(F.pad(x, (0, 9, 0, 9)), w, wrong)
        oh, ow = geometry.output_size(x.shape[2:], w.shape[2:])
        return y[:, :, :oh, :ow]


@faults.caught_by("output, scipy.signal")
class DilationIgnored(KernelPositions):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, replace(geometry, dilation=(1, 1)))
        oh, ow = geometry.output_size(x.shape[2:], w.shape[2:])
        return y[:, :, :oh, :ow]


@faults.caught_by("weight gradient, scipy.signal")
class DilationIgnoredInTheWeightGradient(KernelPositions):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g, x, kernel_size, replace(geometry, dilation=(1, 1)))


@faults.caught_by("input gradient, reference loops")
class StrideIgnoredInTheInputGradient(KernelPositions):
    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g, w, input_size, replace(geometry, stride=(1, 1)))


@faults.caught_by("input gradient, random layers")
class LastRowNotReached(KernelPositions):
    """The input gradient where the windows end, if the stride leaves a remainder."""

    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        used = geometry.stride[0] * (g.shape[2] - 1) + geometry.dilation[0] * (w.shape[2] - 1) + 1
        if used < input_size[0]:
            dx[:, :, used - 1] = 0
        return dx


@faults.caught_by("input gradient, random layers")
class RemainderNotZero(KernelPositions):
    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        used = geometry.stride[1] * (g.shape[3] - 1) + geometry.dilation[1] * (w.shape[3] - 1) + 1
        dx[:, :, :, used:] = dx[:, :, :, used - 1 : used]
        return dx


@faults.caught_by("output, random layers")
class PointwiseStrideIgnored(KernelPositions):
    def forward(self, x, w, geometry):
        if w.shape[2:] != (1, 1):
            return super().forward(x, w, geometry)
        oh, ow = geometry.output_size(x.shape[2:], (1, 1))
        return super().forward(x[:, :, :oh, :ow], w, replace(geometry, stride=(1, 1)))


@faults.caught_by("output, reference loops")
class KernelAsLargeAsTheInput(KernelPositions):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        return y + x[:, :1, :1, :1] if x.shape[2:] == w.shape[2:] else y


@faults.caught_by("output, random layers")
class LongKernels(KernelPositions):
    """Unrolled by hand for up to six kernel_positions."""

    def forward(self, x, w, geometry):
        w = w.clone()
        w[:, :, 6:] = 0
        return super().forward(x, w, geometry)


@faults.caught_by("output, random layers")
class StrideBeyondTheKernel(KernelPositions):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        if geometry.stride[0] > w.shape[2] > 1:
            y[:, :, -1] = 0
        return y


# Groups.


@faults.caught_by("output, reference loops")
class GroupsInReverse(KernelPositions):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        return y.unflatten(1, (geometry.groups, -1)).flip(1).flatten(1, 2)


@faults.caught_by("output, random layers")
class GroupsInterleaved(KernelPositions):
    """The order of a depthwise multiplier's outputs."""

    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        return y.unflatten(1, (geometry.groups, -1)).transpose(1, 2).flatten(1, 2)


@faults.caught_by("input gradient, scipy.signal")
class GroupsMixedInTheInputGradient(KernelPositions):
    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        return dx.unflatten(1, (geometry.groups, -1)).transpose(1, 2).flatten(1, 2)


@faults.caught_by("weight gradient, small integers")
class GroupsShareAWeightGradient(KernelPositions):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw.roll(1, 0) if geometry.groups > 2 else dw


@faults.caught_by("output, sizes")
class ManyGroups(KernelPositions):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        y[:, 64:] *= geometry.groups <= 64
        return y


# The batch.


@faults.caught_by("weight gradient, reference loops")
class WeightGradientOfTheLastImage(KernelPositions):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g[-1:], x[-1:], kernel_size, geometry)


@faults.caught_by("weight gradient, small integers")
class WeightGradientAveraged(KernelPositions):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g, x, kernel_size, geometry) / max(len(x), 1)


@faults.caught_by("weight gradient, random layers")
class BatchOfOne(KernelPositions):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw * 2 if len(x) == 1 else dw


@faults.caught_by("output, small integers")
class ImagesInReverse(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x, w, geometry).flip(0)


@faults.caught_by("empty batch")
class EmptyBatchIsAnError(KernelPositions):
    def forward(self, x, w, geometry):
        return torch.cat(
            [super(EmptyBatchIsAnError, self).forward(i[None], w, geometry) for i in x]
        )


@faults.caught_by("empty batch")
class EmptyBatchIsNotANumber(KernelPositions):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        return dw if len(x) else dw / len(x)


# Sizes.


@faults.caught_by("output, random layers")
class OddHeights(KernelPositions):
    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        if x.shape[2] % 2:
            y[:, :, -1] *= 2
        return y


@faults.caught_by("output, sizes")
class MoreThan32Channels(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x, torch.cat([w[:, :32], 0 * w[:, 32:]], 1), geometry)


@faults.caught_by("weight gradient, sizes")
class MoreThan256Filters(KernelPositions):
    def grad_weight(self, g, x, kernel_size, geometry):
        dw = super().grad_weight(g, x, kernel_size, geometry)
        dw[256:] = 0
        return dw


@faults.caught_by("weight gradient, sizes")
class MoreThan64Images(KernelPositions):
    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g[:64], x[:64], kernel_size, geometry)


@faults.caught_by("input gradient, sizes")
class MoreThan128Columns(KernelPositions):
    def grad_input(self, g, w, input_size, geometry):
        dx = super().grad_input(g, w, input_size, geometry)
        dx[..., 128:] = 0
        return dx


@faults.caught_by("output, sizes")
class BlocksOf4096Windows(KernelPositions):
    """The last block, if it isn't whole, is left out."""

    def forward(self, x, w, geometry):
        y = super().forward(x, w, geometry)
        if y[:, 0].numel() > 4096:
            y[-1, :, -1, -1] = 0
        return y


# Precision.


@faults.caught_by("output, float32")
class BFloat16Inside(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x.bfloat16().to(x.dtype), w.bfloat16().to(x.dtype), geometry)


@faults.caught_by("weight gradient, float32")
class TensorFloat32Inside(KernelPositions):
    """Ten bits of mantissa, as of float16, and the range of float32."""

    def grad_weight(self, g, x, kernel_size, geometry):
        if g.dtype == torch.float32:
            g = (g.view(torch.int32) & ~0x1FFF).view(torch.float32)
        return super().grad_weight(g, x, kernel_size, geometry)


@faults.caught_by("output, bfloat16")
class NoBFloat16(KernelPositions):
    def forward(self, x, w, geometry):
        if x.dtype == torch.bfloat16:
            raise NotImplementedError
        return super().forward(x, w, geometry)


@faults.caught_by("weight gradient, float16")
class OverflowsInFloat16(KernelPositions):
    """Scaled up against underflow; large sums overflow."""

    def grad_weight(self, g, x, kernel_size, geometry):
        return super().grad_weight(g * 1024, x, kernel_size, geometry) / 1024


@faults.caught_by("output, small integers")
class Float16Sums(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x, w, geometry).half().to(x.dtype)


@faults.caught_by("output, random layers")
class Float64InFloat32(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x.float(), w.float(), geometry).to(x.dtype)


@faults.caught_by("output, random layers")
class AnswersInFloat32(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x, w, geometry).float()


@faults.caught_by("output, large and small numbers")
class Saturates(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x.clamp(-1000, 1000), w, geometry)


@faults.caught_by("output, large and small numbers")
class LargeWeightsClipped(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x, w.clamp(-1000, 1000), geometry)


@faults.caught_by("input gradient, large and small numbers")
class GradientsClipped(KernelPositions):
    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g.clamp(-1000, 1000), w, input_size, geometry)


@faults.caught_by("output, large and small numbers")
class SmallWeightsPruned(KernelPositions):
    def forward(self, x, w, geometry):
        return super().forward(x, w * (w.abs() > 1e-4), geometry)


# Derivatives that do not belong to the output.


@faults.caught_by("input gradient, random layers")
class AnotherConvolutionsGradient(KernelPositions):
    def grad_input(self, g, w, input_size, geometry):
        return super().grad_input(g, w.roll(1, 2), input_size, geometry)


@faults.caught_by("weight gradient, random layers")
class WeightGradientTwice(KernelPositions):
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
class WrongSecondDerivatives(Correct):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, ConstantGradient.apply(weight), bias)


class OnceDifferentiable(torch.autograd.Function):
    forward = ConstantGradient.forward
    backward = staticmethod(once_differentiable(lambda ctx, g: g))


@faults.caught_by("second derivatives")
class NoSecondDerivatives(Correct):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(OnceDifferentiable.apply(input), weight, bias)


@faults.caught_by("output, reference loops")
class BiasTwice(Correct):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, None if bias is None else 2 * bias)


@faults.caught_by("bias gradient, random layers")
class BiasGradientAveraged(Correct):
    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, None)
        if bias is None:
            return y
        share = bias / max(y.numel() // len(bias), 1)
        return y + (share + (bias - share).detach())[:, None, None]


@faults.caught_by("output, random layers")
class NoBiasWithoutABatch(Correct):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias if input.dim() == 4 else None)


@faults.caught_by("output, random layers")
class BatchDimensionStays(Correct):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input if input.dim() == 4 else input[None], weight, bias)


@faults.caught_by("bias gradient, small integers")
class BiasDoesNotLearn(Correct):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, None if bias is None else bias.detach())


# Padding.


class Pads(Correct):
    """Pads by its method `padding_of`."""

    def _conv_forward(self, input, weight, bias):
        x = self.padding_of(input)
        plain = Correct(1, 1, 1, stride=self.stride, dilation=self.dilation, groups=self.groups)
        plain.kernel_size = self.kernel_size
        return plain._conv_forward(x, weight, bias)

    def padding_of(self, x: torch.Tensor) -> torch.Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode)


@faults.caught_by("output, reference loops")
class SameOnTheWrongSide(Pads):
    def padding_of(self, x):
        left, right, top, bottom = padding = self._reversed_padding_repeated_twice
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, (right, left, bottom, top) if self.padding == "same" else padding, mode)


@faults.caught_by("output, reference loops")
class PaddingSwapped(Correct):
    def _conv_forward(self, input, weight, bias):
        layer = copy.copy(self)
        if not isinstance(self.padding, str):
            layer.padding = self.padding[::-1]
            left, right, top, bottom = self._reversed_padding_repeated_twice
            layer._reversed_padding_repeated_twice = [top, bottom, left, right]
        return Correct._conv_forward(layer, input, weight, bias)


@faults.caught_by("output, scipy.signal")
class CircularTheOtherWay(Correct):
    def _conv_forward(self, input, weight, bias):
        if self.padding_mode == "circular":
            input = input.roll(1, -1)
        return super()._conv_forward(input, weight, bias)


class PadsInNumpy(Correct):
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
        return Correct._conv_forward(layer, x, weight, bias)


@faults.caught_by("output, reference loops")
class ReflectsTheBorderToo(PadsInNumpy):
    mode, numpy_mode = "reflect", "symmetric"


@faults.caught_by("output, reference loops")
class ReplicatesByWrapping(PadsInNumpy):
    mode, numpy_mode = "replicate", "wrap"


@faults.caught_by("input gradient, random layers")
class GradientNotFoldedBack(Correct):
    """The copies made by circular padding have no gradient."""

    def _conv_forward(self, input, weight, bias):
        if self.padding_mode != "circular":
            return super()._conv_forward(input, weight, bias)
        left, right, top, bottom = self._reversed_padding_repeated_twice
        x = input if input.dim() == 4 else input[None]
        padded = F.pad(x, (left, right, top, bottom), "circular").detach()
        padded[:, :, top : top + x.shape[2], left : left + x.shape[3]] = 0
        layer = copy.copy(self)
        layer.padding, layer.padding_mode = (0, 0), "zeros"
        y = Correct._conv_forward(
            layer, padded + F.pad(x, (left, right, top, bottom)), weight, bias
        )
        return y if input.dim() == 4 else y[0]


@faults.caught_by("output, random layers")
class PaddingIsNotZero(Correct):
    def _conv_forward(self, input, weight, bias):
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or not any(self.padding):
            return super()._conv_forward(input, weight, bias)
        height, width = self.padding
        layer = copy.copy(self)
        layer.padding = (0, 0)
        x = F.pad(input, (width, width, height, height), value=1e-6)
        return Correct._conv_forward(layer, x, weight, bias)


@faults.caught_by("output, random layers")
class OutputSizeRoundedUp(Correct):
    def _conv_forward(self, input, weight, bias):
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        more = [
            -(size + 2 * p) % s
            for size, p, s in zip(input.shape[-2:], self.padding, self.stride, strict=True)
        ]
        return super()._conv_forward(F.pad(input, (0, more[1], 0, more[0])), weight, bias)


@faults.caught_by("output, random layers")
class SmallInputsRejected(Correct):
    """Ignores the padding, with which the kernel fits."""

    def _conv_forward(self, input, weight, bias):
        if input.shape[-1] < self.kernel_size[1]:
            raise RuntimeError("the kernel is larger than the input")
        return super()._conv_forward(input, weight, bias)


@faults.caught_by("output, random layers")
class OnlyZeroPadding(Correct):
    def _conv_forward(self, input, weight, bias):
        if self.padding_mode != "zeros":
            raise NotImplementedError(self.padding_mode)
        return super()._conv_forward(input, weight, bias)
