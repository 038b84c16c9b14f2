"""Lesson `window`: im2col and its matrix product with every number shown."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from matplotlib.figure import Figure
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import unfold

from cnntrain.config import ConfigError
from cnntrain.config.errors import first_line
from cnntrain.conv.geometry import Amounts, Geometry, pad, padded, padding_amounts
from cnntrain.lab.lessons.lesson import Lesson, Panel, draw_panels, matrix_lines, side_by_side

Positive = PositiveInt | tuple[PositiveInt, PositiveInt]
Padding = NonNegativeInt | tuple[NonNegativeInt, NonNegativeInt] | Literal["same", "valid"]
Mode = Literal["zeros", "reflect", "replicate", "circular"]
MAX_COLUMNS, MAX_ROWS, MAX_PIXELS = 36, 36, 900  # that are still readable
SIZE = "floor((size + padding before + after - dilation * (kernel - 1) - 1) / stride) + 1"


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
    height, width = (size, size) if isinstance(size, int) else size
    try:
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups,
                         bias=False, padding_mode=padding_mode, device="meta")  # fmt: skip
        amounts = padding_amounts(conv.padding, conv.kernel_size, conv.dilation)
        down, across = padded((height, width), amounts)
        window = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        if window[0] > down or window[1] > across:
            raise ValueError(
                f"the window of {window[0]}x{window[1]} is larger than the input with its padding, "
                f"{down}x{across}: take a smaller kernel, or a larger size or padding"
            )
        output = conv(torch.empty(1, in_channels, height, width, device="meta"))
    except (ValueError, RuntimeError) as error:
        raise ConfigError([f"lesson window: {first_line(error)}"]) from None
    example = small_convolution(conv, height, width, output.shape[2:])
    if position >= example.columns.shape[2]:
        count = example.columns.shape[2]
        raise ConfigError([f"position={position}: there are {count} windows, 0 to {count - 1}"])
    return Lesson("\n".join(_lines(example, position)), lambda: _draw(example, position))


@dataclass(frozen=True)
class SmallConvolution:
    """A convolution of integers with all intermediate results."""

    geometry: Geometry
    amounts: Amounts  # of padding, at (left, right, top, bottom)
    input: Tensor  # (C, H, W)
    padded: Tensor  # (C, PH, PW)
    weight: Tensor  # (O, C / groups, KH, KW)
    columns: Tensor  # (groups, C / groups * KH * KW, OH * OW)
    products: Tensor  # (groups, O / groups, OH * OW)
    output: Tensor  # (O, OH, OW)

    def window(self, position: int) -> list[tuple[int, int]]:
        """(row, column) in the padded input of each element of the window at a position."""
        (sh, sw), (dh, dw) = self.geometry.stride, self.geometry.dilation
        row, column = divmod(position, self.output.shape[2])
        kh, kw = self.weight.shape[2:]
        return [(row * sh + dh * i, column * sw + dw * j) for i in range(kh) for j in range(kw)]


def small_convolution(
    conv: nn.Conv2d, height: int, width: int, output_size: torch.Size
) -> SmallConvolution:
    """Compute every step of a layer without bias by its definition.

    The input counts from 1; weights are from -2 to 2.

    Raises:
        ConfigError: it is too large to be read.
    """
    geometry = Geometry.of(conv)
    amounts = padding_amounts(conv.padding, conv.kernel_size, conv.dilation)
    rows, columns = padded((height, width), amounts)
    for what, number, limit in [
        ("rows of the column matrix", conv.weight[0].numel(), MAX_ROWS),
        ("columns of the column matrix", output_size.numel(), MAX_COLUMNS),
        ("kernels", conv.out_channels, MAX_ROWS),
        ("numbers of the padded input", conv.in_channels * rows * columns, MAX_PIXELS),
    ]:
        if number > limit:
            problem = f"{number:,} {what}, and at most {limit} are readable"
            raise ConfigError([f"lesson window: there are {problem}"])
    image = torch.arange(1.0, conv.in_channels * height * width + 1).reshape(-1, height, width)
    around = pad(image[None], amounts, conv.padding_mode)[0]
    numbers = torch.arange(conv.weight.numel())
    weight = ((numbers * 3 + numbers // 4) % 5 - 2).float()  # without an obvious pattern
    unfolded = unfold(around[None], conv.kernel_size, conv.dilation, 0, conv.stride)[0]
    matrices = unfolded.unflatten(0, (conv.groups, -1))
    products = weight.reshape(conv.groups, conv.out_channels // conv.groups, -1) @ matrices
    return SmallConvolution(geometry, amounts, image, around, weight.view_as(conv.weight),
                            matrices, products, products.reshape(-1, *output_size))  # fmt: skip


def formula(example: SmallConvolution) -> list[str]:
    """The formula of the output's height and width with its numbers filled in."""
    left, right, top, bottom = example.amounts
    lines = []
    for i, (name, before, after) in enumerate((("height", top, bottom), ("width", left, right))):
        size, k = example.input.shape[1 + i], example.weight.shape[2 + i]
        d, s = example.geometry.dilation[i], example.geometry.stride[i]
        steps = f"floor(({size} + {before} + {after} - {d} * ({k} - 1) - 1) / {s})"
        lines.append(f"output {name:6} = {steps} + 1 = {example.output.shape[1 + i]}")
    return lines


def _lines(example: SmallConvolution, position: int) -> Iterator[str]:
    groups, rows, count = example.columns.shape
    channels, kh, kw = example.weight.shape[1:]
    yield f"output size   = {SIZE}"
    yield from formula(example)
    for number, image in enumerate(example.padded):
        yield f"\n{_input(example, number)}: window {position} in [ ]"
        yield from matrix_lines(image, example.window(position))
    yield (
        f"\ncolumn matrix: {rows} rows (channels {channels} * kernel {kh} * {kw}), a column for "
        f"each of {count} windows, read row by row"
    )
    for group in range(groups):
        of = _numbered(" of group", group, groups)
        yield f"\nkernels{of}, a row each; times the columns{of}; is the product"
        weights = matrix_lines(example.weight.reshape(groups, -1, rows)[group])
        columns, products = (matrix_lines(m[group], {(i, position) for i in range(m.shape[1])})
                             for m in (example.columns, example.products))  # fmt: skip
        yield from side_by_side(weights, ["  x "], columns, ["  = "], products)
    for number, image in enumerate(example.output):
        channel = _numbered(", channel", number, len(example.output))
        yield f"\noutput{channel}: the product, row by row"
        yield from matrix_lines(image, {divmod(position, image.shape[1])})


def _draw(example: SmallConvolution, position: int) -> Figure:
    """For each group its input, kernels and output, and below them the product."""
    groups, rows, _ = example.columns.shape
    of_group, per_group = example.products.shape[1], len(example.padded) // groups
    left, _, top, _ = example.amounts
    _, height, width = example.input.shape
    grey = [(y, x) for y in range(example.padded.shape[1]) for x in range(example.padded.shape[2])
            if not (0 <= y - top < height and 0 <= x - left < width)]  # fmt: skip
    here = divmod(position, example.output.shape[2])
    lines: list[list[Panel | str]] = []
    for group in range(groups):
        inputs = range(group * per_group, (group + 1) * per_group)
        outputs = range(group * of_group, (group + 1) * of_group)
        window = example.window(position)
        line = [Panel(example.padded[i], _input(example, i), window, grey) for i in inputs]
        for o in outputs:  # the first one beside the input, each other below the one before
            for i in inputs:
                name = f"kernel{_numbered('', o, len(example.weight))}"
                name += _numbered(", channel", i, len(example.padded))
                line.append(Panel(example.weight[o, i - inputs[0]], name))
            name = f"output{_numbered(', channel', o, len(example.output))}"
            line.append(Panel(example.output[o], name, [here]))
            lines.append([*line])
            line = []
        weights = example.weight.reshape(groups, of_group, rows)[group]
        each = "as a row" if of_group == 1 else "a row each"
        part = _numbered(" of group", group, groups)
        columns, product = example.columns[group], example.products[group]
        lines.append([
            Panel(weights, f"kernels{part}, {each}"), "×",
            Panel(columns, f"columns{part}, one for each window",
                  [(y, position) for y in range(rows)]), "=",
            Panel(product, f"product{part}", [(y, position) for y in range(of_group)]),
        ])  # fmt: skip
    return draw_panels(lines, "\n".join(formula(example)))


def _input(example: SmallConvolution, number: int) -> str:
    """Title of a channel of the input."""
    padded = ", padded" if any(example.amounts) else ""
    return f"input{padded}{_numbered(', channel', number, len(example.padded))}"


def _numbered(words: str, number: int, count: int) -> str:
    return f"{words} {number}" if count > 1 else ""
