"""A depthwise convolution as matrix products.

Each channel has a filter of its own, so columns would be multiplied by one row of numbers only.
Instead, row i of a channel's filter becomes a band matrix (W, OW): its column q holds the kw
weights, at the pixels sw q + dw j that output pixel q sees. Then

    output            Y  = sum over i of X_i @ band_i         X_i: the rows that kernel row i meets
    weight gradient   dw = the diagonals of X_i^T @ G
    input gradient    dX = G @ band_i^T, added to the rows X_i

for all images and channels. Nothing is unrolled, but zeros are multiplied: so long rows are cut
into blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnntrain.conv.geometry import Geometry, Pair

BLOCK = 32  # output pixels: fewer multiply fewer zeros, more make fewer products


def forward(x: Tensor, w: Tensor, how: Geometry, room: int) -> Tensor:
    """y (N, C, OH, OW) for x (N, C, H, W) and w (C, 1, kh, kw).

    room: bytes that band matrices may take at a time.
    """
    x = x.contiguous()
    y = x.new_zeros(*x.shape[:2], *how.output_size(x.shape[2:], w.shape[2:]))
    for planes, met, made in _blocks(y.shape, w, how, room):
        bands = _bands(planes.filters(w), met, made, how)
        rows = _rows(planes.of(x)[..., met], len(bands), y.shape[2], how)
        for target, *under in zip(planes.of(y)[..., made], *rows, strict=True):
            _add_products(target, under, bands.unbind())
    return y


def grad_weight(g: Tensor, x: Tensor, kernel_size: Pair, how: Geometry, room: int) -> Tensor:
    """dw (C, 1, kh, kw) for g (N, C, OH, OW) and x (N, C, H, W)."""
    g, x = g.contiguous(), x.contiguous()
    dw = g.new_zeros(x.shape[1], 1, *kernel_size)
    for planes, met, made in _blocks(g.shape, dw, how, room):
        sums = torch.zeros_like(_bands(planes.filters(dw), met, made, how))
        rows = _rows(planes.of(x)[..., met], len(sums), g.shape[2], how)
        for gradient, *under in zip(planes.of(g)[..., made], *rows, strict=True):
            for total, row in zip(sums, under, strict=True):
                total.baddbmm_(row.mT, gradient)
        sums = sums.unflatten(1, (planes.images, -1)).sum(1)  # (kh, C, W, OW)
        for j in range(kernel_size[1]):
            dw[planes.channels, 0, :, j] += _diagonal(sums, j, how).sum(-1).t()
    return dw


def grad_input(g: Tensor, w: Tensor, input_size: Pair, how: Geometry, room: int) -> Tensor:
    """dx (N, C, H, W) for g (N, C, OH, OW) and w (C, 1, kh, kw)."""
    g = g.contiguous()
    (sh, _), (dh, _), kh = how.stride, how.dilation, w.shape[2]
    dx = g.new_zeros(*g.shape[:2], *input_size)
    above, height = dh * (kh - 1) // sh, -(-input_size[0] // sh)
    taps = [[i for i in range(kh) if i * dh % sh == start] for start in range(sh)]
    for planes, met, made in _blocks(g.shape, w, how, room):
        bands = _bands(planes.filters(w), met, made, how).mT.contiguous()
        gradients, target = planes.of(g)[..., made], planes.of(dx)[..., met]
        # Between rows of zeros, so that every input row has an output row for each i.
        padded = g.new_zeros(gradients.shape[1], above + height, gradients.shape[3])
        for gradient, pixels in zip(gradients, target, strict=True):
            padded[:, above : above + g.shape[2]] = gradient
            for start in range(sh):
                part = pixels[:, start::sh]
                first = [above - i * dh // sh for i in taps[start]]
                rows = [padded[:, up : up + part.shape[1]] for up in first]
                _add_products(part, rows, [bands[i] for i in taps[start]])
    return dx


def _add_products(target: Tensor, rows: Sequence[Tensor], bands: Sequence[Tensor]) -> None:
    """target += sum of rows @ bands, made in contiguous memory, where bmm is fast."""
    total = target if target.is_contiguous() else torch.zeros_like(target)
    for row, band in zip(rows, bands, strict=True):
        total.baddbmm_(row, band)
    if total is not target:
        target += total


@dataclass(frozen=True)
class Planes:
    """Channels, of so many images at a time."""

    channels: slice
    images: int

    def of(self, t: Tensor) -> Tensor:
        """(N, C, H, W), contiguous -> a view (N / images, images * channels, H, W)"""
        n, c, h, w = t.shape
        return t.view(n // self.images, self.images * c, h, w)[:, self.channels]

    def filters(self, w: Tensor) -> Tensor:
        return w[self.channels].repeat(self.images, 1, 1, 1)


def _blocks(
    size: tuple[int, ...], w: Tensor, how: Geometry, room: int
) -> Iterator[tuple[Planes, slice, slice]]:
    """What a set of band matrices serves, for an output of size (N, C, OH, OW): planes, the
    input's columns that are met and the output's that are made."""
    n, c, _, ow = size
    kh, kw = w.shape[2:]
    for first in range(0, ow, BLOCK):
        made = slice(first, min(first + BLOCK, ow))
        last = how.stride[1] * (made.stop - 1) + how.dilation[1] * (kw - 1)
        met = slice(how.stride[1] * first, last + 1)
        band = kh * (met.stop - met.start) * (made.stop - made.start) * w.element_size()
        fit = max(1, room // band)
        if fit >= c:
            images = max((k for k in range(1, fit // c + 1) if n % k == 0), default=1)
            yield Planes(slice(None), images), met, made
        else:
            for channel in range(0, c, fit):
                yield Planes(slice(channel, min(channel + fit, c)), 1), met, made


def _rows(planes: Tensor, kh: int, oh: int, how: Geometry) -> list[Tensor]:
    """What each row of the kernel meets: views (., ., OH, W) of planes (., ., H, W)."""
    starts = [i * how.dilation[0] for i in range(kh)]
    return [planes[:, :, i : i + how.stride[0] * (oh - 1) + 1 : how.stride[0]] for i in starts]


def _bands(w: Tensor, met: slice, made: slice, how: Geometry) -> Tensor:
    """(C, 1, kh, kw) -> (kh, C, W, OW)"""
    c, _, kh, kw = w.shape
    bands = w.new_zeros(kh, c, met.stop - met.start, made.stop - made.start)
    for j in range(kw):
        _diagonal(bands, j, how).copy_(w[:, 0, :, j].t().unsqueeze(-1))
    return bands


def _diagonal(bands: Tensor, j: int, how: Geometry) -> Tensor:
    """The numbers (kh, C, OW) of bands (kh, C, W, OW) that are weight j: a view."""
    kh, c, reach, length = bands.shape
    return bands.as_strided(
        (kh, c, length),
        (c * reach * length, reach * length, how.stride[1] * length + 1),
        j * how.dilation[1] * length,
    )
