"""Memory layouts of im2col for speed. The algorithm itself is in im2col.py.

Copying windows into columns takes as long as multiplying them, so each class arranges the matrix
products of one kind of convolution to copy little or nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import product

import torch
from torch import Tensor

from cnntrain.conv.geometry import Geometry, batch_first, batch_last

# With fewer filters, runs of O numbers in memory are too short for a fast weight gradient.
FEW = 8


def layout(image: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry) -> Layout:
    """The fastest layout for padded images (C, H, W) and a weight (O, C/groups, kh, kw).

    There is one group, or one for each input channel (depthwise).
    """
    kernel = weight[2:]
    if geometry.groups > 1:
        kind: type[Layout] = Depthwise
    elif kernel == image[1:] and geometry.dilation == (1, 1):
        kind = Whole
    elif kernel == (1, 1):
        kind = Pointwise
    else:
        kind = Rows
    return kind(image, weight, geometry)


class Layout(ABC):
    """The three functions for padded images of one size and weights of one shape."""

    def __init__(self, image: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry) -> None:
        self.c, self.h, self.w = image
        self.o, _, self.kh, self.kw = weight
        self.oh, self.ow = geometry.output_size(image[1:], weight[2:])
        self.geometry = geometry
        (self.sh, self.sw), (self.dh, _) = geometry.stride, geometry.dilation

    def allocated(self) -> int:
        """Upper bound of the elements that a call allocates for each image: the padded input, a
        copy of it in another order, and the output."""
        return 2 * self.c * self.h * self.w + self.o * self.oh * self.ow

    @abstractmethod
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """y (N, O, OH, OW)"""

    @abstractmethod
    def grad_input(self, g: Tensor, w: Tensor) -> Tensor:
        """dx (N, C, H, W)"""

    @abstractmethod
    def grad_weight(self, g: Tensor, x: Tensor) -> Tensor:
        """dw (O, C/groups, kh, kw)"""


class Whole(Layout):
    """A kernel as large as the input: each image is a column."""

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return (x.flatten(1) @ w.flatten(1).t())[:, :, None, None]

    def grad_input(self, g: Tensor, w: Tensor) -> Tensor:
        return (g.flatten(1) @ w.flatten(1)).view(-1, self.c, self.h, self.w)

    def grad_weight(self, g: Tensor, x: Tensor) -> Tensor:
        return (g.flatten(1).t() @ x.flatten(1)).view(self.o, self.c, self.kh, self.kw)


class Pointwise(Layout):
    """A 1x1 kernel: the pixels at the stride's positions are the columns, a matrix per image."""

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        y = torch.bmm(w.flatten(1).expand(len(x), -1, -1), self._reached(x).flatten(2))
        return y.view(-1, self.o, self.oh, self.ow)

    def grad_input(self, g: Tensor, w: Tensor) -> Tensor:
        pixels = torch.bmm(w.flatten(1).t().expand(len(g), -1, -1), g.flatten(2))
        pixels = pixels.view(-1, self.c, self.oh, self.ow)
        if (self.sh, self.sw) == (1, 1):
            return pixels
        dx = g.new_zeros(len(g), self.c, self.h, self.w)
        self._reached(dx).copy_(pixels)
        return dx

    def grad_weight(self, g: Tensor, x: Tensor) -> Tensor:
        dw = g.new_zeros(self.o, self.c)
        dw.addbmm_(g.flatten(2), self._reached(x).flatten(2).mT)
        return dw[:, :, None, None]

    def _reached(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.sh, :: self.sw]


class Rows(Layout):
    """Any other kernel: one matrix product for each row of the output, the batch innermost.

    The input is copied to (H, kw * C, OW * N): only its width is unrolled, in long contiguous runs.
    Consecutive windows share all but one of their rows, so that the columns of the output's rows
    are OH matrices (kh * kw * C, OW * N) that overlap in memory; they are copied only if the
    kernel's rows are dilated. Source: M. Cho, D. Brand, "MEC: Memory-efficient Convolution for Deep
    Neural Network", ICML 2017.
    """

    def allocated(self) -> int:
        rows = self.h if self.dh == 1 else self.h + self.oh * self.kh
        return super().allocated() + rows * self.kw * self.c * self.ow

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        filters = w.permute(0, 2, 3, 1).reshape(self.o, -1).expand(self.oh, -1, -1)
        y = torch.bmm(filters, self.columns(x))
        return y.view(self.oh, self.o, self.ow, -1).permute(3, 1, 0, 2)

    def grad_input(self, g: Tensor, w: Tensor) -> Tensor:
        n = len(g)
        rows = g.permute(2, 1, 3, 0).reshape(self.oh, self.o, self.ow * n)
        height = -(-self.h // self.sh)
        wide: dict[int, Tensor] = {}  # rows start, start + sh, start + 2 sh, ... of the input
        for i in range(self.kh):
            first, start = divmod(i * self.dh, self.sh)
            if start not in wide:
                wide[start] = g.new_zeros(height, self.kw * self.c, self.ow * n)
            filters = w[:, :, i].permute(2, 1, 0).reshape(-1, self.o).expand(self.oh, -1, -1)
            wide[start][first : first + self.oh].baddbmm_(filters, rows)
        dx = g.new_zeros(self.h, self.c, self.w, n)
        for start, values in wide.items():
            values = values[: -(-(self.h - start) // self.sh)]
            values = values.view(len(values), self.kw, self.c, self.ow, n)
            for j in range(self.kw):
                self._under(dx[start :: self.sh], j).add_(values[:, j])
        return dx.permute(3, 1, 0, 2)

    def grad_weight(self, g: Tensor, x: Tensor) -> Tensor:
        columns = self.columns(x)
        # (OH, OW * N, O): O is innermost in memory, unless that would be short runs.
        if self.o < FEW:
            rows = g.permute(2, 1, 3, 0).flatten(2).mT
        else:
            rows = g.permute(2, 3, 0, 1).reshape(self.oh, -1, self.o)
        if self.oh * self.o * columns.shape[1] <= x.numel():  # faster, and takes little memory
            dw = torch.bmm(columns, rows).sum(0)
        else:
            dw = g.new_zeros(columns.shape[1], self.o).addbmm_(columns, rows)
        return dw.view(self.kh, self.kw, self.c, self.o).permute(3, 2, 0, 1)

    def columns(self, x: Tensor) -> Tensor:
        """im2col: x (N, C, H, W) -> (OH, kh * kw * C, OW * N), a view of (H, kw * C, OW * N)."""
        x = x.permute(2, 1, 3, 0).contiguous()  # (H, C, W, N)
        wide = torch.stack([self._under(x, j) for j in range(self.kw)], 1)
        wide = wide.flatten(1, 2).flatten(2)
        row, *inner = wide.stride()
        size = (self.oh, self.kh, *wide.shape[1:])
        return wide.as_strided(size, (self.sh * row, self.dh * row, *inner)).flatten(1, 2)

    def _under(self, x: Tensor, j: int) -> Tensor:
        """The pixels under column j of the kernel: a view (H, C, OW, N) of (H, C, W, N)."""
        return x[:, :, self.geometry.reach(0, j, (self.oh, self.ow))[1]]


class Depthwise(Layout):
    """One input channel for each group: products would have a single row, so the kernel's elements
    are multiplied and added one by one, for all channels at once and the batch innermost."""

    def allocated(self) -> int:
        return super().allocated() + self.o * self.oh * self.ow

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = batch_last(x).unsqueeze(1)  # (C, 1, H, W, N)
        y = x.new_zeros(self.c, self.o // self.c, self.oh, self.ow, x.shape[-1])
        for i, j in product(range(self.kh), range(self.kw)):
            y.addcmul_(self._under(x, i, j), self._weights(w, i, j))
        return batch_first(y.flatten(0, 1))

    def grad_input(self, g: Tensor, w: Tensor) -> Tensor:
        g = batch_last(g).unflatten(0, (self.c, -1))  # (C, O/C, OH, OW, N)
        dx = g.new_zeros(self.c, 1, self.h, self.w, g.shape[-1])
        for i, j in product(range(self.kh), range(self.kw)):
            for k, weights in enumerate(self._weights(w, i, j).split(1, 1)):
                self._under(dx, i, j).addcmul_(g[:, k : k + 1], weights)
        return batch_first(dx.squeeze(1))

    def grad_weight(self, g: Tensor, x: Tensor) -> Tensor:
        g = batch_last(g).view(self.c, self.o // self.c, -1)  # (C, O/C, OH * OW * N)
        x = batch_last(x).unsqueeze(1)
        dw = g.new_empty(self.c, self.o // self.c, self.kh, self.kw)
        for i, j in product(range(self.kh), range(self.kw)):
            pixels = self._under(x, i, j).reshape(self.c, 1, -1)
            dw[:, :, i, j] = torch.bmm(g, pixels.mT).squeeze(2)
        return dw.flatten(0, 1).unsqueeze(1)

    def _under(self, x: Tensor, i: int, j: int) -> Tensor:
        """The pixels under kernel element (i, j): a view (C, 1, OH, OW, N) of (C, 1, H, W, N)."""
        rows, columns = self.geometry.reach(i, j, (self.oh, self.ow))
        return x[:, :, rows, columns]

    def _weights(self, w: Tensor, i: int, j: int) -> Tensor:
        return w[:, 0, i, j].view(self.c, -1, 1, 1, 1)
