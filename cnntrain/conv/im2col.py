"""im2col: windows unrolled into a matrix, so that a matrix product is the convolution.

Every window of the input becomes a column of K = kh * C/groups * kw numbers, and every filter a
row of K numbers of the weight matrix W. Then

    output            Y = W @ columns
    weight gradient  dW = G @ columns^T
    input gradient   dX = col2im(W^T @ G)

where col2im adds each number to the pixel that im2col copied it from. Source: K. Chellapilla,
S. Puri, P. Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006.

For speed, columns, Y and G are cut into their OH output rows, (groups * OH) matrices multiplied by
one ``bmm``; how they lie in memory, and why, is in columns.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from cnntrain.conv.autograd import Algorithm
from cnntrain.conv.columns import (
    column_bytes,
    column_matrices,
    fold_width,
    kernel_row,
    output_from_rows,
    rows_from_output,
    unroll_width,
    weight_from_matrix,
    weight_matrix,
)
from cnntrain.conv.geometry import Geometry, Pair
from cnntrain.conv.module import Conv2d

# On CPU, columns that stay in the caches beat columns of the whole batch: lenet5's layers, batch
# 512, take 1.5 times as long without this limit. 2 MiB was best of 1, 2, 4 and 64.
CACHE_MIB = 2


@dataclass(frozen=True)
class Im2col(Algorithm):
    """The three products, for as many images at a time as ``max_column_mib`` MiB have room for."""

    max_column_mib: int = 64

    def forward(self, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        kernel = w.shape[2:]
        oh, ow = geometry.output_size(x.shape[2:], kernel)
        filters = _repeat(weight_matrix(w, geometry), oh)  # (groups * OH, O/groups, K)
        y = x.new_empty(x.shape[0], w.shape[0], oh, ow)
        for part in self._parts(x, kernel, geometry):
            columns = im2col(x[part], kernel, geometry)  # (groups * OH, K, OW * N)
            rows = torch.bmm(filters, columns)  # (groups * OH, O/groups, OW * N)
            y[part] = output_from_rows(rows, y[part].shape, geometry)
        return y

    def grad_weight(self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry) -> Tensor:
        c, o = x.shape[1] // geometry.groups, g.shape[1] // geometry.groups
        dw = g.new_zeros(geometry.groups, o, c * kernel_size[0] * kernel_size[1])
        for part in self._parts(x, kernel_size, geometry):
            columns = im2col(x[part], kernel_size, geometry)  # (groups * OH, K, OW * N)
            rows = rows_from_output(g[part], geometry)  # (groups * OH, O/groups, OW * N)
            product = torch.bmm(rows, columns.mT)  # (groups * OH, O/groups, K)
            dw += product.unflatten(0, (geometry.groups, g.shape[2])).sum(1)
        return weight_from_matrix(dw, kernel_size)

    def grad_input(self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry) -> Tensor:
        filters = weight_matrix(w, geometry).mT  # (groups, K, O/groups)
        dx = g.new_empty(g.shape[0], w.shape[1] * geometry.groups, *input_size)
        for part in self._parts(dx, w.shape[2:], geometry):
            rows = rows_from_output(g[part], geometry)  # (groups * OH, O/groups, OW * N)
            dx[part] = col2im(filters, rows, dx[part].shape, w.shape[2:], geometry)
        return dx

    def _parts(self, x: Tensor, kernel: Pair, geometry: Geometry) -> Iterator[slice]:
        """Slices of the batch whose columns stay within the limit: at the least one image's."""
        mib = min(self.max_column_mib, CACHE_MIB) if x.is_cpu else self.max_column_mib
        size = mib * 2**20 // column_bytes(x.shape, kernel, geometry, x.element_size())
        for first in range(0, max(x.shape[0], 1), max(size, 1)):  # an empty batch is one part
            yield slice(first, first + max(size, 1))


def im2col(x: Tensor, kernel: Pair, geometry: Geometry) -> Tensor:
    """(N, C, H, W) -> (groups * OH, K, OW * N): the windows of each output row as columns."""
    oh = geometry.output_size(x.shape[2:], kernel)[0]
    return column_matrices(unroll_width(x, kernel, geometry), kernel, oh, geometry)


def col2im(
    filters: Tensor, rows: Tensor, size: torch.Size, kernel: Pair, geometry: Geometry
) -> Tensor:
    """col2im(W^T @ G) (N, C, H, W), for filters W^T (groups, K, O/groups) and rows G.

    The product is made for one kernel row at a time and added in its place at once, so that the
    columns themselves, kh times larger, never exist.
    """
    groups, (oh, ow) = geometry.groups, geometry.output_size(size[2:], kernel)
    part = filters.shape[1] // kernel[0]  # C/groups * kw
    wide = rows.new_zeros(groups, size[2], part, ow * size[0])
    for i in range(kernel[0]):
        target = kernel_row(wide, i, oh, geometry)  # (groups, OH, C/groups * kw, OW * N)
        row_filters = _repeat(filters[:, i * part : (i + 1) * part], oh)
        if groups == 1:
            target[0].baddbmm_(row_filters, rows)
        else:
            target += torch.bmm(row_filters, rows).view(target.shape)
    return fold_width(wide, size, kernel, geometry)


def _repeat(matrix: Tensor, rows: int) -> Tensor:
    """(groups, A, B) -> (groups * OH, A, B): the same matrix for every output row."""
    return matrix.unsqueeze(1).expand(-1, rows, -1, -1).flatten(0, 1)


class Im2colConv2d(Conv2d):
    """``nn.Conv2d`` by im2col and a matrix product.

    Args:
        max_column_mib: MiB that the unrolled columns may take at most: a larger batch is worked
            off in parts. One image's columns are the least. The backward keeps the input, never
            the columns.
    """

    def __init__(self, *args: Any, max_column_mib: PositiveInt = 64, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.algorithm = Im2col(max_column_mib)
