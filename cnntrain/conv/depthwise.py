"""A depthwise convolution as matrix products.

Each channel has a filter of its own, which columns would be multiplied by for nothing but that one
row of numbers. So the sides change: of a channel, the pixels that a block of Q output pixels sees
become a row of P numbers for each image, and the filter a Toeplitz matrix T (P, Q), whose column q
holds the weights at the pixels that output pixel q sees, and zeros. Then

    output            Y  = X @ T
    input gradient    dX = G @ T^T
    weight gradient   dT = X^T @ G, where all entries that are the same weight are added

with X (N, P) and G, Y (N, Q), for all channels in one ``bmm``. Since zeros are multiplied as well,
blocks are small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from cnntrain.conv.geometry import Geometry, Pair

# Output pixels of a block: at most in a row, at least in all. Best of 16 to 96.
ROW, PIXELS = 48, 32


def forward(x: Tensor, w: Tensor, how: Geometry, room: int) -> Tensor:
    """y (N, C, OH, OW) for x (N, C, H, W) and w (C, 1, kh, kw).

    room: bytes that matrices may take at a time; those of one channel are the least.
    """
    y = x.new_empty(*x.shape[:2], *how.output_size(x.shape[2:], w.shape[2:]))
    for block, places in _blocks(y.shape, w, how, room):
        toeplitz = block.toeplitz(w[places[0][0][1]])
        for here, there in places:
            pixels = torch.bmm(_by_channel(x[here]), toeplitz)
            y[there] = pixels.view(len(pixels), x.shape[0], *block.made).transpose(0, 1)
    return y


def grad_input(g: Tensor, w: Tensor, input_size: Pair, how: Geometry, room: int) -> Tensor:
    """dx (N, C, H, W) for g (N, C, OH, OW) and w (C, 1, kh, kw)."""
    dx = g.new_zeros(*g.shape[:2], *input_size)
    for block, places in _blocks(g.shape, w, how, room):
        transposed = block.toeplitz(w[places[0][0][1]]).mT.contiguous()
        for here, there in places:
            pixels = torch.bmm(_by_channel(g[there]), transposed)
            dx[here] += pixels.view(len(pixels), g.shape[0], *block.met).transpose(0, 1)
    return dx


def grad_weight(g: Tensor, x: Tensor, kernel_size: Pair, how: Geometry, room: int) -> Tensor:
    """dw (C, 1, kh, kw) for g (N, C, OH, OW) and x (N, C, H, W)."""
    dw = g.new_zeros(x.shape[1], 1, *kernel_size)
    for block, places in _blocks(g.shape, dw, how, room):
        channels = places[0][0][1]
        toeplitz = block.toeplitz(dw[channels]).zero_()
        for here, there in places:
            toeplitz.baddbmm_(_by_channel(x[here]).mT, _by_channel(g[there]))
        for i, j in product(*map(range, kernel_size)):
            dw[channels, 0, i, j] += block.entries(toeplitz, i, j).sum((1, 2))
    return dw


@dataclass(frozen=True)
class Block:
    """Blocks of one size: (rows, columns) of the output that are made, and of the input that are
    met. Of a single row with a dilated kernel, only the input rows under a tap count as met."""

    made: Pair
    met: Pair
    steps: tuple[int, int, int, int]  # from tap to tap (down, right), output to output pixel

    def toeplitz(self, w: Tensor) -> Tensor:
        """(C, 1, kh, kw) -> (C, P, Q)"""
        (rows, columns), (height, width) = self.met, self.made
        matrices = w.new_zeros(w.shape[0], rows * columns, height * width)
        for i, j in product(*map(range, w.shape[2:])):
            self.entries(matrices, i, j).copy_(w[:, 0, i, j, None, None])
        return matrices

    def entries(self, matrices: Tensor, i: int, j: int) -> Tensor:
        """What is weight (i, j) in matrices (C, P, Q): a view (C, rows, columns of the output)."""
        (rows, columns), (height, width) = self.met, self.made
        down, right, below, beside = self.steps
        q = height * width
        return matrices.as_strided(
            (matrices.shape[0], height, width),
            (rows * columns * q, below * columns * q + width, beside * q + 1),
            (i * down * columns + j * right) * q,
        )


Index = tuple[slice, slice, slice, slice]


def _blocks(
    size: tuple[int, ...], w: Tensor, how: Geometry, room: int
) -> Iterator[tuple[Block, list[tuple[Index, Index]]]]:
    """For an output of size (N, C, OH, OW): blocks, and where in input and output they lie. The
    same channels are meant in all places of one block."""
    n, c, oh, ow = size
    (sh, sw), (dh, dw), (kh, kw) = how.stride, how.dilation, w.shape[2:]
    row = -(-ow // -(-ow // ROW))
    height = 1 if dh > 1 else min(oh, -(-PIXELS // row))
    for (rows, tops), (columns, lefts) in product(_cut(oh, height), _cut(ow, row)):
        step = dh if rows == 1 else 1
        down, right = sh * (rows - 1) + dh * (kh - 1), sw * (columns - 1) + dw * (kw - 1)
        met = down // step + 1, right + 1
        block = Block((rows, columns), met, (dh // step, dw, sh, sw))
        p, q = met[0] * met[1], rows * columns
        fit = max(1, room // ((2 * p * q + n * (p + q)) * w.element_size()))
        fit = -(-c // -(-c // fit))  # parts of about one size
        for first in range(0, c, fit):
            part = slice(None), slice(first, min(first + fit, c))
            places = []
            for top, left in product(tops, lefts):
                there = slice(top, top + rows), slice(left, left + columns)
                here = (
                    slice(top * sh, top * sh + step * (met[0] - 1) + 1, step),
                    slice(left * sw, left * sw + met[1]),
                )
                places.append(((*part, *here), (*part, *there)))
            yield block, places


def _cut(length: int, size: int) -> list[tuple[int, list[int]]]:
    """Sizes of parts with the places where they start: all of one size, but for the last."""
    whole = length - length % size
    parts = [(size, list(range(0, whole, size))), (length - whole, [whole])]
    return [(size, starts) for size, starts in parts if size and starts]


def _by_channel(t: Tensor) -> Tensor:
    """(N, C, H, W) -> (C, N, H * W), a view where rows are whole and follow one another"""
    return t.transpose(0, 1).flatten(2)
