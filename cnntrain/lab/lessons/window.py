"""Every number of an im2col: the padded input, a window, the column matrix, the product."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from matplotlib.figure import Figure
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from cnntrain.config import ConfigError
from cnntrain.conv import Im2colConv2d
from cnntrain.conv.geometry import Amounts, Geometry, pad, padded, padding_amounts
from cnntrain.lab.lessons.lesson import Lesson, matrix, plain
from cnntrain.lab.lessons.sheet import Sheet

Positive = PositiveInt | tuple[PositiveInt, PositiveInt]
Padding = NonNegativeInt | tuple[NonNegativeInt, NonNegativeInt] | Literal["same", "valid"]
Mode = Literal["zeros", "reflect", "replicate", "circular"]

MOST_COLUMNS, MOST_ROWS, MOST_PIXELS = 36, 36, 300  # that a finger can follow


@dataclass(frozen=True)
class Example:
    """A small convolution with all that is computed on the way, of whole numbers."""

    conv: Im2colConv2d
    geometry: Geometry
    amounts: Amounts  # of padding, at (left, right, top, bottom)
    input: Tensor  # (C, H, W)
    padded: Tensor  # (C, PH, PW)
    weight: Tensor  # (O, C / groups, KH, KW)
    columns: Tensor  # (groups, C / groups * KH * KW, OH * OW)
    products: Tensor  # (groups, O / groups, OH * OW)
    output: Tensor  # (O, OH, OW)

    def taps(self, position: int) -> list[tuple[int, int]]:
        """(row, column) in the padded input of what the window at a position sees."""
        width = self.output.shape[2]
        (sh, sw), (dh, dw) = self.geometry.stride, self.geometry.dilation
        top, left = position // width * sh, position % width * sw
        kh, kw = self.weight.shape[2:]
        return [(top + dh * i, left + dw * j) for i in range(kh) for j in range(kw)]


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
        out_channels: Of the output: so many kernels.
        kernel: Height and width of the window.
        stride: Steps of the window, down and right.
        padding: Pixels around the input; same, valid.
        dilation: Distances between the taps of the window.
        groups: So many convolutions side by side, each with its part of the channels.
        padding_mode: zeros, reflect, replicate, circular.
        position: The window that is marked; 0 is the first, in reading order.
    """
    example = worked_out(
        pair(size), in_channels, out_channels, pair(kernel), pair(stride), padding,
        pair(dilation), groups, padding_mode,
    )  # fmt: skip
    if position >= example.columns.shape[2]:
        count = example.columns.shape[2]
        raise ConfigError([f"position={position}: there are {count} windows, 0 to {count - 1}"])
    return Lesson("\n".join(_lines(example, position)), lambda: _draw(example, position))


def worked_out(
    size: tuple[int, int],
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
    groups: int,
    padding_mode: Mode,
) -> Example:
    """All steps, each as the definition has it. ConfigError for what is no convolution, or too
    large to be read."""
    _check_size(size, in_channels)
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ConfigError([f"groups={groups}: has to divide {name}={channels}"])
    try:
        conv = Im2colConv2d(
            in_channels, out_channels, kernel, stride, padding, dilation, groups, False,
            padding_mode,
        )  # fmt: skip
        geometry = Geometry.of(conv)
        amounts = padding_amounts(conv.padding, kernel, dilation)
        count = in_channels * size[0] * size[1]
        image = torch.arange(1.0, count + 1).reshape(in_channels, *size)
        around = pad(image[None], amounts, padding_mode)[0]
    except (ValueError, RuntimeError) as error:
        said = str(error).split("\n")[0]
        raise ConfigError(
            [f"padding={shown(padding)}: {said} (padding_mode={padding_mode})"]
        ) from None
    _check_reach(size, kernel, dilation, amounts)
    numbers = torch.arange(conv.weight.numel()).reshape(conv.weight.shape)
    conv.weight.data = ((numbers * 3 + numbers // 4) % 5 - 2).float()  # -2 to 2, without a pattern
    columns = _columns(around, geometry, kernel)
    if columns.shape[1] > MOST_ROWS or columns.shape[2] > MOST_COLUMNS:
        raise ConfigError(
            [
                f"size={shown(size)}: makes a matrix of {columns.shape[1]} x {columns.shape[2]}, "
                f"more than {MOST_ROWS} x {MOST_COLUMNS}, which nobody can follow; take less"
            ]
        )
    rows = conv.weight.data.reshape(groups, out_channels // groups, -1)
    products = rows @ columns
    height_width = geometry.output_size(padded(size, amounts), kernel)
    output = products.reshape(out_channels, *height_width)
    return Example(
        conv, geometry, amounts, image, around, conv.weight.data, columns, products, output
    )


def _columns(image: Tensor, geometry: Geometry, kernel: tuple[int, int]) -> Tensor:
    """Each window of a padded image (C, H, W) as a column (groups, C / groups * KH * KW, OH * OW):
    channel by channel, row by row."""
    (sh, sw), (dh, dw), (kh, kw) = geometry.stride, geometry.dilation, kernel
    oh, ow = geometry.output_size(tuple(image.shape[1:]), kernel)
    columns = [
        image[:, y * sh : y * sh + dh * (kh - 1) + 1 : dh, x * sw : x * sw + dw * (kw - 1) + 1 : dw]
        for y in range(oh)
        for x in range(ow)
    ]
    return torch.stack([c.reshape(geometry.groups, -1) for c in columns], dim=2)


def _check_size(size: tuple[int, int], channels: int) -> None:
    if channels * size[0] * size[1] > MOST_PIXELS:
        raise ConfigError(
            [
                f"size={shown(size)}: with in_channels={channels} that is more than {MOST_PIXELS} "
                "numbers, which nobody can follow; take less"
            ]
        )


def _check_reach(
    size: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int], amounts: Amounts
) -> None:
    """The reason why a kernel has no place, and the padding that makes it one."""
    there = padded(size, amounts)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if there[0] >= reach[0] and there[1] >= reach[1]:
        return
    helps = [max(0, -(-(r - s) // 2)) for r, s in zip(reach, size, strict=True)]
    take = f"[{helps[0]},{helps[1]}]" if helps[0] != helps[1] else helps[0]
    over = f"dilation * (kernel - 1) + 1 = {reach[0]} x {reach[1]}"
    raise ConfigError(
        [
            f"kernel={shown(kernel)}: the window reaches over {over} pixels, and the padded input "
            f"has {there[0]} x {there[1]}: there is no place to put it; the smallest padding that "
            f"helps is padding={take}"
        ]
    )


def formula(example: Example) -> list[str]:
    """The size of the output with its numbers filled in, height and width."""
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


def _lines(example: Example, position: int) -> Iterator[str]:
    groups, rows, count = example.columns.shape
    channels, kh, kw = example.weight.shape[1:]
    yield (
        "output size   = floor((size + padding before + after - dilation * (kernel - 1) - 1) "
        "/ stride) + 1"
    )
    yield from formula(example)
    taps = set(example.taps(position))
    for number, image in enumerate(example.padded):
        yield ""
        yield _titled("input, padded", number, len(example.padded), f"window {position} in [ ]")
        yield from _marked(image, taps)
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
        yield _titled("output", number, len(example.output), "the product, row by row")
        width = example.output.shape[2]
        yield from _marked(image, {(position // width, position % width)})


def _product(example: Example, group: int, position: int) -> list[str]:
    """kernels x columns = product, side by side, the marked window's column in brackets."""
    weights = matrix(
        example.weight.reshape(len(example.products), -1, example.columns.shape[1])[group].tolist()
    )
    columns = _marked(
        example.columns[group], {(i, position) for i in range(example.columns.shape[1])}
    )
    products = _marked(
        example.products[group], {(i, position) for i in range(example.products.shape[1])}
    )
    tall = max(len(weights), len(columns))
    blocks = []
    for block in (weights, columns, products):
        above = (tall - len(block)) // 2
        empty = " " * len(block[0])
        blocks.append([empty] * above + block + [empty] * (tall - len(block) - above))
    signs = [
        ("  x " if i == tall // 2 else "    ", "  = " if i == tall // 2 else "    ")
        for i in range(tall)
    ]
    return [
        (a + x + b + e + c).rstrip()
        for a, (x, e), b, c in zip(blocks[0], signs, blocks[1], blocks[2], strict=True)
    ]


def _marked(values: Tensor, marked: set[tuple[int, int]]) -> list[str]:
    """A matrix of whole numbers as lines, some of them in brackets."""
    width = max(len(plain(v)) for v in values.flatten().tolist())
    return [
        "".join(
            f"[{plain(v):>{width}}]" if (y, x) in marked else f" {plain(v):>{width}} "
            for x, v in enumerate(row)
        )
        for y, row in enumerate(values.tolist())
    ]


def _titled(name: str, number: int, count: int, what: str) -> str:
    return f"{name}, channel {number}: {what}" if count > 1 else f"{name}: {what}"


def _draw(example: Example, position: int) -> Figure:
    """All in cells of one size: images and kernels, then for each group the product."""
    groups, rows, count = example.columns.shape
    of_group, width = example.products.shape[1], example.output.shape[2]
    here = (position // width, position % width)
    sheet = Sheet(across=max(24.0, rows + 2 * count + 12.0))
    for image in example.padded:
        sheet.put(image, "input, padded", example.taps(position), _inside(example))
    for kernel in example.weight.flatten(0, 1):
        sheet.put(kernel, "kernel")
    for image in example.output:
        sheet.put(image, "output", [here])
    weights = example.weight.reshape(groups, of_group, rows)
    for group in range(groups):
        named = f" of group {group}" if groups > 1 else ""
        column, product = ([(y, position) for y in range(n)] for n in (rows, of_group))
        sheet.line()
        sheet.put(weights[group], f"kernels{named}, a row each")
        sheet.say("×")
        sheet.put(example.columns[group], "columns, one for each window", column)
        sheet.say("=")
        sheet.put(example.products[group], "product", product)
    return sheet.figure("\n".join(formula(example)))


def _inside(example: Example) -> set[tuple[int, int]]:
    """(row, column) of what is no padding."""
    left, _, top, _ = example.amounts
    height, width = example.input.shape[1:]
    return {(top + y, left + x) for y in range(height) for x in range(width)}


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(down, right)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def shown(value: object) -> str:
    """A pair as one types it."""
    if isinstance(value, (tuple, list)):
        return str(value[0]) if value[0] == value[1] else f"[{value[0]},{value[1]}]"
    return str(value)
