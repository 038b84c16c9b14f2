"""Base class of the backends: ``nn.Conv2d`` computed by an `Algorithm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from cnntrain.conv.algorithm import Algorithm
from cnntrain.conv.autograd import autocasts, convolve
from cnntrain.conv.geometry import NONE, Amounts, Geometry, pad, padded, padding_amounts


class Conv2d(nn.Conv2d):
    """A two-dimensional convolution computed by ``algorithm``.

    Constructor, initialisation, ``state_dict`` and errors are ``nn.Conv2d``'s, so that checkpoints
    load into either. A backend is a subclass that sets ``algorithm``:

        class MyConv2d(Conv2d):
            algorithm = MyAlgorithm()

    Input (N, C, H, W) or (C, H, W); output (N, O, OH, OW) or (O, OH, OW), where
    OH = floor((H + 2 p - d (k - 1) - 1) / s) + 1, and OW likewise. Under ``torch.autocast`` input,
    weight and bias are cast first.

    Raises:
        RuntimeError: wrong number of dimensions or channels, unequal dtypes or devices, a kernel
            larger than the padded input, a stride or dilation below one, a negative padding.
        TypeError: the input is not a Tensor, or a stride or dilation not an integer.
        ValueError: a padding or a padding mode that does not exist (from the constructor).
    """

    algorithm: Algorithm

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not isinstance(input, Tensor):
            raise TypeError(f"the input must be a Tensor, not {type(input).__name__}")
        if autocasts(input.device.type):
            input, weight = _autocast(input), _autocast(weight)
            bias = None if bias is None else _autocast(bias)
        geometry = Geometry.of(self)
        _check_parameters(weight, bias, geometry)
        amounts = padding_amounts(self.padding, self.kernel_size, geometry.dilation)
        if self.padding_mode != "zeros":  # as in nn.Conv2d, where F.pad's errors come first
            input, amounts = pad(input, amounts, self.padding_mode), NONE
        _check_input(input, weight, geometry, amounts)
        unbatched = input.dim() == 3
        x = input.unsqueeze(0) if unbatched else input
        algorithm = self.algorithm
        if is_compiling() or any(type(t) not in (Tensor, nn.Parameter) for t in (x, weight)):
            algorithm = algorithm.traceable()
        y = convolve(x, weight, bias, geometry, algorithm, amounts)  # (N, O, OH, OW)
        return y.squeeze(0) if unbatched else y


class NativeConv2d(nn.Conv2d):
    """``nn.Conv2d`` itself: oneDNN on a CPU, cuDNN on a GPU."""

    # On a GPU, cuDNN may choose Fourier or Winograd transforms, which are inexact on integers and
    # spread NaN and Inf within an image.
    exact_on_integers = False
    spreads_non_finite = True


def _autocast(t: Tensor) -> Tensor:
    """Casts as autocast does for ``nn.Conv2d``."""
    if not t.is_floating_point() or t.dtype == torch.float64:  # autocast leaves these alone
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))


# Errors of the same types as nn.Conv2d's, all raised before the algorithm is called.


def _check_parameters(w: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    numbers = *geometry.stride, *geometry.dilation, geometry.groups
    given = f"stride={geometry.stride}, dilation={geometry.dilation} and groups={geometry.groups}"
    if not all(hasattr(number, "__index__") for number in numbers):
        raise TypeError(f"{given} should be whole numbers")
    if min(numbers) < 1:
        raise RuntimeError(f"{given} should be greater than zero")
    if w.dim() != 4 or min(w.shape) < 1 or w.shape[0] % geometry.groups:
        raise RuntimeError(
            f"weight of size {list(w.shape)} (out_channels, in_channels / groups, height, width) "
            f"should have two kernel sizes, no dimension of zero, and out_channels that "
            f"groups={geometry.groups} divides"
        )
    if bias is not None:
        if bias.shape != w.shape[:1]:
            raise RuntimeError(f"bias of size {list(bias.shape)} should have size {[len(w)]}")
        _check_same("bias", bias, w)


def _check_input(x: Tensor, w: Tensor, geometry: Geometry, amounts: Amounts) -> None:
    size = list(x.shape)
    if x.dim() not in (3, 4):
        raise RuntimeError(f"expected 3D (unbatched) or 4D (batched) input, got size {size}")
    channels = w.shape[1] * geometry.groups
    if x.shape[-3] != channels:
        raise RuntimeError(
            f"weight of size {list(w.shape)} with groups={geometry.groups} expects input of size "
            f"{size} to have {channels} channels, but it has {x.shape[-3]}"
        )
    _check_same("input", x, w)
    given = f"padding {amounts} (left, right, top, bottom)"
    if not all(hasattr(amount, "__index__") for amount in amounts):
        raise TypeError(f"{given} should be whole numbers")
    if min(amounts) < 0:
        raise RuntimeError(f"negative padding is not supported: {given}")
    if min(x.shape[-2:]) < 1:
        raise RuntimeError(f"height and width of an input of size {size} should not be zero")
    height, width = padded(x.shape[-2:], amounts)
    kh, kw = (d * (k - 1) + 1 for d, k in zip(geometry.dilation, w.shape[2:], strict=True))
    if height < kh or width < kw:
        raise RuntimeError(
            f"kernel size can't be greater than input size: the padded input is {height} x {width},"
            f" the kernel (dilation included) {kh} x {kw}"
        )


def _check_same(name: str, t: Tensor, w: Tensor) -> None:
    for kind in ("dtype", "device", "layout"):
        ours, weights = getattr(t, kind), getattr(w, kind)
        if ours != weights:
            raise RuntimeError(f"{name} {kind} {ours} and weight {kind} {weights} should be equal")
