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

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from cnntrain.conv import depthwise
from cnntrain.conv.autograd import Algorithm
from cnntrain.conv.columns import Index, layout, tiles
from cnntrain.conv.geometry import Geometry, Pair
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


def input_gradient(g: Tensor, w: Tensor, size: tuple[int, ...], how: Geometry) -> Tensor:
    """dX = col2im(W^T @ G)"""
    matrices = layout(size, w.shape[2:], how)
    return matrices.col2im(w, matrices.rows(g))


@dataclass(frozen=True)
class Im2col(Algorithm):
    """The three products, for as much of the input at a time as ``max_column_mib`` has room for."""

    max_column_mib: int = 64

    def forward(self, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        if is_depthwise(w, geometry):
            return depthwise.forward(x, w, geometry, self._room(x))
        tiles = self._tiles(x, x.shape, w.shape[2:], geometry)
        if len(tiles) == 1:
            return output(x, w, geometry).contiguous()
        y = x.new_empty(x.shape[0], w.shape[0], *geometry.output_size(x.shape[2:], w.shape[2:]))
        for here, there in tiles:
            y[there] = output(x[here], w, geometry)
        return y

    def grad_weight(self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry) -> Tensor:
        dw = g.new_zeros(g.shape[1], x.shape[1] // geometry.groups, *kernel_size)
        if is_depthwise(dw, geometry):
            return depthwise.grad_weight(g, x, kernel_size, geometry, self._room(x))
        for here, there in self._tiles(x, x.shape, kernel_size, geometry):
            dw += weight_gradient(g[there], x[here], kernel_size, geometry)
        return dw

    def grad_input(self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry) -> Tensor:
        if is_depthwise(w, geometry):
            return depthwise.grad_input(g, w, input_size, geometry, self._room(g))
        if is_cheaper_as_forward(g, w, input_size, geometry):
            (kh, kw), (dh, dw) = w.shape[2:], geometry.dilation
            padded = F.pad(g, (dw * (kw - 1), dw * (kw - 1), dh * (kh - 1), dh * (kh - 1)))
            return self.forward(padded, w.flip(2, 3).transpose(0, 1), geometry)
        size = (g.shape[0], w.shape[1] * geometry.groups, *input_size)
        tiles = self._tiles(g, size, w.shape[2:], geometry)
        if len(tiles) == 1:
            return input_gradient(g, w, size, geometry).contiguous()
        overlap = len(tiles[0][0]) > 1  # tiles of an image do, parts of the batch do not
        dx = g.new_zeros(size) if overlap else g.new_empty(size)
        for here, there in tiles:
            tile = dx[here]
            pixels = input_gradient(g[there], w, tile.shape, geometry)
            tile.copy_(tile + pixels if overlap else pixels)
        return dx

    def _tiles(
        self, like: Tensor, size: tuple[int, ...], kernel: Pair, how: Geometry
    ) -> list[tuple[Index, Index]]:
        room = self.max_column_mib * 2**20 // like.element_size()
        if not like.is_cpu:
            return tiles(size, kernel, how, room)
        return tiles(size, kernel, how, room, CACHE_MIB * 2**20 // like.element_size())

    def _room(self, like: Tensor) -> int:
        """Bytes for the matrices of a depthwise convolution."""
        mib = min(self.max_column_mib, CACHE_MIB) if like.is_cpu else self.max_column_mib
        return mib * 2**20


def is_depthwise(w: Tensor, how: Geometry) -> bool:
    return how.groups == w.shape[0] > 1 and w.shape[1] == 1


def is_cheaper_as_forward(g: Tensor, w: Tensor, size: Pair, how: Geometry) -> bool:
    """Whether the input gradient should be computed as what it is for a stride of one: the
    convolution of the padded output gradient with the flipped filters.

    Its windows also lie over the padding, but its products are longer, and nothing is added.
    """
    more = size[0] * size[1] / (g.shape[2] * g.shape[3])
    return how.stride == (1, 1) and how.groups == 1 and w.shape[1] >= 16 and 1 < more <= 1.2


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
