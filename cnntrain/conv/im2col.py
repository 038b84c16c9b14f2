"""im2col: a convolution as a matrix product, with windows unrolled into columns.

Every window of the input becomes a column of K = C/groups * kh * kw numbers, and every filter a
row of K numbers of the weight matrix W. Then

    output            Y = W @ columns
    weight gradient  dW = G @ columns^T
    input gradient   dX = col2im(W^T @ G)

where col2im adds each number to the pixel that im2col copied it from. Source: K. Chellapilla,
S. Puri, P. Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006.

`Unfolded` is the textbook's form. `Im2col` computes the same in parts that fit into a memory limit,
with memory layouts that copy less (columns.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from cnntrain.conv.columns import Layout, layout
from cnntrain.conv.geometry import Amounts, Geometry, Pair, crop, pad, padded
from cnntrain.conv.module import Algorithm, Conv2d, upcast

# On a CPU, parts that fit into its caches are fastest. Best of 6, 8, 10, 12 and 16.
CACHE_MIB = 16
# Parts have a multiple of this number of images: where the batch is the innermost dimension in
# memory, whole vectors of images are copied and multiplied.
RUN = 16


class Unfolded(Algorithm):
    """im2col of the whole batch: one matrix of columns, one product for each group.

    No operator depends on the size of the input, so that a traced graph holds for any size.
    """

    def forward(self, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        oh, ow = geometry.output_size(x.shape[2:], w.shape[2:])
        y = torch.bmm(geometry.filter_matrix(w), _columns(x, w.shape[2:], geometry))
        return y.view(w.shape[0], x.shape[0], oh, ow).transpose(0, 1).contiguous()

    def grad_input(self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry) -> Tensor:
        (n, _, oh, ow), (_, depth, kh, kw) = g.shape, w.shape
        (sh, sw), (dh, dw) = geometry.stride, geometry.dilation
        columns = torch.bmm(geometry.filter_matrix(w).mT, _rows(g, geometry))
        columns = columns.view(depth * geometry.groups, kh, kw, n, oh, ow)
        dx = g.new_zeros(columns.shape[0], n, *input_size)
        channel, image, row, _ = dx.stride()
        for i, j in product(range(kh), range(kw)):  # col2im
            # The pixels under element (i, j) of the kernel. With slices, whose ends are clamped, a
            # traced graph would hold for one remainder of the size by the stride only.
            steps, first = (channel, image, sh * row, sw), i * dh * row + j * dw
            dx.as_strided((columns.shape[0], n, oh, ow), steps, first).add_(columns[:, i, j])
        return dx.transpose(0, 1).contiguous()

    def grad_weight(self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry) -> Tensor:
        dw = torch.bmm(_rows(g, geometry), _columns(x, kernel_size, geometry).mT)
        return dw.view(g.shape[1], x.shape[1] // geometry.groups, *kernel_size)


def _columns(x: Tensor, kernel_size: Pair, geometry: Geometry) -> Tensor:
    """im2col: (N, C, H, W) -> (groups, K, N * OH * OW)"""
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, geometry.stride, geometry.dilation
    windows = x.unfold(2, dh * (kh - 1) + 1, sh).unfold(3, dw * (kw - 1) + 1, sw)
    windows = windows[..., ::dh, ::dw]  # (N, C, OH, OW, kh, kw), a view
    # Not `reshape`: whether it copies depends on the size, which would specialise a traced graph.
    columns = windows.permute(1, 4, 5, 0, 2, 3).clone(memory_format=torch.contiguous_format)
    return columns.view(geometry.groups, x.shape[1] // geometry.groups * kh * kw, -1)


def _rows(g: Tensor, geometry: Geometry) -> Tensor:
    """(N, O, OH, OW) -> (groups, O/groups, N * OH * OW)"""
    return g.transpose(0, 1).flatten(1).unflatten(0, (geometry.groups, -1))


@dataclass(frozen=True)
class Im2col(Unfolded):
    """im2col in parts of some images and one group of channels.

    A call allocates at most ``max_column_mib`` MiB besides input, weight and result, unless a
    single image or a copy of the weight takes more. bfloat16 and float16 are converted to float32
    part by part; results are rounded once.
    """

    max_column_mib: int = 64

    def traceable(self) -> Algorithm:
        return Unfolded()

    def padded_forward(
        self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        size = geometry.output_size(padded(x.shape[2:], zeros), w.shape[2:])
        y = x.new_empty(len(x), len(w), *size)
        products, groups, batches = self._parts(x, x.shape, w.shape, geometry, zeros)
        for (channels, filters), images in product(groups, batches):
            inputs = pad(upcast(x[images, channels]), zeros)
            made = products.forward(inputs, upcast(w[filters]))
            y[images, filters] = made if bias is None else made.add_(bias[filters, None, None])
        return y

    def padded_grad_input(
        self, g: Tensor, w: Tensor, input_size: Pair, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        dx = g.new_empty(len(g), w.shape[1] * geometry.groups, *input_size)
        products, groups, batches = self._parts(g, dx.shape, w.shape, geometry, zeros)
        for (channels, filters), images in product(groups, batches):
            made = products.grad_input(upcast(g[images, filters]), upcast(w[filters]))
            dx[images, channels] = crop(made, zeros)
        return dx

    def padded_grad_weight(
        self, g: Tensor, x: Tensor, kernel_size: Pair, geometry: Geometry, zeros: Amounts
    ) -> Tensor:
        dw = g.new_empty(g.shape[1], x.shape[1] // geometry.groups, *kernel_size)
        products, groups, batches = self._parts(x, x.shape, dw.shape, geometry, zeros)
        for channels, filters in groups:
            total = upcast(torch.zeros_like(dw[filters]))
            for images in batches:
                inputs = pad(upcast(x[images, channels]), zeros)
                total += products.grad_weight(upcast(g[images, filters]), inputs)
            dw[filters] = total
        return dw

    def _parts(
        self, like: Tensor, size: Pair, weight: Pair, geometry: Geometry, zeros: Amounts
    ) -> tuple[Layout, list[tuple[slice, slice]], list[slice]]:
        """The layout of a part; channels and filters of each group; images of each part."""
        (n, c), (o, depth) = size[:2], weight[:2]
        number = 1 if depth == 1 else geometry.groups  # depthwise: all groups in one part
        c, o, how = c // number, o // number, replace(geometry, groups=geometry.groups // number)
        products = layout((c, *padded(size[2:], zeros)), (o, *weight[1:]), how)
        groups = [(slice(c * i, c * (i + 1)), slice(o * i, o * (i + 1))) for i in range(number)]
        # Half of the limit: a result is copied while its operands exist.
        half_mib = 2**19 // upcast(like[:0]).element_size()  # in numbers
        room = self.max_column_mib * half_mib
        cache = CACHE_MIB * half_mib if like.is_cpu else room
        image = products.allocated()
        most = max(min(room // image, max(cache // image, RUN)), 1)
        even = -(-n // max(-(-n // most), 1))
        step = min(most, -(-even // RUN) * RUN) or 1
        return products, groups, [slice(i, min(i + step, n)) for i in range(0, n, step)]


class Im2colConv2d(Conv2d):
    """``nn.Conv2d`` by im2col and a matrix product.

    Args:
        max_column_mib: MiB that a forward or one of the two gradients may allocate besides input,
            weight and result; default 64. Larger batches are computed in parts, of at least one
            image. Does not apply to compiled or exported layers and to tensor subclasses. The
            backward keeps the input, not the columns.

    Raises:
        ValueError: ``max_column_mib`` is not a positive integer.
    """

    def __init__(self, *args: Any, max_column_mib: PositiveInt = 64, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(max_column_mib) is not int or max_column_mib < 1:
            raise ValueError(
                f"max_column_mib must be a positive whole number (MiB), not {max_column_mib!r}"
            )
        self.algorithm = Im2col(max_column_mib)
