"""``nn.Conv2d`` with its forward computation exchanged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnntrain.conv.autograd import Algorithm, Forward
from cnntrain.conv.geometry import Geometry, pad, padding_amounts


class Conv2d(nn.Conv2d):
    """A two-dimensional convolution computed by ``algorithm``, all else as in ``nn.Conv2d``.

    Constructor, initialisation, ``state_dict`` and errors are ``nn.Conv2d``'s, so weights move
    freely between the two. A backend is a subclass that sets ``algorithm``:

        class MyConv2d(Conv2d):
            algorithm = MyAlgorithm()

    Input (N, C, H, W) or (C, H, W); output (N, O, OH, OW) or (O, OH, OW), where
    OH = floor((H + 2 p - d (k - 1) - 1) / s) + 1, and OW alike. Under ``torch.autocast`` input,
    weight and bias are cast first.

    Raises:
        RuntimeError: wrong number of dimensions or channels, unequal dtypes, a kernel larger than
            the padded input, a stride or dilation below one, a negative padding.
        ValueError: a padding or a padding mode that does not exist (from the constructor).
    """

    algorithm: Algorithm

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not isinstance(input, Tensor):
            raise TypeError(f"the input must be a Tensor, not {type(input).__name__}")
        input, weight = _autocast(input), _autocast(weight)
        bias = None if bias is None else _autocast(bias)
        geometry = Geometry.of(self)
        amounts = padding_amounts(self.padding, self.kernel_size, geometry.dilation)
        _check(self, input, weight, bias, amounts)
        unbatched = input.dim() == 3
        x = pad(input.unsqueeze(0) if unbatched else input, amounts, self.padding_mode)
        y = Forward.apply(x, weight, geometry, self.algorithm)  # (N, O, OH, OW)
        if bias is not None:
            y = y + bias.view(-1, 1, 1)
        return y.squeeze(0) if unbatched else y


def _autocast(t: Tensor) -> Tensor:
    """Casts as autocast would for ``nn.Conv2d``: before anything is unrolled."""
    device = t.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return t
    if not t.is_floating_point() or t.dtype == torch.float64:  # autocast leaves these alone
        return t
    return t.to(torch.get_autocast_dtype(device))


def _check(
    conv: nn.Conv2d, x: Tensor, w: Tensor, bias: Tensor | None, padding: tuple[int, int, int, int]
) -> None:
    """Raises what ``nn.Conv2d`` would raise for this input."""
    if w.dim() != 4 or min(w.shape) < 1:
        raise RuntimeError(
            f"weight of size {list(w.shape)} (out_channels, in_channels / groups, height, width) "
            f"should have two kernel sizes and no dimension of zero"
        )
    if x.dim() not in (3, 4):
        raise RuntimeError(
            f"expected 3D (unbatched) or 4D (batched) input, got input of size {list(x.shape)}"
        )
    if x.shape[-3] != conv.in_channels:
        raise RuntimeError(
            f"weight of size {list(w.shape)} with groups={conv.groups} expects input "
            f"{list(x.shape)} to have {conv.in_channels} channels, but it has {x.shape[-3]}"
        )
    if x.dtype != w.dtype or (bias is not None and bias.dtype != w.dtype):
        raise RuntimeError(
            f"input type {x.dtype}, weight type {w.dtype} and bias type "
            f"{None if bias is None else bias.dtype} should be the same"
        )
    if conv.padding_mode == "zeros" and min(padding) < 0:
        raise RuntimeError(f"negative padding={conv.padding} is not supported")
    if min(*conv.stride, *conv.dilation) < 1:
        raise RuntimeError(
            f"stride={conv.stride} and dilation={conv.dilation} should be greater than zero"
        )
    left, right, top, bottom = padding
    padded = x.shape[-2] + top + bottom, x.shape[-1] + left + right
    reach = tuple(d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise RuntimeError(
            f"kernel size can't be greater than input size: the padded input is "
            f"{padded[0]} x {padded[1]}, the kernel (dilation included) {reach[0]} x {reach[1]}"
        )
