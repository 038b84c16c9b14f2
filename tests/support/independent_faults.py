# ruff: noqa: B905, E501, E731, RUF012, RUF059
"""Faults written without knowledge of the checks, only of the list of kinds (`faults.LINES`).

Each class is nn.Conv2d except for one fault, named in its docstring."""

import math
import threading
import time
import weakref

import torch
import torch.nn.functional as F
from faults import LINES, Faults
from torch import nn

faults = Faults()


def fault(kind):
    return faults.caught_by(*LINES[kind])


# ---------------------------------------------------------------- helpers

HALVES = (torch.float16, torch.bfloat16)
_SIDE = weakref.WeakKeyDictionary()  # state beside the module: not copied, not pickled


def side(module):
    return _SIDE.setdefault(module, {})


def wrapped(*tensors):
    """Inside vmap, torch.func.grad or forward-mode differentiation."""
    return torch.autograd.forward_ad._current_level >= 0 or any(
        torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors
    )


class _Grad(torch.autograd.Function):
    """Identity whose backward goes through fn (for inputs, weights, biases)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, fn):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.fn = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return ctx.fn(g), None

    @staticmethod
    def jvp(ctx, t, _):
        return t.view_as(t)


class _Tap(_Grad):
    """The same for outputs: a fresh tensor, which may be changed in place."""

    @staticmethod
    def forward(x, fn):
        return x.clone()

    @staticmethod
    def jvp(ctx, t, _):
        return t.clone()


class _Round(torch.autograd.Function):
    """fn in the forward, identity in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, fn):
        return fn(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g, None

    @staticmethod
    def jvp(ctx, t, _):
        return t.clone()


class _Conv(torch.autograd.Function):
    """A convolution whose input gradient uses wb(w) and weight gradient xb(x)."""

    @staticmethod
    def forward(ctx, x, w, b, geometry, wb, xb):
        ctx.geometry, ctx.wb, ctx.xb, ctx.has_bias = geometry, wb, xb, b is not None
        ctx.save_for_backward(x, w)
        return torch.conv2d(x, w, b, *geometry)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        s, p, d, groups = ctx.geometry
        back = lambda x, w, mask: torch.ops.aten.convolution_backward(
            g, x, w, None, s, p, d, False, [0, 0], groups, mask
        )
        gx = gw = gb = None
        if ctx.needs_input_grad[0]:
            gx = back(x, ctx.wb(w) if ctx.wb else w, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            gw = back(ctx.xb(x) if ctx.xb else x, w, [False, True, False])[1]
        if ctx.has_bias and ctx.needs_input_grad[2]:
            gb = g.sum((0, 2, 3))
        return gx, gw, gb, None, None, None


def on_grad(x, fn):
    return _Grad.apply(x, fn)


class _Base(nn.Conv2d):
    def plain(self, x):
        """Eager, batched, one dtype, no autocast."""
        return (
            x.dim() == 4
            and x.dtype == self.weight.dtype
            and not wrapped(x, self.weight)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def conv(self, x, w, b):
        return self._conv_forward(x, w, b)

    def custom(self, x, wb=None, xb=None):
        pad = self.padding
        if self.padding_mode != "zeros" or isinstance(pad, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, pad = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        return _Conv.apply(
            x, self.weight, self.bias, (self.stride, pad, self.dilation, self.groups), wb, xb
        )


# ---------------------------------------------------------------- 1: sizes


@fault(1)
class BatchTailWeightGrad(_Base):
    """Batches above 32 that 32 does not divide: the weight gradient misses the tail images."""

    def forward(self, input):
        n = input.shape[0] // 32 * 32
        if input.dim() != 4 or n == 0 or n == input.shape[0]:
            return super().forward(input)
        return torch.cat(
            [
                self.conv(input[:n], self.weight, self.bias),
                self.conv(input[n:], self.weight.detach(), self.bias),
            ]
        )


@fault(1)
class WideRowTail(_Base):
    """Outputs wider than 64 that 4 does not divide: the tail columns miss the kernel's first column."""

    def forward(self, input):
        y = super().forward(input)
        width = y.shape[-1]
        m = width // 4 * 4
        if width <= 64 or m == width or self.weight.shape[-1] == 1:
            return y
        w = torch.cat([torch.zeros_like(self.weight[..., :1]), self.weight[..., 1:]], -1)
        return torch.cat([y[..., :m], self.conv(input, w, self.bias)[..., m:]], -1)


@fault(1)
class ColumnChunksInputGrad(_Base):
    """im2col columns above 64 MB, done in chunks of images: each chunk's input gradient goes to the first images."""

    def forward(self, input):
        y = super().forward(input)
        if input.dim() != 4:
            return y
        kh, kw = self.kernel_size
        image = self.in_channels * kh * kw * y.shape[-1] * y.shape[-2] * input.element_size()
        step, n = max(1, (64 << 20) // max(1, image)), input.shape[0]
        if step >= n:
            return y

        def last_wins(g):
            last = g[(n - 1) // step * step :]
            return torch.cat([last, g[len(last) : step], torch.zeros_like(g[step:])])

        return super().forward(on_grad(input, last_wins))


@fault(1)
class DepthMultiplierPairs(_Base):
    """Depthwise with an odd channel multiplier above 1: outputs are taken in pairs, and the odd one gives no input gradient."""

    def forward(self, input):
        mult = self.out_channels // self.in_channels
        if self.groups != self.in_channels or self.groups == 1 or mult == 1 or mult % 2 == 0:
            return super().forward(input)
        odd = torch.arange(self.out_channels, device=input.device) % mult == mult - 1
        return torch.where(
            odd[:, None, None],
            self.conv(input.detach(), self.weight, self.bias),
            super().forward(input),
        )


@fault(1)
class LongKernelStrided(_Base):
    """Kernels of more than 8 rows, with stride: 8 kernel_positions are unrolled, and the others' weight gradient stays zero."""

    def forward(self, input):
        if self.kernel_size[0] <= 8 or self.stride[0] == 1:
            return super().forward(input)
        w = on_grad(
            self.weight, lambda g: torch.cat([g[:, :, :8], torch.zeros_like(g[:, :, 8:])], 2)
        )
        return self.conv(input, w, self.bias)


# ---------------------------------------------------------------- 2: stale weights


@fault(2)
class EvalTransformByVersion(_Base):
    """3x3, stride 1, eval without gradients: the transformed weight is kept by address and version, so `.data` writes are not seen."""

    def forward(self, input):
        w = self.weight
        if (
            self.training
            or torch.is_grad_enabled()
            or self.kernel_size != (3, 3)
            or self.stride != (1, 1)
            or w.is_inference()
            or wrapped(input, w)
        ):
            return super().forward(input)
        key, kept = (w.data_ptr(), w._version, w.dtype, w.shape), side(self)
        if kept.get("key") != key:
            kept.update(key=key, w=w.detach().clone())
        return self.conv(input, kept["w"], self.bias)


@fault(2)
class PointwiseViewKept(_Base):
    """1x1 without gradients: the first call's view of the weight is used on, so a replaced weight (assign=True, .data =, functional_call) is not seen."""

    def forward(self, input):
        w = self.weight
        if torch.is_grad_enabled() or self.kernel_size != (1, 1) or wrapped(input, w):
            return super().forward(input)
        view = side(self).setdefault("view", w.detach())
        if (view.dtype, view.device) != (w.dtype, w.device):
            view = side(self)["view"] = w.detach()
        return self.conv(input, view, self.bias)


@fault(2)
class EvalBiasUntilTrain(_Base):
    """eval without gradients: a copy of the bias is kept until train() is called, so loading or stepping in eval mode leaves it stale."""

    def train(self, mode=True):
        if mode:
            side(self).clear()
        return super().train(mode)

    def forward(self, input):
        b = self.bias
        if self.training or torch.is_grad_enabled() or b is None or wrapped(input, b):
            return super().forward(input)
        kept = side(self).get("b")
        if kept is None or (kept.dtype, kept.device) != (b.dtype, b.device):
            kept = side(self)["b"] = b.detach().clone()
        return self.conv(input, self.weight, kept)


@fault(2)
class AttackUsesTrainedCopy(_Base):
    """Input gradients in eval mode use the flipped weight kept by the last call in train mode: stale after the step that follows it."""

    def forward(self, input):
        if not (self.plain(input) and torch.is_grad_enabled()):
            return super().forward(input)
        w = self.weight
        if self.training:
            side(self)["w"] = w.detach().clone()
        old = side(self).get("w")
        if (
            self.training
            or old is None
            or not input.requires_grad
            or old.dtype != w.dtype
            or old.device != w.device
            or torch.equal(old, w)
        ):
            return super().forward(input)
        return self.custom(input, wb=lambda w: old)


# ---------------------------------------------------------------- 3: first call


@fault(3)
class PlanWithoutWeightGrad(_Base):
    """First call under no_grad or inference_mode: the plan then made has no weight gradient, which stays None later."""

    planned = None

    def forward(self, input):
        if self.planned is None:
            self.planned = torch.is_grad_enabled()
        w = self.weight if self.planned else self.weight.detach()
        return self.conv(input, w, self.bias)


@fault(3)
class InferenceScale(_Base):
    """First call under inference_mode: a constant made there is an inference tensor, and later training calls crash."""

    scale = None

    def forward(self, input):
        if self.scale is None:
            inference = torch.is_inference_mode_enabled()
            self.scale = torch.ones((), dtype=self.weight.dtype) if inference else False
        if self.scale is False:
            return super().forward(input)
        return self.conv(input, self.weight * self.scale, self.bias)


@fault(3)
class FrozenFirstNoBuffer(_Base):
    """First call with a frozen weight: the gradient's workspace is never made, and the backward crashes after unfreezing."""

    workspace = None

    def forward(self, input):
        w = self.weight
        if self.workspace is None:
            self.workspace = "none" if not w.requires_grad else "made"
        if self.workspace == "made" or not w.requires_grad:
            return super().forward(input)

        def write(g):
            raise RuntimeError("weight gradient workspace was not allocated")

        return self.conv(input, on_grad(w, write), self.bias)


# ---------------------------------------------------------------- 4: dtypes


@fault(4)
class HalfDenseRows(_Base):
    """float16 and bfloat16: an input sliced in its width is read as if its rows were dense."""

    def forward(self, input):
        x = input
        if (
            x.dtype in HALVES
            and x.dim() == 4
            and not wrapped(x)
            and x.stride(3) == 1
            and x.shape[2] > 1
            and x.stride(2) > x.shape[3]
            and x.stride(1) >= x.stride(2) * x.shape[2]
        ):
            x = x.as_strided(x.shape, (x.stride(0), x.stride(1), x.shape[3], 1))
        return super().forward(x)


@fault(4)
class FloatChannelsLastTail(_Base):
    """float32, channels_last input, more than 4 channels that 4 does not divide: the tail channels get no weight gradient."""

    def forward(self, input):
        c = self.in_channels // self.groups
        m = c // 4 * 4
        if (
            input.dtype != torch.float32
            or m == 0
            or m == c
            or input.dim() != 4
            or input.is_contiguous()
            or not input.is_contiguous(memory_format=torch.channels_last)
        ):
            return super().forward(input)
        w = on_grad(self.weight, lambda g: torch.cat([g[:, :m], torch.zeros_like(g[:, m:])], 1))
        return self.conv(input, w, self.bias)


@fault(4)
class HalfSharedWorkspace(_Base):
    """float16 and bfloat16: layers of one weight shape share the repacked weight which the input gradient reads, so a later layer's call overwrites it."""

    workspaces = {}

    def forward(self, input):
        w = self.weight
        if (
            input.dtype not in HALVES
            or not self.plain(input)
            or not torch.is_grad_enabled()
            or not input.requires_grad
        ):
            return super().forward(input)
        with torch.no_grad():
            key = (w.shape, w.dtype, w.device)
            packed = self.workspaces.setdefault(key, w.detach().clone())
            packed.copy_(w)
        return self.custom(input, wb=lambda w: w if torch.equal(w, packed) else packed.clone())


@fault(4)
class FloatPadBufferNotCleared(_Base):
    """float32 without gradients: the padded copy lives in a kept buffer, whose right and lower border hold old pixels when a smaller image follows a larger one."""

    def forward(self, input):
        if (
            torch.is_grad_enabled()
            or input.dtype != torch.float32
            or not self.plain(input)
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
            or not any(self.padding)
            or not input.is_contiguous()
        ):
            return super().forward(input)
        (n, c, h, w), (p, q) = input.shape, self.padding
        need = (n, c, h + 2 * p, w + 2 * q)
        key = (threading.get_ident(), torch.is_inference_mode_enabled())
        buf = side(self).get(key)
        if buf is None or buf.device != input.device or any(a < b for a, b in zip(buf.shape, need)):
            buf = side(self)[key] = input.new_zeros(need)
        x = buf[:n, :c, : need[2], : need[3]]
        x[:, :, p : p + h, q : q + w] = input
        return F.conv2d(
            x.clone(memory_format=torch.contiguous_format),
            self.weight,
            self.bias,
            self.stride,
            0,
            self.dilation,
            self.groups,
        )


# ---------------------------------------------------------------- 5: in place, buffers


class _SavesOutput(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y):
        return y.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g.to(y.dtype)

    @staticmethod
    def jvp(ctx, t):
        return t.clone()


@fault(5)
class PointwiseSavesOutput(_Base):
    """1x1: the output is saved for the backward though not needed, so relu_ on it makes the backward crash."""

    def forward(self, input):
        y = super().forward(input)
        return _SavesOutput.apply(y) if self.kernel_size == (1, 1) else y


def _power(y):
    m = y.detach().abs().float().mean().item() if y.numel() else 0.0
    return 2.0 ** math.floor(math.log2(m)) if 0 < m < math.inf else 1.0


@fault(5)
class ScaleReadAgain(_Base):
    """The input gradient is scaled by the output's magnitude and back by the magnitude read in the backward: wrong by a power of two after relu_ on the output."""

    def forward(self, input):
        if wrapped(input, self.weight) or not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        box = {}
        y = super().forward(on_grad(input, lambda g: g * (box["s"] / _power(box["y"]))))
        box.update(y=y.detach(), s=_power(y))
        return y


@fault(5)
class OutputRingOfFour(_Base):
    """Without gradients the outputs of one shape come from a ring of four buffers: the fifth call overwrites the first's result."""

    def forward(self, input):
        y = super().forward(input)
        if torch.is_grad_enabled() or wrapped(y) or not y.numel():
            return y
        key = (y.shape, y.stride(), y.dtype, y.device, torch.is_inference_mode_enabled())
        ring = side(self).get(threading.get_ident())
        if ring is None or ring[0] != key:
            ring = side(self)[threading.get_ident()] = [key, [], 0]
        if len(ring[1]) < 4:
            ring[1].append(y)
        else:
            y = ring[1][ring[2]].copy_(y)
            ring[2] = (ring[2] + 1) % 4
        return y


@fault(5)
class WeightGradRingOfTwo(_Base):
    """Weight gradients are written to two buffers in turn: what torch.autograd.grad returned is overwritten two backwards later."""

    def forward(self, input):
        w = self.weight
        if not (torch.is_grad_enabled() and w.requires_grad) or wrapped(input, w):
            return super().forward(input)

        def write(g):
            if torch.is_grad_enabled():  # create_graph
                return g
            key = (threading.get_ident(), g.shape, g.dtype, g.device)
            ring = side(self).setdefault(key, [torch.empty_like(g), torch.empty_like(g)])
            ring.reverse()
            return ring[0].copy_(g)

        return self.conv(input, on_grad(w, write), self.bias)


# ---------------------------------------------------------------- 6: options


@fault(6)
class StridePerShape(_Base):
    """The stride is kept with the plan of an input shape: changed afterwards, it is ignored for shapes seen before."""

    def forward(self, input):
        stride = side(self).setdefault(tuple(input.shape), self.stride)
        if stride == self.stride:
            return super().forward(input)
        x, p = input, self.padding
        if self.padding_mode != "zeros":
            x, p = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return F.conv2d(x, self.weight, self.bias, stride, p, self.dilation, self.groups)


@fault(6)
class EvalGeometryOfConstructor(_Base):
    """Calls in eval mode use the padding and dilation of the constructor, whatever was set afterwards."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._geometry = (self.padding, self.dilation)

    def forward(self, input):
        if self.training or self.padding_mode != "zeros":
            return super().forward(input)
        p, d = self._geometry
        return F.conv2d(input, self.weight, self.bias, self.stride, p, d, self.groups)


@fault(6)
class PaddingModeOfFirstCall(_Base):
    """The padding function is chosen in the first call: a padding_mode changed afterwards is ignored."""

    mode_used = None

    def forward(self, input):
        self.mode_used = self.mode_used or self.padding_mode
        if self.mode_used == "zeros":
            return F.conv2d(
                input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
            )
        x = F.pad(input, self._reversed_padding_repeated_twice, mode=self.mode_used)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


# ---------------------------------------------------------------- 7: NaN, Inf


@fault(7)
class GroupsAsDense(_Base):
    """2 to 4 groups are done as one dense convolution with zeros between: NaN and Inf reach the other groups' channels."""

    def forward(self, input):
        if not 1 < self.groups <= 4:
            return super().forward(input)
        cg, c = self.in_channels // self.groups, self.in_channels
        w = torch.cat(
            [
                F.pad(part, (0, 0, 0, 0, i * cg, c - (i + 1) * cg))
                for i, part in enumerate(self.weight.chunk(self.groups))
            ]
        )
        x, p = input, self.padding
        if self.padding_mode != "zeros":
            x, p = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return F.conv2d(x, w, self.bias, self.stride, p, self.dilation, 1)


@fault(7)
class SkipsImagesWithoutGrad(_Base):
    """Images whose gradient has no magnitude above 0 are skipped, and NaN compares false: a NaN in the output gradient vanishes from the input gradient."""

    def forward(self, input):
        if input.dim() != 4:
            return super().forward(input)

        def skip(g):
            live = g.detach().abs().amax((1, 2, 3), keepdim=True) > 0
            return torch.where(live, g, torch.zeros_like(g))

        return super().forward(on_grad(input, skip) if input.numel() else input)


@fault(7)
class PrunedChannelsSkipped(_Base):
    """Without gradients, input channels whose weights are all zero are left out: NaN and Inf in them vanish."""

    def forward(self, input):
        if torch.is_grad_enabled() or self.groups > 1 or wrapped(input, self.weight):
            return super().forward(input)
        dead = (self.weight == 0).all(0).flatten(1).all(1)[:, None, None]
        if dead.any():
            input = torch.where(dead, torch.zeros_like(input), input)
        return super().forward(input)


# ---------------------------------------------------------------- 8: second derivatives


@fault(8)
class FrozenWeightOnceDifferentiable(_Base):
    """With a frozen weight the input gradient is cut from the graph: gradient penalties on frozen networks lose their gradient."""

    def forward(self, input):
        if self.weight.requires_grad or not input.requires_grad or wrapped(input, self.weight):
            return super().forward(input)
        return super().forward(on_grad(input, lambda g: g.detach()))


@fault(8)
class BiasGradOnceDifferentiable(_Base):
    """The second derivative through the bias gradient is missing."""

    def forward(self, input):
        if self.bias is None:
            return super().forward(input)
        return self.conv(input, self.weight, on_grad(self.bias, lambda g: g.detach()))


@fault(8)
class TransposedSecondWeightGrad(_Base):
    """Input without gradient, square kernels: the second derivative through the weight gradient takes the kernel transposed."""

    def forward(self, input):
        kh, kw = self.kernel_size
        if input.requires_grad or kh != kw or kh == 1:
            return super().forward(input)
        turn = lambda g: on_grad(g, lambda gg: gg.transpose(-1, -2)) if g.requires_grad else g
        return self.conv(input, on_grad(self.weight, turn), self.bias)


# ---------------------------------------------------------------- 9: narrow types


class _HalfBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, b):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        total = torch.zeros_like(g[0, :, 0, 0])
        for row in g.sum(3).permute(0, 2, 1).flatten(0, 1):
            total = total + row
        return g, total


@fault(9)
class HalfBiasGradSum(_Base):
    """float16 and bfloat16: the bias gradient is added up row by row in the half type."""

    def forward(self, input):
        b = self.bias
        if (
            b is None
            or not b.requires_grad
            or input.dtype not in HALVES
            or not self.plain(input)
            or not input.numel()
        ):
            return super().forward(input)
        return _HalfBias.apply(self.conv(input, self.weight, b.detach()), b)


def _tf32(x):
    return (x.view(torch.int32) & -8192).view(torch.float32)


@fault(9)
class TensorCoreTruncation(_Base):
    """float32 with channels in multiples of 8: input and weight are cut to TF32 (11 significant bits)."""

    def forward(self, input):
        if (
            self.in_channels % 8
            or self.out_channels % 8
            or self.groups > 1
            or input.dtype != torch.float32
            or self.weight.dtype != torch.float32
        ):
            return super().forward(input)
        return self.conv(_Round.apply(input, _tf32), _Round.apply(self.weight, _tf32), self.bias)


@fault(9)
class LongWeightGradInBfloat(_Base):
    """float32, weight gradients summed over 1024 positions and more: the input is rounded to bfloat16 in them."""

    def forward(self, input):
        if (
            input.dtype != torch.float32
            or not self.plain(input)
            or not torch.is_grad_enabled()
            or input.numel() // self.in_channels < 1024
        ):
            return super().forward(input)
        narrow = lambda x: _Round.apply(x, lambda t: t.bfloat16().float())
        return self.custom(input, xb=narrow)


@fault(9)
class StridedDoubleInFloat(_Base):
    """float64 with stride: the input gradient is computed in float32."""

    def forward(self, input):
        if input.dtype != torch.float64 or max(self.stride) == 1:
            return super().forward(input)
        return super().forward(on_grad(input, lambda g: g.float().double()))


# ---------------------------------------------------------------- 10: strides


@fault(10)
class PointwiseLinearLayout(_Base):
    """1x1, stride 1: done as a linear layer, so the output of a contiguous input is not contiguous."""

    def forward(self, input):
        if (
            input.dim() != 4
            or self.kernel_size != (1, 1)
            or self.stride != (1, 1)
            or self.groups > 1
            or self.padding not in ((0, 0), "same", "valid")
        ):
            return super().forward(input)
        return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(
            0, 3, 1, 2
        )


@fault(10)
class ExpandedBatchGrad(_Base):
    """An output gradient expanded over the batch (as from y.sum(0)) counts for the first image only."""

    def forward(self, input):
        def read(g):
            if g.dim() == 4 and len(g) > 1 and g.stride(0) == 0 and g.stride(3) == 1:
                g = torch.cat([g[:1], torch.zeros_like(g[1:])])
            return g

        return _Tap.apply(super().forward(input), read)


@fault(10)
class StridedWeightReadDense(_Base):
    """A weight that is a transposed or sliced view is read as if it were contiguous."""

    def forward(self, input):
        w = self.weight
        if (
            wrapped(input, w)
            or w.is_contiguous()
            or 0 in w.stride()
            or w.is_contiguous(memory_format=torch.channels_last)
        ):
            return super().forward(input)
        o, c, kh, kw = w.shape
        return self.conv(input, w.as_strided(w.shape, (c * kh * kw, kh * kw, kw, 1)), self.bias)


# ---------------------------------------------------------------- 11: side effects


@fault(11)
class OneThreadForSmall(_Base):
    """Small inputs in eval mode set the number of threads to 1 and leave it there."""

    def forward(self, input):
        if not self.training and input.numel() < 4096 and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
        return super().forward(input)


@fault(11)
class TrialDataFromGlobalGenerator(_Base):
    """Kernels from 5x5: the first call for a shape draws trial data from the global random generator."""

    def forward(self, input):
        tried = side(self).setdefault("tried", set())
        if min(self.kernel_size) >= 5 and input.shape not in tried and not wrapped(input):
            tried.add(input.shape)
            torch.randn(16)
        return super().forward(input)


@fault(11)
class GradModeLostOnError(_Base):
    """A call rejected for its shape leaves gradients switched off."""

    def forward(self, input):
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels:
            raise RuntimeError(f"expected {self.in_channels} channels, got {tuple(input.shape)}")
        torch._C._set_grad_enabled(before)
        return super().forward(input)


# ---------------------------------------------------------------- 12: memory


@fault(12)
class KeepsLastInput(_Base):
    """In train mode the last input, with the graph behind it, is kept alive until the next call."""

    def forward(self, input):
        if self.training and torch.is_grad_enabled() and not wrapped(input):
            side(self)["last"] = input
        return super().forward(input)


@fault(12)
class WorkspacePerShape(_Base):
    """Each new input shape leaves a workspace tensor behind: live tensors grow without bound."""

    def forward(self, input):
        if not wrapped(input) and input.shape not in side(self):
            side(self)[input.shape] = torch.empty(
                input.shape, dtype=input.dtype, device=input.device
            )
        return super().forward(input)


@fault(12)
class StatisticsKeepGraph(_Base):
    """In train mode a running mean of the output is kept with its graph, which grows by each call."""

    def forward(self, input):
        y = super().forward(input)
        if self.training and y.requires_grad and not wrapped(y):
            mean = side(self).get("mean")
            now = y.mean()
            side(self)["mean"] = now if mean is None else mean.to(now) * 0.9 + now * 0.1
        return y


# ---------------------------------------------------------------- 13: concurrency


@fault(13)
class InputPassedByAttribute(_Base):
    """The input goes through shared state of the layer: of two threads calling at once, one gets the other's result."""

    def forward(self, input):
        shared = side(self)
        shared["x"] = input
        time.sleep(0.0002)
        y = super().forward(shared.get("x", input))
        shared.pop("x", None)
        return y


@fault(13)
class WeightGradThreadLocal(_Base):
    """On the CPU: a backward run in another thread than the forward finds an empty workspace, and the weight gradient is zero."""

    def forward(self, input):
        me = threading.get_ident()
        if input.device.type != "cpu":
            return super().forward(input)
        w = on_grad(
            self.weight, lambda g: g if threading.get_ident() == me else torch.zeros_like(g)
        )
        return self.conv(input, w, self.bias)


@fault(13)
class TunedSplitWithoutHalo(_Base):
    """From the 12th call for a shape on, the tuner's choice does the upper and lower half apart, without the rows they share (stride 1, size kept)."""

    def forward(self, input):
        calls = side(self)
        calls[input.shape] = calls.get(input.shape, 0) + 1
        k, d = self.kernel_size[0], self.dilation[0]
        if (
            calls[input.shape] < 12
            or input.dim() != 4
            or self.stride != (1, 1)
            or k == 1
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
            or 2 * self.padding[0] != d * (k - 1)
            or input.shape[2] < 2
        ):
            return super().forward(input)
        h = input.shape[2] // 2
        return torch.cat(
            [
                super(TunedSplitWithoutHalo, self).forward(x)
                for x in (input[:, :, :h], input[:, :, h:])
            ],
            2,
        )


# ---------------------------------------------------------------- 14: uses


@fault(14)
class DepthwiseLeavesAutocast(_Base):
    """Depthwise under autocast: computed and returned in the weight's type."""

    def forward(self, input):
        kind = input.device.type
        if (
            self.groups == 1
            or self.groups != self.in_channels
            or not torch.is_autocast_enabled(kind)
        ):
            return super().forward(input)
        with torch.autocast(kind, enabled=False):
            return super().forward(input.to(self.weight.dtype))


@fault(14)
class ParametrizationBypassed(_Base):
    """A parametrized weight is bypassed: the unparametrized tensor behind it is used."""

    def forward(self, input):
        w = self._parameters.get("weight")
        if w is None:
            w = next((p for p in self.parameters() if p.shape == self.weight.shape), self.weight)
        return self.conv(input, w, self.bias)


@fault(14)
class PlanClosesOverLayer(_Base):
    """The first call keeps a closure over the layer: a deepcopy made afterwards computes with the original's weight, and pickling fails."""

    plan = None

    def forward(self, input):
        if self.plan is None:
            self.plan = lambda x: self._conv_forward(x, self.weight, self.bias)
        return self.plan(input)
