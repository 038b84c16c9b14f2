"""im2col: windows unrolled into a matrix, so that a matrix product is the convolution.

Every window of the input becomes a column of K = C/groups * kh * kw numbers, and every filter a
row of K numbers of the weight matrix W. Then

    output            Y = W @ columns
    weight gradient  dW = G @ columns^T
    input gradient   dX = col2im(W^T @ G)

where col2im adds each number to the pixel that im2col copied it from. Source: K. Chellapilla,
S. Puri, P. Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006.

How the matrices lie in memory, such that little has to be copied, is the business of a layout
(columns.py), which may also cut K into parts. Depthwise convolutions have depthwise.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from cnntrain.conv import depthwise
from cnntrain.conv.autograd import Algorithm
from cnntrain.conv.columns import RUN, Index, batches, layout, tiles
from cnntrain.conv.geometry import NONE, Amounts, Geometry, Pair, crop, pad, padded
from cnntrain.conv.module import Conv2d

# On CPU, what stays in the caches is fastest. Best of 1, 2, 4, 8.
CACHE_MIB = 4


def output(x: Tensor, w: Tensor, how: Geometry) -> Tensor:
    """Y = W @ columns"""
    matrices = layout(x.shape, w.shape[2:], how)
    filters, columns = matrices.filters(w), matrices.columns(x)
    rows = torch.bmm(filters[0], columns[0])
    for more_filters, more_columns in zip(filters[1:], columns[1:], strict=True):
        rows.baddbmm_(more_filters, more_columns)
    return matrices.output(rows)


def weight_gradient(g: Tensor, x: Tensor, kernel: Pair, how: Geometry) -> Tensor:
    """dW = G @ columns^T"""
    matrices = layout(x.shape, kernel, how)
    return matrices.weight(matrices.correlate(g, x))


def input_gradient(g: Tensor, w: Tensor, plane: Pair, how: Geometry) -> Tensor:
    """dX = col2im(W^T @ G)"""
    matrices = layout((len(g), w.shape[1] * how.groups, *plane), w.shape[2:], how)
    return matrices.col2im(w, matrices.rows(g))


@dataclass(frozen=True)
class Im2col(Algorithm):
    """The three products, for as much of the input at a time as ``max_column_mib`` has room for.

    A part of the batch is padded when its turn comes: all of it at once would not stay in the
    caches, and take longer than many a product.
    """

    max_column_mib: int = 64

    def forward(self, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        return self.padded_forward(x, w, geometry, NONE)

    def grad_input(self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry) -> Tensor:
        return self.padded_grad_input(g, w, input_size, geometry, NONE)

    def grad_weight(self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry) -> Tensor:
        return self.padded_grad_weight(g, x, kernel_size, geometry, NONE)

    def padded_forward(self, x: Tensor, w: Tensor, geometry: Geometry, zeros: Amounts) -> Tensor:
        make = self._of(w, geometry, output, depthwise.forward)
        size = (*x.shape[:2], *padded(x.shape[2:], zeros))
        parts = self._parts(x, size, w, geometry)
        if len(parts) == 1:
            return make(pad(x, zeros), w, geometry).contiguous()
        y = x.new_empty(len(x), len(w), *geometry.output_size(size[2:], w.shape[2:]))
        if _are_tiles(parts):
            x, zeros = pad(x, zeros), NONE
        for here, there in parts:
            y[there] = make(pad(x[here], zeros), w, geometry)
        return y

    def padded_grad_weight(
        self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        dw = g.new_zeros(g.shape[1], x.shape[1] // geometry.groups, *kernel_size)
        make = self._of(dw, geometry, weight_gradient, depthwise.grad_weight)
        parts = self._parts(x, (*x.shape[:2], *padded(x.shape[2:], zeros)), dw, geometry)
        if _are_tiles(parts):
            x, zeros = pad(x, zeros), NONE
        for here, there in parts:
            dw += make(g[there], pad(x[here], zeros), kernel_size, geometry)
        return dw

    def padded_grad_input(
        self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        if is_cheaper_as_forward(g, w, input_size, geometry):
            (left, right, top, bottom), (kh, kw) = zeros, w.shape[2:]
            down, over = geometry.dilation[0] * (kh - 1), geometry.dilation[1] * (kw - 1)
            around = over - left, over - right, down - top, down - bottom
            return self.padded_forward(g, w.flip(2, 3).transpose(0, 1), geometry, around)
        make = self._of(w, geometry, input_gradient, depthwise.grad_input)
        channels, plane = w.shape[1] * geometry.groups, padded(input_size, zeros)
        parts = self._parts(g, (len(g), channels, *plane), w, geometry)
        if len(parts) == 1:
            return crop(make(g, w, plane, geometry), zeros).contiguous()
        if _are_tiles(parts):  # which overlap
            dx = g.new_zeros(len(g), channels, *plane)
            for here, there in parts:
                dx[here] += make(g[there], w, dx[here].shape[2:], geometry)
            return crop(dx, zeros).contiguous()
        dx = g.new_empty(len(g), channels, *input_size)
        for here, there in parts:
            dx[here] = crop(make(g[there], w, plane, geometry), zeros)
        return dx

    def _of(
        self, w: Tensor, how: Geometry, usual: Callable[..., Tensor], special: Callable[..., Tensor]
    ) -> Callable[..., Tensor]:
        return partial(special, room=self._room(w)) if is_depthwise(w, how) else usual

    def _parts(
        self, like: Tensor, size: tuple[int, ...], w: Tensor, how: Geometry
    ) -> list[tuple[Index, Index]]:
        """Indices into a padded input of this size and into its output."""
        limit = self.max_column_mib * 2**20 // like.element_size()
        cache = CACHE_MIB * 2**20 // like.element_size() if like.is_cpu else limit
        if is_depthwise(w, how):  # a part's input and output, and matrices of half their size
            image = math.prod(size[1:])
            return batches(size[0], max(1, min(limit // (3 * image), max(cache // image, 4 * RUN))))
        return tiles(size, w.shape[2:], how, limit, cache)

    def _room(self, like: Tensor) -> int:
        """Bytes for the matrices of a depthwise convolution."""
        mib = min(self.max_column_mib, CACHE_MIB) if like.is_cpu else self.max_column_mib
        return mib * 2**20


def _are_tiles(parts: list[tuple[Index, Index]]) -> bool:
    """Whether parts are tiles of single images."""
    return len(parts[0][0]) > 1


def is_depthwise(w: Tensor, how: Geometry) -> bool:
    return how.groups == w.shape[0] > 1 and w.shape[1] == 1


def is_cheaper_as_forward(g: Tensor, w: Tensor, input_size: Pair, how: Geometry) -> bool:
    """Whether the input gradient should be computed as what it is for a stride of one: the
    convolution of the padded output gradient with the flipped filters.

    Its products are longer, and nothing is added; but there are as many as input pixels.
    """
    more = math.prod(input_size) / math.prod(g.shape[2:])
    large = w.shape[1] >= 16 and math.prod(w.shape[2:]) > 1
    return how.stride == (1, 1) and how.groups == 1 and large and more <= 1.2


class Im2colConv2d(Conv2d):
    """``nn.Conv2d`` by im2col and a matrix product.

    Args:
        max_column_mib: MiB that the unrolled columns may take at most: a larger batch, or a larger
            image, is worked off in parts. One window's column is the least. The backward keeps the
            input, never the columns.
    """

    def __init__(self, *args: Any, max_column_mib: PositiveInt = 64, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.algorithm = Im2col(max_column_mib)
