"""How im2col's matrices lie in memory. The mathematics is in im2col.py; all of this is for speed.

Copying windows into columns takes as long as multiplying them. So a layout cuts the convolution
into B matrix products, multiplied by one ``bmm``, such that little or nothing has to be copied:

    columns (B, K, L)     filters (B, O/groups, K)     rows of the output (B, O/groups, L)

There are B * L windows, and K = C/groups * kh * kw numbers under each. Where K is a sum over taps
whose columns are views of one another's memory, a layout gives a list of parts of K, one product
each, which are to be added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import product

import torch
from torch import Tensor

from cnntrain.conv.geometry import Geometry, Pair

# From so many channels times kernel rows on, products of K / kw numbers are as fast as of K.
LONG = 64

# Images at a time, at the least and in multiples of which: their pixels lie side by side, and runs
# of whole vectors are copied and multiplied faster.
RUN = 16

Index = tuple[slice, ...]


def layout(size: tuple[int, ...], kernel: Pair, how: Geometry) -> Layout:
    """The layout for a padded input of size (N, C, H, W): the first that fits."""
    if kernel == size[2:] and how.dilation == (1, 1):
        return Whole(size, kernel, how)
    if kernel == (1, 1) and how.groups == 1:
        return Pointwise(size, kernel, how)
    return Rows(size, kernel, how)


def tiles(
    size: tuple[int, ...], kernel: Pair, how: Geometry, room: int, cache: int | None = None
) -> list[tuple[Index, Index]]:
    """Where to cut an input of size (N, C, H, W) so that the columns of a part have room.

    Indices into the input and into the output: of images, or, where one image's columns are too
    many, of tiles of an image, which overlap in the input. A tile is one window at the least.

    room: numbers that columns may have; cache: numbers that they should have, if these are `RUN`
    images' or more.
    """
    n, c, h, w = size
    (oh, ow), (sh, sw), (dh, dw) = how.output_size((h, w), kernel), how.stride, how.dilation

    def met(first: int, last: int, stride: int, dilation: int, taps: int) -> slice:
        return slice(first * stride, (last - 1) * stride + dilation * (taps - 1) + 1)

    def numbers(rows: int, columns: int) -> int:
        plane = met(0, rows, sh, dh, kernel[0]).stop, met(0, columns, sw, dw, kernel[1]).stop
        return layout((1, c, *plane), kernel, how).column_size()

    image = numbers(oh, ow)
    if image <= room:
        most = room // max(image, 1)
        if cache is not None and image:
            most = min(most, max(cache // image, RUN))
        return batches(n, most)
    rows = max((r for r in range(1, oh) if numbers(r, ow) <= room), default=0)
    columns = ow if rows else max((q for q in range(1, ow) if numbers(1, q) <= room), default=1)
    cuts: list[tuple[Index, Index]] = []
    for i, top, left in product(range(n), range(0, oh, rows or 1), range(0, ow, columns)):
        bottom, right = min(top + (rows or 1), oh), min(left + columns, ow)
        here = met(top, bottom, sh, dh, kernel[0]), met(left, right, sw, dw, kernel[1])
        one = slice(i, i + 1), slice(None)
        cuts.append(((*one, *here), (*one, slice(top, bottom), slice(left, right))))
    return cuts


def batches(n: int, most: int) -> list[tuple[Index, Index]]:
    """Parts of a batch of n images, of about one size, with as many as `most` in each."""
    if n <= most:  # not as numbers: a graph that is traced here holds for every such batch
        return [((slice(None),), (slice(None),))]
    even = -(-n // -(-n // most))
    step = min(most, -(-even // RUN) * RUN)
    cuts = [(slice(i, min(i + step, n)),) for i in range(0, n, step)]
    return [(cut, cut) for cut in cuts]


class Layout(ABC):
    """For inputs of one size: its functions are views and copies, and all of them linear."""

    def __init__(self, size: tuple[int, ...], kernel: Pair, how: Geometry) -> None:
        self.n, self.c, self.h, self.w = size
        self.kh, self.kw = kernel
        self.oh, self.ow = how.output_size(size[2:], kernel)
        self.how, self.groups, self.depth = how, how.groups, self.c // how.groups

    @abstractmethod
    def column_size(self) -> int:
        """How many numbers `columns` or `col2im` takes memory for, at the most."""

    @abstractmethod
    def columns(self, x: Tensor) -> list[Tensor]:
        """im2col: x (N, C, H, W) -> parts of (B, K, L)"""

    @abstractmethod
    def col2im(self, w: Tensor, rows: Tensor) -> Tensor:
        """x (N, C, H, W): filters^T @ rows, every number added to the pixel it was copied from."""

    @abstractmethod
    def filters(self, w: Tensor) -> list[Tensor]:
        """w (O, C/groups, kh, kw) -> parts of (B, O/groups, K)"""

    @abstractmethod
    def weight(self, parts: list[Tensor]) -> Tensor:
        """Parts of (B, O/groups, K) -> their sum over B as w (O, C/groups, kh, kw)"""

    @abstractmethod
    def rows(self, y: Tensor) -> Tensor:
        """y (N, O, OH, OW) -> (B, O/groups, L)"""

    @abstractmethod
    def output(self, rows: Tensor) -> Tensor:
        """(B, O/groups, L) -> y (N, O, OH, OW)"""

    def correlate(self, y: Tensor, x: Tensor) -> list[Tensor]:
        """rows @ columns^T: parts of (B, O/groups, K)"""
        rows = self.rows(y)
        return [torch.bmm(rows, part.mT) for part in self.columns(x)]


class Whole(Layout):
    """The kernel is as large as the input: one window an image, and B = groups, L = N."""

    def column_size(self) -> int:
        return 0

    def columns(self, x: Tensor) -> list[Tensor]:
        return [self.rows(x)]

    def col2im(self, w: Tensor, rows: Tensor) -> Tensor:
        x = torch.bmm(rows.mT, self.filters(w)[0])  # (groups, N, K)
        return x.transpose(0, 1).reshape(self.n, self.c, self.h, self.w)

    def filters(self, w: Tensor) -> list[Tensor]:
        return [w.reshape(self.groups, w.shape[0] // self.groups, w[0].numel())]

    def weight(self, parts: list[Tensor]) -> Tensor:
        return parts[0].reshape(-1, self.depth, self.kh, self.kw)

    def rows(self, y: Tensor) -> Tensor:
        return y.flatten(1).unflatten(1, (self.groups, -1)).permute(1, 2, 0)

    def output(self, rows: Tensor) -> Tensor:
        return rows.permute(2, 0, 1).reshape(self.n, self.groups * rows.shape[1], 1, 1)


class Pointwise(Layout):
    """A kernel of 1x1: the input is its own columns, but for a stride; B = N, L = OH * OW."""

    def column_size(self) -> int:
        return 0 if self.how.stride == (1, 1) else self.n * self.c * self.oh * self.ow

    def columns(self, x: Tensor) -> list[Tensor]:
        return [self._met(x).flatten(2)]

    def col2im(self, w: Tensor, rows: Tensor) -> Tensor:
        pixels = torch.bmm(self.filters(w)[0].mT, rows).view(self.n, self.c, self.oh, self.ow)
        if self.how.stride == (1, 1):
            return pixels
        x = pixels.new_zeros(self.n, self.c, self.h, self.w)
        self._met(x).copy_(pixels)
        return x

    def _met(self, x: Tensor) -> Tensor:
        (sh, sw) = self.how.stride
        return x[:, :, ::sh, ::sw]

    def filters(self, w: Tensor) -> list[Tensor]:
        return [w.flatten(1).expand(self.n, -1, -1)]

    def weight(self, parts: list[Tensor]) -> Tensor:
        return parts[0].sum(0)[:, :, None, None]

    def rows(self, y: Tensor) -> Tensor:
        return y.flatten(2)

    def output(self, rows: Tensor) -> Tensor:
        return rows.view(self.n, rows.shape[1], self.oh, self.ow)


class Rows(Layout):
    """Everything else: B = groups * OH output rows, and L = OW * N, the batch innermost.

    The input lies in memory as (groups, H, C/groups, W, N): all that is copied are long contiguous
    runs. Its pixels under tap j of the kernel's width are a view, and windows one below the other
    share all but one of their rows: so the columns of an output row, for this tap, are a view
    as well, OH matrices (kh * C/groups, OW * N) that overlap in memory. Source: M. Cho, D. Brand,
    "MEC: Memory-efficient Convolution for Deep Neural Network", ICML 2017, which unrolls the width
    as is done here only where products over one tap would be too short.
    """

    def __init__(self, size: tuple[int, ...], kernel: Pair, how: Geometry) -> None:
        super().__init__(size, kernel, how)
        (self.sh, self.sw), (self.dh, self.dw) = how.stride, how.dilation
        self.unrolled = self.groups > 1 or self.depth * self.kh < LONG

    def column_size(self) -> int:
        lines = self.n * self.c
        image, taps = lines * self.h * self.w, lines * self.h * self.kw * self.ow
        if self.groups == 1 and self.dh == 1:
            return image + taps
        # (groups, OH) or (kh, C/groups) cannot be joined in place: windows are copied.
        return image + taps + lines * self.oh * self.kh * self.kw * self.ow

    def columns(self, x: Tensor) -> list[Tensor]:
        x = x.unflatten(1, (self.groups, self.depth)).permute(1, 3, 2, 4, 0)
        if self.sw == 1 or self.unrolled:
            x = x.contiguous()
        taps = [self._under(x, j) for j in range(self.kw)]
        if self.sw > 1 and not self.unrolled:
            # Each is copied once, from where it lies; here, as with one image `flatten` would not,
            # and a program that was traced with two has their strides in `_windows`.
            taps = [tap.contiguous() for tap in taps]
        if self.unrolled:
            taps = [torch.stack(taps, 2).flatten(2, 3)]  # (groups, H, kw * C/groups, OW, N)
        return [self._windows(tap.flatten(3)) for tap in taps]

    def _under(self, x: Tensor, j: int) -> Tensor:
        """The pixels that tap j of the kernel's width meets: (groups, H, C/groups, OW, N)"""
        return x[:, :, :, j * self.dw :][:, :, :, : self.sw * self.ow : self.sw]

    def _windows(self, tap: Tensor) -> Tensor:
        """(groups, H, D, L) -> (groups * OH, kh * D, L), where kernel row i is dh * i rows down."""
        group, row, *inner = tap.stride()
        windows = tap.as_strided(
            (self.groups, self.oh, self.kh, *tap.shape[2:]),
            (group, self.sh * row, self.dh * row, *inner),
        )
        return windows.flatten(2, 3).flatten(0, 1)

    def col2im(self, w: Tensor, rows: Tensor) -> Tensor:
        size = self.kw * self.depth
        filters = _repeated(self._matrices(w).mT, self.oh)  # (B, kh * kw * C/groups, O/groups)
        height = -(-self.h // self.sh)
        wide: dict[int, Tensor] = {}  # every sh-th row, from each first one
        for i in range(self.kh):
            first, start = divmod(i * self.dh, self.sh)
            if start not in wide:
                wide[start] = rows.new_zeros(self.groups, height, size, rows.shape[2])
            target = wide[start][:, first : first + self.oh]
            part = filters[:, i * size : (i + 1) * size]
            if self.groups == 1:
                target[0].baddbmm_(part, rows)
            else:
                target += torch.bmm(part, rows).view(target.shape)
        x = rows.new_zeros(self.groups, self.h, self.depth, self.w, self.n)
        for start, values in wide.items():
            values = values[:, : -(-(self.h - start) // self.sh)]
            taps = values.view(*values.shape[:2], self.kw, self.depth, self.ow, self.n)
            for j in range(self.kw):
                pixels = self._under(x[:, start :: self.sh], j)
                pixels += taps[:, :, j]
        return x.permute(4, 0, 2, 1, 3).reshape(self.n, self.c, self.h, self.w)

    def filters(self, w: Tensor) -> list[Tensor]:
        if self.unrolled:
            return [_repeated(self._matrices(w), self.oh)]
        return [_repeated(self._matrices(w[..., j : j + 1]), self.oh) for j in range(self.kw)]

    def _matrices(self, w: Tensor) -> Tensor:
        """(O, C/groups, kh, kw) -> (groups, O/groups, kh * kw * C/groups)"""
        return w.permute(0, 2, 3, 1).reshape(self.groups, w.shape[0] // self.groups, w[0].numel())

    def weight(self, parts: list[Tensor]) -> Tensor:
        sums = [part.unflatten(0, (self.groups, self.oh)).sum(1).flatten(0, 1) for part in parts]
        sums = [total.unflatten(1, (self.kh, -1, self.depth)) for total in sums]
        return torch.cat(sums, 2).permute(0, 3, 1, 2)

    def rows(self, y: Tensor) -> Tensor:
        y = y.unflatten(1, (self.groups, -1)).permute(1, 3, 2, 4, 0)
        return y.reshape(self.groups * self.oh, y.shape[2], self.ow * self.n)

    def output(self, rows: Tensor) -> Tensor:
        rows = rows.view(self.groups, self.oh, rows.shape[1], self.ow, self.n)
        return rows.permute(4, 0, 2, 1, 3).flatten(1, 2)

    def correlate(self, y: Tensor, x: Tensor) -> list[Tensor]:
        if not self.unrolled or y.shape[1] // self.groups < 8:
            return super().correlate(y, x)
        # The transposed product, of matrices that need not be transposed, is up to 3 times faster.
        rows = y.unflatten(1, (self.groups, -1)).permute(1, 3, 4, 0, 2)
        rows = rows.reshape(self.groups * self.oh, self.ow * self.n, rows.shape[4])
        return [torch.bmm(part, rows).mT for part in self.columns(x)]


def _repeated(matrices: Tensor, times: int) -> Tensor:
    """(groups, A, B) -> (groups * times, A, B)"""
    return matrices.unsqueeze(1).expand(-1, times, -1, -1).flatten(0, 1)
