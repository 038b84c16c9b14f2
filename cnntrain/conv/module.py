"""Interface of a convolution algorithm, and ``nn.Conv2d`` computed by one."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from cnntrain.conv.autograd import autocasts, convolve
from cnntrain.conv.geometry import NONE, Amounts, Geometry, Pair, crop, pad, padded, padding_amounts

ACCUMULATION_DTYPES = dict.fromkeys((torch.bfloat16, torch.float16), torch.float32)
ACCUMULATION_DTYPES[torch.complex32] = torch.complex64


def upcast(t: Tensor) -> Tensor:
    """t in the dtype of its sums of products: float32 for half types, else its own."""
    return t.to(ACCUMULATION_DTYPES.get(t.dtype, t.dtype))


class Algorithm(ABC):
    """A way to compute a convolution, its input gradient and its weight gradient.

    Shapes: x (N, C, H, W), already padded; w (O, C/groups, kh, kw); g, y (N, O, OH, OW). Sizes,
    dtypes and devices are checked by the caller; inputs may have any strides and must not be
    changed. Results are new tensors of the inputs' dtype, which is never a half type. None of the
    three functions needs to be differentiable.
    """

    @abstractmethod
    def forward(self, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        """y (N, O, OH, OW), without bias."""

    @abstractmethod
    def grad_input(self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry) -> Tensor:
        """dx (N, C, H, W), where input_size is (H, W)."""

    @abstractmethod
    def grad_weight(self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry) -> Tensor:
        """dw (O, C/groups, kh, kw), where kernel_size is (kh, kw)."""

    # The same for an unpadded input. An algorithm that computes the batch in parts may override
    # them, to pad one part at a time. Half types are computed in float32 and rounded once.

    def padded_forward(
        self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        y = self.forward(pad(upcast(x), zeros), upcast(w), geometry)
        return (y if bias is None else y + bias[:, None, None]).to(x.dtype)

    def padded_grad_input(
        self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        dx = self.grad_input(upcast(g), upcast(w), padded(input_size, zeros), geometry)
        return (crop(dx, zeros).clone() if any(zeros) else dx).to(g.dtype)

    def padded_grad_weight(
        self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        dw = self.grad_weight(upcast(g), pad(upcast(x), zeros), kernel_size, geometry)
        return dw.to(g.dtype)

    def traceable(self) -> Algorithm:
        """An equal algorithm for compilation, export and tensor subclasses, whose operators do not
        depend on sizes."""
        return self


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
        given = input, weight, bias
        if autocasts(input.device.type):
            input, weight = _autocast(input), _autocast(weight)
            bias = None if bias is None else _autocast(bias)
        geometry = Geometry.of(self)
        amounts = padding_amounts(self.padding, self.kernel_size, geometry.dilation)
        if self.padding_mode != "zeros":  # as in nn.Conv2d, where F.pad's errors come first
            input, amounts = pad(input, amounts, self.padding_mode), NONE
        if not _is_valid(input, weight, bias, geometry, amounts):
            super()._conv_forward(*given)  # raises nn.Conv2d's error
            raise RuntimeError(
                f"input of size {list(input.shape)} and weight of size {list(weight.shape)} should "
                "have no dimension of zero"
            )
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


def _is_valid(
    x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry, amounts: Amounts
) -> bool:
    """Whether there is such a convolution."""
    numbers = *geometry.stride, *geometry.dilation, geometry.groups
    if not all(hasattr(number, "__index__") for number in (*numbers, *amounts)):
        return False
    if min(numbers) < 1 or min(amounts) < 0:
        return False
    if w.dim() != 4 or min(w.shape) < 1 or w.shape[0] % geometry.groups:
        return False
    if bias is not None and (bias.shape != w.shape[:1] or not _are_alike(bias, w)):
        return False
    if x.dim() not in (3, 4) or x.shape[-3] != w.shape[1] * geometry.groups:
        return False
    height, width = padded(x.shape[-2:], amounts)
    kh, kw = (d * (k - 1) + 1 for d, k in zip(geometry.dilation, w.shape[2:], strict=True))
    return _are_alike(x, w) and min(x.shape[-2:]) >= 1 and height >= kh and width >= kw


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.layout == b.layout
