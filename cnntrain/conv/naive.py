"""Naive convolution: a window slides over the input, one output position after the other.

At every position the filters are multiplied with the pixels under the window, for all images at
once. The batch is the last dimension, so that these pixels are long contiguous runs in memory.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from cnntrain.conv.geometry import Geometry, Pair, batch_first, batch_last
from cnntrain.conv.module import Algorithm, Conv2d


class Naive(Algorithm):
    """For each output position, filters times the K = C/groups * kh * kw numbers under the window:
    a matrix product for each group, all groups in one ``bmm``."""

    def forward(self, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        x = batch_last(x)  # (C, H, W, N)
        filters = geometry.filter_matrix(w)  # (groups, O/groups, K)
        oh, ow = geometry.output_size(x.shape[1:3], w.shape[2:])
        y = x.new_empty(*filters.shape[:2], oh, ow, x.shape[3])
        for row in range(oh):
            for column in range(ow):
                under = window(x, row, column, w.shape[2:], geometry)  # (C, kh, kw, N)
                under = under.reshape(geometry.groups, filters.shape[2], -1)  # (groups, K, N)
                y[:, :, row, column] = torch.bmm(filters, under)
        return batch_first(y.flatten(0, 1))

    def grad_input(self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry) -> Tensor:
        oh, ow = g.shape[2:]
        g = batch_last(g).unflatten(0, (geometry.groups, -1))  # (groups, O/groups, OH, OW, N)
        filters = geometry.filter_matrix(w).mT  # (groups, K, O/groups)
        dx = g.new_zeros(w.shape[1] * geometry.groups, *input_size, g.shape[4])  # (C, H, W, N)
        for row in range(oh):
            for column in range(ow):
                under = window(dx, row, column, w.shape[2:], geometry)  # a view: (C, kh, kw, N)
                under += torch.bmm(filters, g[:, :, row, column]).view(under.shape)
        return batch_first(dx)

    def grad_weight(self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry) -> Tensor:
        o, oh, ow = g.shape[1:]
        x = batch_last(x)  # (C, H, W, N)
        g = batch_last(g).unflatten(0, (geometry.groups, -1))  # (groups, O/groups, OH, OW, N)
        k = x.shape[0] // geometry.groups * kernel_size[0] * kernel_size[1]
        dw = g.new_zeros(geometry.groups, o // geometry.groups, k)
        for row in range(oh):
            for column in range(ow):
                under = window(x, row, column, kernel_size, geometry)  # (C, kh, kw, N)
                under = under.reshape(geometry.groups, k, -1)  # (groups, K, N)
                dw.baddbmm_(g[:, :, row, column], under.mT)
        return dw.view(o, -1, *kernel_size)


def window(x: Tensor, row: int, column: int, kernel: Pair, geometry: Geometry) -> Tensor:
    """The window of output position (row, column) in x (C, H, W, N): a view (C, kh, kw, N)."""
    (kh, kw), (dh, dw) = kernel, geometry.dilation
    top, left = row * geometry.stride[0], column * geometry.stride[1]
    return x[:, top : top + dh * (kh - 1) + 1 : dh, left : left + dw * (kw - 1) + 1 : dw]


class NaiveConv2d(Conv2d):
    """``nn.Conv2d`` by sliding windows. Slow for large outputs."""

    algorithm = Naive()


def conv2d_reference(
    x: Tensor, w: Tensor, bias: Tensor | None = None, geometry: Geometry | None = None
) -> list:
    """The convolution in float64, one multiplication at a time: nested lists [N][O][OH][OW].

    Slow: for checks only. x (N, C, H, W) is already padded, w (O, C/groups, kh, kw), bias (O,).
    """
    geometry = geometry or Geometry()
    (sh, sw), (dh, dw) = geometry.stride, geometry.dilation
    (filters, *kernel), (rows, columns) = w.shape, geometry.output_size(x.shape[2:], w.shape[2:])
    image, weight = x.tolist(), w.tolist()

    def number(n: int, o: int, r: int, q: int) -> float:
        total = 0.0 if bias is None else bias[o].item()
        first = o // (filters // geometry.groups) * kernel[0]  # channel that the group starts at
        for c, i, j in product(*map(range, kernel)):
            total += weight[o][c][i][j] * image[n][first + c][r * sh + i * dh][q * sw + j * dw]
        return total

    return [
        [
            [[number(n, o, r, q) for q in range(columns)] for r in range(rows)]
            for o in range(filters)
        ]
        for n in range(len(x))
    ]
