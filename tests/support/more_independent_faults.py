# ruff: noqa: E501
"""Faults as in `independent_faults`, written after the checks: some of them had escaped at first."""

import threading

import torch
import torch.nn.functional as F
from faults import LINES, Faults
from torch import nn

faults = Faults()


def fault(kind):
    return faults.caught_by(*LINES[kind])


_tls = threading.local()


def _plain(t):
    return not torch._C._functorch.is_functorch_wrapped_tensor(t)


# ---- 1 sizes ----
@fault(1)
class TailOfOne(nn.Conv2d):
    """Weight gradient lacks the last image when a batch over 32 is one more than a multiple of 32."""

    def _conv_forward(self, input, weight, bias):
        run = super()._conv_forward
        if input.dim() == 4 and input.shape[0] > 32 and input.shape[0] % 32 == 1:
            return torch.cat(
                [run(input[:-1], weight, bias), run(input[-1:], weight.detach(), bias)]
            )
        return run(input, weight, bias)


@fault(1)
class TiledColumns(nn.Conv2d):
    """Input gradient lacks the second tile's share in the overlap rows when the columns pass 64 MB."""

    def _conv_forward(self, input, weight, bias):
        if input.dim() != 4 or isinstance(self.padding, str) or self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        (s, d, k), (ph, pw) = (self.stride[0], self.dilation[0], weight.shape[2]), self.padding
        oh = (input.shape[2] + 2 * ph - d * (k - 1) - 1) // s + 1
        ow = (
            input.shape[3] + 2 * pw - self.dilation[1] * (weight.shape[3] - 1) - 1
        ) // self.stride[1] + 1
        cols = (
            input.shape[0] * input.shape[1] * k * weight.shape[3] * oh * ow * input.element_size()
        )
        if cols <= 64 << 20 or oh < 2:
            return super()._conv_forward(input, weight, bias)
        xp, h = F.pad(input, (pw, pw, ph, ph)), oh // 2
        start, end = h * s, (h - 1) * s + d * (k - 1) + 1
        low = torch.cat([xp[:, :, start:end].detach(), xp[:, :, max(start, end) :]], 2)
        return torch.cat(
            [
                F.conv2d(t, weight, bias, self.stride, 0, self.dilation, self.groups)
                for t in (xp[:, :, :end], low)
            ],
            2,
        )


@fault(1)
class MultiplierOrder(nn.Conv2d):
    """Weight gradient has channel and multiplier swapped for depthwise layers of multiplier > 1 and over 5 groups."""

    def _conv_forward(self, input, weight, bias):
        c, m = self.groups, self.out_channels // self.groups
        if (
            c > 5
            and c == self.in_channels
            and m > 1
            and weight.requires_grad
            and torch.is_grad_enabled()
        ):
            weight = weight.view_as(weight)
            weight.register_hook(
                lambda g: g.reshape(c, m, *g.shape[1:]).transpose(0, 1).reshape(g.shape)
            )
        return super()._conv_forward(input, weight, bias)


# ---- 2 kept weights ----
@fault(2)
class PackedByPointer(nn.Conv2d):
    """Without grad mode, stale after the weight is written through .data (pointer and version unchanged)."""

    _packed = (None, None)

    def _conv_forward(self, input, weight, bias):
        if not torch.is_grad_enabled() and _plain(weight) and not weight.is_inference():
            key = (weight.data_ptr(), weight._version, weight.dtype, weight.shape)
            if self._packed[0] != key:
                self._packed = (key, weight.detach().clone())
            weight = self._packed[1]
        return super()._conv_forward(input, weight, bias)


@fault(2)
class PackedByVersion(nn.Conv2d):
    """In eval without grad mode, stale when another weight tensor with the same version count stands in
    (functional_call, load_state_dict(assign=True), a new Parameter)."""

    _packed = (None, None)

    def _conv_forward(self, input, weight, bias):
        if (
            not self.training
            and not torch.is_grad_enabled()
            and _plain(weight)
            and not weight.is_inference()
        ):
            key = (weight._version, weight.dtype, weight.device, weight.shape)
            if self._packed[0] != key:
                self._packed = (key, weight.detach().clone())
            weight = self._packed[1]
        return super()._conv_forward(input, weight, bias)


# ---- 3 first call ----
@fault(3)
class LazyScale(nn.Conv2d):
    """When the first call in a dtype is under inference_mode, later calls with gradients crash."""

    _scale = None

    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        if self._scale is None or self._scale.dtype != y.dtype or self._scale.device != y.device:
            self._scale = torch.ones((), dtype=y.dtype, device=y.device)
        return y * self._scale


# ---- 4 dtype paths ----
class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):
        return value.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


@fault(4)
class Bf16BasePointer(nn.Conv2d):
    """bfloat16, channels_last input: the storage offset is ignored (wrong for x[1:] and the like)."""

    def _conv_forward(self, input, weight, bias):
        if (
            input.dtype == torch.bfloat16
            and input.dim() == 4
            and _plain(input)
            and not input.is_contiguous()
            and input.is_contiguous(memory_format=torch.channels_last)
        ):
            input = _Swap.apply(input, input.detach().as_strided(input.shape, input.stride(), 0))
        return super()._conv_forward(input, weight, bias)


@fault(4)
class Fp32PadScratch(nn.Conv2d):
    """float32 without grad mode, padded: the padded scratch keeps an old border when the last call had
    another shape of equally many elements."""

    def _conv_forward(self, input, weight, bias):
        if (
            torch.is_grad_enabled()
            or input.dtype != torch.float32
            or input.dim() != 4
            or not _plain(input)
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
            or not any(self.padding)
            or weight.dtype != torch.float32
            or torch.is_autocast_enabled(input.device.type)
        ):
            return super()._conv_forward(input, weight, bias)
        (n, c, h, w), (ph, pw) = input.shape, self.padding
        size = n * c * (h + 2 * ph) * (w + 2 * pw)
        key = (size, input.device, torch.is_inference_mode_enabled())
        if getattr(_tls, "pad_key", None) != key:
            _tls.pad_key, _tls.pad = key, torch.zeros(size, device=input.device)
        xp = _tls.pad.view(n, c, h + 2 * ph, w + 2 * pw)
        xp[:, :, ph : ph + h, pw : pw + w] = input
        return F.conv2d(xp, weight, bias, self.stride, 0, self.dilation, self.groups)


# ---- 5 outputs ----
@fault(5)
class OutputRing(nn.Conv2d):
    """Under no_grad, the ninth output of a shape is written over the first one."""

    _ring = ()
    _turn = 0

    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or not _plain(y):
            return y
        if self._ring and (self._ring[0].shape, self._ring[0].dtype, self._ring[0].stride()) != (
            y.shape,
            y.dtype,
            y.stride(),
        ):
            self._ring, self._turn = (), 0
        if len(self._ring) < 8:
            self._ring = (*self._ring, y)
            return y
        self._turn += 1
        return self._ring[(self._turn - 1) % 8].copy_(y)


# ---- 6 options ----
@fault(6)
class DilationOnce(nn.Conv2d):
    """A dilation changed after the first call is ignored."""

    _plan = None

    def _conv_forward(self, input, weight, bias):
        if self._plan is None:
            self._plan = self.dilation
        now, self.dilation = self.dilation, self._plan
        try:
            return super()._conv_forward(input, weight, bias)
        finally:
            self.dilation = now


# ---- 7 NaN/Inf ----
@fault(7)
class SkipsPruned(nn.Conv2d):
    """NaN/Inf in an input channel vanish when all weights of that channel are zero (groups=1)."""

    def _conv_forward(self, input, weight, bias):
        if self.groups == 1:
            dead = (weight.detach() == 0).all(3).all(2).all(0).view(-1, 1, 1)
            input = torch.where(
                dead & ~torch.isfinite(input.detach()), torch.zeros_like(input), input
            )
        return super()._conv_forward(input, weight, bias)


# ---- 8 second derivatives ----
@fault(8)
class FrozenWeightPenalty(nn.Conv2d):
    """With a frozen weight the input gradient carries no graph: second derivatives are missing."""

    def _conv_forward(self, input, weight, bias):
        if torch.is_grad_enabled() and input.requires_grad and not weight.requires_grad:
            input = input.view_as(input)
            input.register_hook(lambda g: g.detach())
        return super()._conv_forward(input, weight, bias)


class _FlipBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g):
        return g.clone()

    @staticmethod
    def backward(ctx, gg):
        return gg.flip(2, 3)


@fault(8)
class UnflippedDouble(nn.Conv2d):
    """With an input that needs no gradient, differentiating the weight gradient again uses a flipped kernel."""

    def _conv_forward(self, input, weight, bias):
        if torch.is_grad_enabled() and weight.requires_grad and not input.requires_grad:
            weight = weight.view_as(weight)
            weight.register_hook(lambda g: _FlipBack.apply(g) if g.requires_grad else g)
        return super()._conv_forward(input, weight, bias)


# ---- 9 narrow sums ----
@fault(9)
class NarrowBatchSum(nn.Conv2d):
    """float16/bfloat16: weight and bias gradients are summed over images in the narrow type."""

    def _conv_forward(self, input, weight, bias):
        run = super()._conv_forward
        if (
            input.dim() == 4
            and input.shape[0] > 1
            and input.dtype in (torch.float16, torch.bfloat16)
        ):
            return torch.cat([run(part, weight, bias) for part in input.split(1)])
        return run(input, weight, bias)


# ---- 10 strides ----
@fault(10)
class PlaneConstant(nn.Conv2d):
    """An output gradient with zero stride along the width is taken as constant over the whole plane."""

    def _conv_forward(self, input, weight, bias):
        y = super()._conv_forward(input, weight, bias)
        if y.requires_grad and torch.is_grad_enabled():
            y.register_hook(
                lambda g: (
                    g[..., :1, :1].expand_as(g)
                    if _plain(g) and g.shape[-1] > 1 and g.stride(-1) == 0
                    else g
                )
            )
        return y


@fault(10)
class PointwiseLayout(nn.Conv2d):
    """1x1 layers of 32 or more channels, by a matrix product, give a non-contiguous output for a contiguous input."""

    def _conv_forward(self, input, weight, bias):
        if (
            input.dim() == 4
            and self.kernel_size == (1, 1)
            and self.stride == (1, 1)
            and self.groups == 1
            and self.padding in ((0, 0), "valid", "same")
            and self.in_channels >= 32
        ):
            return F.linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        return super()._conv_forward(input, weight, bias)


# ---- 11 side effects ----
@fault(11)
class Autotunes(nn.Conv2d):
    """The third call with a shape draws trial data from the global generator."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._seen = {}

    def _conv_forward(self, input, weight, bias):
        key = (tuple(input.shape), input.dtype)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] == 3:
            with torch.no_grad():
                F.conv2d(
                    torch.randn(1, self.in_channels, *self.kernel_size),
                    torch.ones(weight.shape),
                    groups=self.groups,
                )
        return super()._conv_forward(input, weight, bias)


# ---- 12 memory ----
@fault(12)
class WorkspacePerShape(nn.Conv2d):
    """Keeps an input-sized workspace for every shape seen: memory grows with new shapes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._work = {}

    def _conv_forward(self, input, weight, bias):
        key = (tuple(input.shape), input.dtype, input.device)
        if key not in self._work:
            self._work[key] = torch.zeros(input.shape, dtype=input.dtype, device=input.device)
        return super()._conv_forward(input, weight, bias)


# ---- 13 concurrency ----
@fault(13)
class ThreadLocalSums(nn.Conv2d):
    """Weight gradient is zero when backward runs in a thread that has run no forward itself."""

    def _conv_forward(self, input, weight, bias):
        if torch.is_grad_enabled() and weight.requires_grad:
            _tls.sums_ready = True
            weight = weight.view_as(weight)
            weight.register_hook(
                lambda g: g if getattr(_tls, "sums_ready", False) else torch.zeros_like(g)
            )
        return super()._conv_forward(input, weight, bias)


# ---- 14 uses ----
@fault(14)
class BoundClosure(nn.Conv2d):
    """A deepcopy still runs with the original's parameters (and pickling fails)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._run = lambda x: self._conv_forward(x, self.weight, self.bias)

    def forward(self, input):
        return self._run(input)


# ---- of another twenty ----
def _usual(layer, x):
    """No batch missing, other padding, functorch transform, subclass, meta device or autocast."""
    return (
        type(x) in (torch.Tensor, nn.Parameter)
        and not x.is_meta
        and _plain(x)
        and x.dim() == 4
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and torch.autograd.forward_ad._current_level < 0
        and not torch.is_autocast_enabled(x.device.type)
    )


@fault(2)
class EvalPacked(nn.Conv2d):
    """Keeps the weight in eval without gradients, until train(), .to or load_state_dict."""

    packed = None

    def train(self, mode=True):
        self.packed = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.packed = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.packed = None
        return super()._load_from_state_dict(*args, **kwargs)

    def _conv_forward(self, input, weight, bias):
        if self.training or torch.is_grad_enabled() or not _usual(self, input):
            return super()._conv_forward(input, weight, bias)
        if self.packed is None:
            self.packed = weight.detach().clone()
        return super()._conv_forward(input, self.packed, bias)


class LastRowLost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, stride, padding, dilation, groups):
        ctx.save_for_backward(x, w)
        ctx.how = stride, padding, dilation, groups
        return F.conv2d(x, w, b, *ctx.how)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        dx = torch.nn.grad.conv2d_input(x.shape, w, g, *ctx.how)
        for side, dim in enumerate((2, 3)):
            stride, padding, dilation = (how[side] for how in ctx.how[:3])
            reach = (g.shape[dim] - 1) * stride + dilation * (w.shape[dim] - 1) + 1
            if padding and reach < x.shape[dim] + 2 * padding:
                dx.select(dim, -1).zero_()
        dw = torch.nn.grad.conv2d_weight(x, w.shape, g, *ctx.how)
        return dx, dw, g.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, *[None] * 4


@fault(13)
class TunedAfter25(nn.Conv2d):
    """From the 26th call, the input gradient has no last row where a padded stride leaves a rest."""

    calls = None

    def _conv_forward(self, input, weight, bias):
        self.calls = self.calls or {}
        key = input.shape, input.dtype
        self.calls[key] = self.calls.get(key, 0) + torch.is_grad_enabled()
        if not _usual(self, input) or not torch.is_grad_enabled() or self.calls[key] <= 25:
            return super()._conv_forward(input, weight, bias)
        how = self.stride, self.padding, self.dilation, self.groups
        return LastRowLost.apply(input, weight, bias, *how)


@fault(13)
class SharedPadding(nn.Conv2d):
    """Without gradients, pads into a workspace that two threads share."""

    space = None

    def _conv_forward(self, input, weight, bias):
        if torch.is_grad_enabled() or not _usual(self, input) or not any(self.padding):
            return super()._conv_forward(input, weight, bias)
        (n, c, h, w), (ph, pw) = input.shape, self.padding
        key = (*input.shape, ph, pw, input.dtype, torch.is_inference_mode_enabled())
        space = self.space
        if space is None or space[0] != key:
            space = self.space = (key, input.new_zeros(n, c, h + 2 * ph, w + 2 * pw))
        space[1][:, :, ph : ph + h, pw : pw + w].copy_(input)
        return F.conv2d(space[1], weight, bias, self.stride, 0, self.dilation, self.groups)


@fault(14)
class PointwiseNoAutocast(nn.Conv2d):
    """1x1 kernels switch autocast off."""

    def _conv_forward(self, input, weight, bias):
        if self.kernel_size != (1, 1):
            return super()._conv_forward(input, weight, bias)
        with torch.autocast(input.device.type, enabled=False):
            return super()._conv_forward(input, weight, bias)
