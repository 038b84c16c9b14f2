"""Geometry of a convolution: stride, dilation, groups, padding, output size, MACs."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, ...]  # (height, width); wide enough a type for torch.Size
Amounts = tuple[int, int, int, int]  # pixels at (left, right, top, bottom)
NONE = (0, 0, 0, 0)


@dataclass(frozen=True)
class Geometry:
    """Steps of the window over an already padded input.

    Attributes:
        stride: steps of the window, in pixels, (down, right).
        dilation: distances between the kernel's elements, in pixels, (down, right).
        groups: number of independent convolutions that the channels are divided among.
    """

    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """The geometry of an ``nn.Conv2d`` or a backend."""
        return cls(_pair(conv.stride), _pair(conv.dilation), conv.groups)

    def output_size(self, input_size: Pair, kernel_size: Pair) -> tuple[int, int]:
        """(height, width) of the output for a padded input: floor((H - d (k - 1) - 1) / s) + 1."""
        (h, w), (kh, kw), (sh, sw), (dh, dw) = input_size, kernel_size, self.stride, self.dilation
        return (h - dh * (kh - 1) - 1) // sh + 1, (w - dw * (kw - 1) - 1) // sw + 1

    def reach(self, i: int, j: int, output_size: Pair) -> tuple[slice, slice]:
        """Rows and columns of the padded input under element (i, j) of the kernel."""
        (oh, ow), (sh, sw), (dh, dw) = output_size, self.stride, self.dilation
        top, left = i * dh, j * dw
        return slice(top, top + sh * (oh - 1) + 1, sh), slice(left, left + sw * (ow - 1) + 1, sw)

    def filter_matrix(self, w: Tensor) -> Tensor:
        """(O, C/groups, kh, kw) -> (groups, O/groups, K), K = C/groups * kh * kw"""
        return w.flatten(1).unflatten(0, (self.groups, -1))

    def macs(
        self, in_channels: int, out_channels: int, kernel_size: Pair, output_size: Pair
    ) -> int:
        """Multiply-accumulates for one image: kw kh c_in / groups c_out oh ow, bias not counted."""
        (kh, kw), (oh, ow) = kernel_size, output_size
        return kw * kh * in_channels // self.groups * out_channels * oh * ow


def padding_amounts(
    padding: str | int | tuple[int, ...], kernel_size: Pair, dilation: Pair
) -> Amounts:
    """Pixels to add at (left, right, top, bottom), as ``F.pad`` takes them.

    'same' adds d (k - 1) in all; where that is odd, the extra pixel goes to the right and the
    bottom, as in ``nn.Conv2d``.
    """
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        down, right = (d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True))
        return right // 2, right - right // 2, down // 2, down - down // 2
    assert not isinstance(padding, str), padding  # nn.Conv2d's constructor refuses other strings
    top, left = _pair(padding)
    return left, left, top, top


def padded(size: Pair, amounts: Amounts) -> tuple[int, int]:
    """(height, width) with padding."""
    left, right, top, bottom = amounts
    return size[0] + top + bottom, size[1] + left + right


def crop(x: Tensor, amounts: Amounts) -> Tensor:
    """The pixels of (N, C, H, W) without padding: a view."""
    left, right, top, bottom = amounts
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


def pad(x: Tensor, amounts: Amounts, mode: str = "zeros") -> Tensor:
    """Pads (N, C, H, W); the mode is 'zeros', 'reflect', 'replicate' or 'circular'."""
    if not any(amounts):
        return x
    return F.pad(x, amounts, mode="constant" if mode == "zeros" else mode)


def batch_last(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (C, H, W, N), contiguous"""
    return x.flatten(1).t().contiguous().view(*x.shape[1:], -1)


def batch_first(x: Tensor) -> Tensor:
    """(C, H, W, N) -> (N, C, H, W), contiguous"""
    return x.flatten(0, 2).t().contiguous().view(-1, *x.shape[:3])


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) == 1:
        return value[0], value[0]
    if len(value) != 2:
        raise RuntimeError(f"expected one or two values, (down, right), but got {tuple(value)}")
    return value[0], value[1]
