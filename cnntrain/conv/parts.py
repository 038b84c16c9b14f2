"""Tiling of a convolution into parts, so that the memory for each part fits into a limit."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from cnntrain.conv.geometry import Amounts, Geometry, Pair

# Parts have a multiple of this number of images: where the batch is the innermost dimension in
# memory, whole vectors of images are copied and multiplied.
RUN = 16

Size = tuple[int, ...]
# How many numbers are allocated with a padded input of size (N, C, H, W), a weight of size
# (O, C/groups, kh, kw) and a geometry.
Cost = Callable[[Size, Size, Geometry], int]


class Part(NamedTuple):
    """A part of a convolution, itself a convolution.

    Attributes:
        geometry: that of the whole convolution, except for the groups.
        weight: index into the weight (O, C/groups, kh, kw).
        output: index into the output or its gradient (N, O, OH, OW).
        input: index into the input or its gradient (N, C, H, W), without padding.
        zeros: padding of this block of the input, (left, right, top, bottom).
    """

    geometry: Geometry
    weight: tuple[slice, ...]
    output: tuple[slice, ...]
    input: tuple[slice, ...]
    zeros: Amounts


def parts(
    size: Size,
    weight: Size,
    geometry: Geometry,
    zeros: Amounts,
    cost: Cost,
    room: int,
    cache: int,
    of_input: bool = False,
) -> Iterator[Part]:
    """Parts of a convolution, ordered by their block of the weight.

    A part has one group, or one input channel for each of its groups. Its block of the weight has
    at most ``room / 6`` numbers and what it allocates at most ``room / 2``, unless a single window
    or a single filter takes more.

    Args:
        size: size of the input (N, C, H, W), without padding.
        weight: size of the weight (O, C/groups, kh, kw).
        zeros: padding (left, right, top, bottom).
        room: largest number of elements to allocate.
        cache: preferred number of elements to allocate, if enough for `RUN` images.
        of_input: let parts overlap in the output instead of the input, so that each computes its
            block of the input gradient completely.
    """
    left, right, top, bottom = zeros
    down = _Axis.of(size[2], (top, bottom), weight[2], geometry, 0)
    across = _Axis.of(size[3], (left, right), weight[3], geometry, 1)
    for how, index, filters, channels in _channels(weight, geometry, room // 6, of_input):
        c, block = channels.stop - channels.start, tuple(s.stop - s.start for s in index)

        def allocated(
            rows: int, columns: int, c: int = c, block: Size = block, how: Geometry = how
        ) -> int:
            plane = down.padded_length(rows, of_input), across.padded_length(columns, of_input)
            return cost((1, c, *plane), block, how)

        for images, rows, columns in _tiles(
            size[0], (down.outputs, across.outputs), allocated, room // 2, cache // 2
        ):
            v, h = down.span(rows, of_input), across.span(columns, of_input)
            yield Part(
                how,
                index,
                (images, filters, v.output, h.output),
                (images, channels, v.input, h.input),
                (*h.zeros, *v.zeros),
            )


def _channels(
    weight: Size, geometry: Geometry, room: int, of_input: bool
) -> Iterator[tuple[Geometry, tuple[slice, ...], slice, slice]]:
    """Divides the channels into blocks: geometry, weight index, output and input channels."""
    o, depth, *kernel = weight
    whole = [slice(0, length) for length in kernel]
    if geometry.groups > 1 and depth == 1:
        yield geometry, (slice(0, o), slice(0, 1), *whole), slice(0, o), slice(0, geometry.groups)
        return
    how, each, taps = replace(geometry, groups=1), o // geometry.groups, kernel[0] * kernel[1]
    for group in range(geometry.groups):
        filters = slice(group * each, (group + 1) * each)
        channels = slice(group * depth, (group + 1) * depth)
        if of_input:
            for block in _cut(0, depth, room // (each * taps)):
                inputs = slice(channels.start + block.start, channels.start + block.stop)
                yield how, (filters, block, *whole), filters, inputs
        else:
            for block in _cut(filters.start, filters.stop, room // (depth * taps)):
                yield how, (block, slice(0, depth), *whole), block, channels


def _tiles(
    n: int, outputs: Pair, allocated: Callable[[int, int], int], room: int, cache: int
) -> Iterator[tuple[slice, range, range]]:
    """Divides the output into blocks: images, rows and columns. A block has several images; or rows
    of one image that is too large; or columns of a row that is too large."""
    oh, ow = outputs
    image = max(allocated(oh, ow), 1)
    if image <= room:
        most = min(room // image, max(cache // image, RUN))
        even = -(-n // max(1, -(-n // most)))
        step = even if n <= most else min(most, -(-even // RUN) * RUN)
        for first in range(0, max(n, 1), max(step, 1)):
            yield slice(first, min(first + step, n)), range(oh), range(ow)
        return
    rows = bisect(range(1, oh), room, key=lambda rows: allocated(rows, ow))
    columns = ow if rows else bisect(range(1, ow), room, key=lambda columns: allocated(1, columns))
    rows, columns = max(rows, 1), max(columns, 1)
    for i, top, left in product(range(n), range(0, oh, rows), range(0, ow, columns)):
        yield (
            slice(i, i + 1),
            range(top, min(top + rows, oh)),
            range(left, min(left + columns, ow)),
        )


def _cut(start: int, stop: int, most: int) -> list[slice]:
    """Slices of start to stop, of about equal lengths, at most `most`."""
    number = -(-(stop - start) // max(most, 1))
    step = -(-(stop - start) // number)
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


class _Span(NamedTuple):
    output: slice
    input: slice
    zeros: tuple[int, int]


class _Axis(NamedTuple):
    """Height or width of an image: correspondence of output positions and input pixels."""

    length: int  # of the input, without padding
    before: int  # padding
    after: int
    stride: int
    reach: int  # distance of the kernel's last element from its first
    outputs: int

    @classmethod
    def of(
        cls, length: int, zeros: tuple[int, int], taps: int, geometry: Geometry, axis: int
    ) -> _Axis:
        stride, reach = geometry.stride[axis], geometry.dilation[axis] * (taps - 1)
        return cls(length, *zeros, stride, reach, (length + sum(zeros) - reach - 1) // stride + 1)

    def span(self, block: range, of_input: bool) -> _Span:
        """Output positions and input pixels of a part.

        Without of_input, the pixels under the windows of the block. With of_input, a block of
        `stride` pixels for each position, and all positions whose windows overlap it.
        """
        first = max(0, block.start - self.reach // self.stride) if of_input else block.start
        low = first * self.stride - self.before
        high = (block.stop - 1) * self.stride + self.reach + 1 - self.before
        start, stop = low, high
        if of_input:
            start = block.start * self.stride - self.before
            stop = block.stop * self.stride - self.before
            if block.stop == self.outputs:  # pixels that no window meets
                stop = self.length + self.after
            high = max(high, stop)
        start = min(max(start, 0), self.length)
        stop = min(max(stop, start), self.length)
        before = min(max(start - low, 0), high - low)
        return _Span(
            slice(first, block.stop),
            slice(start, stop),
            (before, high - low - before - (stop - start)),
        )

    def padded_length(self, outputs: int, of_input: bool) -> int:
        """Largest number of padded pixels for a block of that many output positions."""
        start = min(self.reach // self.stride, self.outputs - outputs) if of_input else 0
        span = self.span(range(start, start + outputs), of_input)
        return span.input.stop - span.input.start + sum(span.zeros)
