"""Lesson `window`: im2col and its matrix product with every number shown."""

import math
from collections.abc import Iterator

from matplotlib.figure import Figure
from pydantic import NonNegativeInt, PositiveInt

from cnntrain.config import ConfigError
from cnntrain.lab.lessons.lesson import Lesson, Sheet, matrix_lines, side_by_side
from cnntrain.lab.lessons.small_convolution import (
    Mode,
    Padding,
    Positive,
    SmallConvolution,
    pair,
    small_convolution,
)


def window(
    *,
    size: Positive = 4,
    in_channels: PositiveInt = 1,
    out_channels: PositiveInt = 1,
    kernel: Positive = 3,
    stride: Positive = 1,
    padding: Padding = 0,
    dilation: Positive = 1,
    groups: PositiveInt = 1,
    padding_mode: Mode = "zeros",
    position: NonNegativeInt = 0,
) -> Lesson:
    """A convolution as one matrix product: each window becomes a column, each kernel a row.

    Args:
        size: Height and width of the input, one number or [height,width].
        in_channels: Of the input.
        out_channels: Of the output: the number of kernels.
        kernel: Height and width of the window.
        stride: Steps of the window, down and right.
        padding: Pixels around the input; same, valid.
        dilation: Distances between the elements of the window.
        groups: Number of convolutions side by side, each on its part of the channels.
        padding_mode: zeros, reflect, replicate, circular.
        position: Index of the marked window, from 0, in reading order.
    """
    example = small_convolution(
        pair(size), in_channels, out_channels, pair(kernel), pair(stride), padding,
        pair(dilation), groups, padding_mode,
    )  # fmt: skip
    if position >= example.columns.shape[2]:
        count = example.columns.shape[2]
        raise ConfigError([f"position={position}: there are {count} windows, 0 to {count - 1}"])
    return Lesson("\n".join(_lines(example, position)), lambda: _draw(example, position))


def formula(example: SmallConvolution) -> list[str]:
    """The formula of the output's height and width with its numbers filled in."""
    left, right, top, bottom = example.amounts
    lines = []
    for i, (name, before, after) in enumerate((("height", top, bottom), ("width", left, right))):
        size, k = example.input.shape[1 + i], example.weight.shape[2 + i]
        d, s = example.geometry.dilation[i], example.geometry.stride[i]
        lines.append(
            f"output {name:6} = floor(({size} + {before} + {after} - {d} * ({k} - 1) - 1) / {s}) "
            f"+ 1 = {example.output.shape[1 + i]}"
        )
    return lines


def _lines(example: SmallConvolution, position: int) -> Iterator[str]:
    groups, rows, count = example.columns.shape
    channels, kh, kw = example.weight.shape[1:]
    yield (
        "output size   = floor((size + padding before + after - dilation * (kernel - 1) - 1) "
        "/ stride) + 1"
    )
    yield from formula(example)
    taps = set(example.window(position))
    for number, image in enumerate(example.padded):
        yield ""
        yield f"{_input(example, number)}: window {position} in [ ]"
        yield from matrix_lines(image.tolist(), taps)
    yield ""
    yield (
        f"column matrix: {rows} rows (channels {channels} * kernel {kh} * {kw}), a column for "
        f"each of {count} windows, read row by row"
    )
    for group in range(groups):
        of = f" of group {group}" if groups > 1 else ""
        yield ""
        yield f"kernels{of}, a row each; times the columns{of}; is the product"
        yield from _product(example, group, position)
    for number, image in enumerate(example.output):
        yield ""
        yield f"output{_channel(number, len(example.output))}: the product, row by row"
        width = example.output.shape[2]
        yield from matrix_lines(image.tolist(), {(position // width, position % width)})


def _product(example: SmallConvolution, group: int, position: int) -> list[str]:
    """kernels x columns = product, side by side, the marked window's column in brackets."""
    _, rows, _ = example.columns.shape
    weights = example.weight.reshape(len(example.products), -1, rows)[group]
    columns, products = example.columns[group], example.products[group]
    blocks = [matrix_lines(m.tolist(), {(i, position) for i in range(len(m))})
              for m in (columns, products)]  # fmt: skip
    return side_by_side([matrix_lines(weights.tolist()), *blocks], ["  x ", "  = "])


def _input(example: SmallConvolution, number: int) -> str:
    """Title of a channel of the input."""
    padded = ", padded" if any(example.amounts) else ""
    return f"input{padded}{_channel(number, len(example.padded))}"


def _channel(number: int, count: int) -> str:
    return f", channel {number}" if count > 1 else ""


def _numbered(name: str, group: int, groups: int, count: int) -> str:
    """A group's part of `count`: `kernel 2`, `channels 4 to 7`; no number where there is one."""
    first, last = group * count // groups, (group + 1) * count // groups - 1
    if first == last:
        return f"{name} {first}" if count > 1 else name
    return f"{name}s {first} to {last}"


def _draw(example: SmallConvolution, position: int) -> Figure:
    """For each group a row of its input, kernels and output, and below it the product."""
    groups, rows, count = example.columns.shape
    of_group, width = example.products.shape[1], example.output.shape[2]
    here = (position // width, position % width)
    channels, kernels = len(example.padded), len(example.weight)
    sheet = Sheet(max(24.0, rows + 2 * count + 12.0) if groups == 1 else math.inf)
    weights = example.weight.reshape(groups, of_group, rows)
    for group in range(groups):
        inputs = range(group * channels // groups, (group + 1) * channels // groups)
        outputs = range(group * of_group, (group + 1) * of_group)
        sheet.new_line()
        for i in inputs:
            name = _input(example, i)
            sheet.add(example.padded[i], name, example.window(position), _inside(example))
        for o in outputs:
            number = f" {o}" if kernels > 1 else ""
            for i in inputs:
                name = f"kernel{number}{_channel(i, channels)}"
                sheet.add(example.weight[o, i - inputs[0]], name)
        for o in outputs:
            sheet.add(example.output[o], f"output{_channel(o, kernels)}", [here])
        column, product = ([(y, position) for y in range(n)] for n in (rows, of_group))
        seen, made = (_numbered("channel", group, groups, n) for n in (channels, kernels))
        sheet.new_line()
        name = _numbered("kernel", group, groups, kernels)
        sheet.add(weights[group], f"{name}, {'as a row' if of_group == 1 else 'a row each'}")
        sheet.add_sign("×")
        name = f"columns of {seen}, one for each window"
        sheet.add(example.columns[group], name.replace(" of channel,", ","), column)
        sheet.add_sign("=")
        sheet.add(example.products[group], f"product, {made}".removesuffix(", channel"), product)
    return sheet.figure("\n".join(formula(example)))


def _inside(example: SmallConvolution) -> set[tuple[int, int]]:
    """(row, column) of the cells that are not padding."""
    left, _, top, _ = example.amounts
    height, width = example.input.shape[1:]
    return {(top + y, left + x) for y in range(height) for x in range(width)}
