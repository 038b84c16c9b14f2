"""Correct convolutions of many kinds, which must pass every check of `verify`."""

import torch
import torch.nn.functional as F
from faults import Correct
from torch import nn


class Own(nn.Conv2d):
    """An algorithm for float32 and float64 that gets padded batches; the rest is nn.Conv2d's."""

    def suits(self, x):
        return True

    def _conv_forward(self, input, weight, bias):
        tensors = [t for t in (input, weight, bias) if t is not None]
        kind = weight.device.type
        dtype = weight.dtype
        if torch.is_autocast_enabled(kind) and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(kind)
        if (
            not isinstance(input, torch.Tensor)
            or input.dim() != 4
            or input.shape[1] != self.in_channels
            or not all(t.dtype.is_floating_point for t in tensors)
            or (dtype == weight.dtype and len({t.dtype for t in tensors}) > 1)
            or {len(pair) for pair in (self.kernel_size, self.stride, self.dilation)} != {2}
            or (not isinstance(self.padding, str) and len(self.padding) != 2)
            or min(*self.stride, *self.dilation) < 1
            or any(word in str(self.padding) for word in ("-", "None"))
            or 0 in (*input.shape, *weight.shape)
            or min(self.sizes(self.padded(input))) < 1
            or not self.suits(input)
        ):
            return super()._conv_forward(input, weight, bias)
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(kind, enabled=False):
            x, w, *b = (t.to(dtype).to(wide) for t in tensors)
            y = self.computed(self.padded(x), w)
            return (y + b[0][:, None, None] if b else y).to(dtype).contiguous()

    def padded(self, x):
        if self.padding_mode != "zeros":
            return F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode)
        pads = {"same": (None, None), "valid": (0, 0)}.get(self.padding, self.padding)
        amounts = []
        for k, d, p in zip(self.kernel_size, self.dilation, pads, strict=True):
            before, after = (d * (k - 1) // 2, (d * (k - 1) + 1) // 2) if p is None else (p, p)
            amounts = [before, after, *amounts]
        return F.pad(x, amounts)

    def sizes(self, x):
        window = zip(x.shape[2:], self.kernel_size, self.dilation, self.stride, strict=True)
        return [(n - d * (k - 1) - 1) // s + 1 for n, k, d, s in window]


class Unfolded(Own):
    def computed(self, x, w):
        columns = F.unfold(x, self.kernel_size, self.dilation, 0, self.stride)
        y = w.flatten(1).unflatten(0, (self.groups, -1)) @ columns.unflatten(1, (self.groups, -1))
        return y.flatten(1, 2).unflatten(2, self.sizes(x))


class Winograd(Own):
    """F(2x2, 3x3); A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks"."""

    rounding_budget = 16.0
    exact_on_integers = False
    spreads_non_finite = True

    def suits(self, x):
        return (self.kernel_size, self.stride, self.dilation, self.groups) == (
            *((3, 3), (1, 1), (1, 1)),
            1,
        )

    def computed(self, x, w):
        oh, ow = self.sizes(x)
        tiles = F.pad(x, (0, ow % 2, 0, oh % 2)).unfold(2, 4, 2).unfold(3, 4, 2)
        b = x.new_tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
        g = x.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
        a = x.new_tensor([[1, 1, 1, 0], [0, 1, -1, -1]])
        products = torch.einsum("ocij,nchwij->nohwij", g @ w @ g.T, b @ tiles @ b.T)
        y = (a @ products @ a.T).transpose(3, 4).flatten(4).flatten(2, 3)
        return y[:, :, :oh, :ow]


class Fourier(Own):
    exact_on_integers = False
    spreads_non_finite = True

    def computed(self, x, w):
        dtype, size = x.dtype, x.shape[2:]
        x, w = x.to(self.wide(dtype)), w.to(self.wide(dtype))
        (dh, dw), (kh, kw), (sh, sw) = self.dilation, self.kernel_size, self.stride
        kernels = w.new_zeros(*w.shape[:2], dh * (kh - 1) + 1, dw * (kw - 1) + 1)
        kernels[:, :, ::dh, ::dw] = w
        spectra = torch.fft.rfft2(x).unflatten(1, (self.groups, -1))
        kernels = torch.fft.rfft2(kernels, s=size).conj().unflatten(0, (self.groups, -1))
        y = torch.fft.irfft2(torch.einsum("ngchw,gochw->ngohw", spectra, kernels), s=size)
        oh, ow = self.sizes(x)
        y = y.flatten(1, 2)[:, :, : sh * (oh - 1) + 1 : sh, : sw * (ow - 1) + 1 : sw]
        return y.to(dtype)


class FourierInFloat64(Fourier):
    def wide(self, dtype):
        return torch.float64


class FourierInFloat32(Fourier):
    rounding_budget = 64.0

    def wide(self, dtype):
        return dtype


class ByComplexNumbers(Own):
    spreads_non_finite = True

    def computed(self, x, w):
        kind = torch.promote_types(x.dtype, torch.complex64)
        how = self.stride, 0, self.dilation, self.groups
        return torch.conv2d(x.to(kind), w.to(kind), None, *how).real


class Tiled(Own):
    def computed(self, x, w):
        how = self.stride, 0, self.dilation, self.groups
        return torch.cat([torch.conv2d(part, w, None, *how) for part in x.split(3)])


class ChannelsLast(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        if isinstance(input, torch.Tensor) and input.dim() == 4:
            input = input.contiguous(memory_format=torch.channels_last)
        return super()._conv_forward(input, weight, bias).contiguous()


class Cached(nn.Conv2d):
    """Keeps a copy of the weight without gradients, as long as the weight is equal to it."""

    def _conv_forward(self, input, weight, bias):
        if not torch.is_grad_enabled() and type(weight) is nn.Parameter:
            kept = self.__dict__.get("kept")
            if kept is None or kept.dtype != weight.dtype or not torch.equal(kept, weight):
                self.__dict__["kept"] = weight.detach().clone()
            weight = self.kept
        return super()._conv_forward(input, weight, bias)


class Wrapper(nn.Conv2d):
    """Another layer does the work, with this one's parameters."""

    def _conv_forward(self, input, weight, bias):
        inner = nn.Conv2d.__new__(nn.Conv2d)
        inner.__dict__.update(self.__dict__)
        return inner._conv_forward(input, weight, bias)


class Compiled(nn.Conv2d):
    @torch.compile(backend="eager")  # which needs no C++ compiler
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias)


def subclass_of(base):
    class Made(base):
        pass

    return Made


FromAFunction = subclass_of(nn.Conv2d)

CORRECT = [
    *(nn.Conv2d, Correct, Unfolded, Winograd, FourierInFloat64, FourierInFloat32, ByComplexNumbers),
    *(Tiled, ChannelsLast, Cached, Wrapper, FromAFunction, Compiled),
]
