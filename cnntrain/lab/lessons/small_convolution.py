"""Small convolution with integer values: padded input, column matrix, product and output."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from cnntrain.config import ConfigError
from cnntrain.config.errors import first_line
from cnntrain.conv.geometry import Amounts, Geometry, pad, padded, padding_amounts

Positive = PositiveInt | tuple[PositiveInt, PositiveInt]
Padding = NonNegativeInt | tuple[NonNegativeInt, NonNegativeInt] | Literal["same", "valid"]
Mode = Literal["zeros", "reflect", "replicate", "circular"]
MAX_COLUMNS, MAX_ROWS, MAX_PIXELS = 36, 36, 300  # that are still readable


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
        width = self.output.shape[2]
        (sh, sw), (dh, dw) = self.geometry.stride, self.geometry.dilation
        top, left = position // width * sh, position % width * sw
        kh, kw = self.weight.shape[2:]
        return [(top + dh * i, left + dw * j) for i in range(kh) for j in range(kw)]


def small_convolution(
    size: tuple[int, int],
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
    groups: int,
    padding_mode: Mode,
) -> SmallConvolution:
    """Compute every step by its definition.

    The input counts from 1; weights are from -2 to 2.

    Raises:
        ConfigError: the options are no convolution, or one that is too large to be read.
    """
    if in_channels * size[0] * size[1] > MAX_PIXELS:
        problem = f"with in_channels={in_channels} more than {MAX_PIXELS} numbers, too many to read"
        raise ConfigError([f"size={as_typed(size)}: {problem}"])
    for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ConfigError([f"groups={groups}: must divide {name}={channels}"])
    geometry = Geometry(stride, dilation, groups)
    if padding == "same" and max(stride) > 1:
        raise ConfigError(["padding=same: is not supported for strided convolutions"])
    amounts = padding_amounts(padding, kernel, dilation)
    padded_size = padded(size, amounts)
    _check_window(size, kernel, dilation, padded_size, padding_mode)
    output_size = geometry.output_size(padded_size, kernel)
    for what, number, limit in [
        ("the column matrix has {} rows", in_channels // groups * kernel[0] * kernel[1], MAX_ROWS),
        ("the column matrix has {} columns", output_size[0] * output_size[1], MAX_COLUMNS),
        ("there are {} kernels", out_channels, MAX_ROWS),
        ("the padded input has {} numbers", in_channels * padded_size[0] * padded_size[1],
         3 * MAX_PIXELS),
    ]:  # fmt: skip
        if number > limit:
            text = what.format(f"{number:,}")
            raise ConfigError([f"lesson window: {text}, and at most {limit} are readable"])
    image = torch.arange(1.0, in_channels * size[0] * size[1] + 1).reshape(in_channels, *size)
    try:
        around = pad(image[None], amounts, padding_mode)[0]
    except (ValueError, RuntimeError) as error:
        problem = f"{first_line(error)} (padding_mode={padding_mode})"
        raise ConfigError([f"padding={as_typed(padding)}: {problem}"]) from None
    numbers = torch.arange(out_channels * (in_channels // groups) * kernel[0] * kernel[1])
    weight = ((numbers * 3 + numbers // 4) % 5 - 2).float()  # without an obvious pattern
    weight = weight.reshape(out_channels, in_channels // groups, *kernel)
    columns = _columns(around, geometry, kernel, output_size)
    products = weight.reshape(groups, out_channels // groups, -1) @ columns
    output = products.reshape(out_channels, *output_size)
    return SmallConvolution(geometry, amounts, image, around, weight, columns, products, output)


def _columns(
    image: Tensor, geometry: Geometry, kernel: tuple[int, int], output_size: tuple[int, int]
) -> Tensor:
    """Windows of a padded image (C, H, W) as columns (groups, C / groups * KH * KW, OH * OW)."""
    (sh, sw), (dh, dw), (kh, kw) = geometry.stride, geometry.dilation, kernel
    columns = [
        image[:, y * sh : y * sh + dh * (kh - 1) + 1 : dh, x * sw : x * sw + dw * (kw - 1) + 1 : dw]
        for y in range(output_size[0])
        for x in range(output_size[1])
    ]
    return torch.stack([c.reshape(geometry.groups, -1) for c in columns], dim=2)


def _check_window(
    size: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    padded_size: tuple[int, int],
    mode: Mode,
) -> None:
    """ConfigError if the window does not fit, with the smallest padding that would do."""
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if padded_size[0] >= reach[0] and padded_size[1] >= reach[1]:
        return
    needed = [max(0, -(-(r - s) // 2)) for r, s in zip(reach, size, strict=True)]
    way_out = f"the smallest padding that helps is padding={as_typed(needed)}"
    limit = {"reflect": -1, "circular": 0}  # of the padding of these modes, beyond the size
    if mode in limit and any(n > s + limit[mode] for n, s in zip(needed, size, strict=True)):
        way_out = f"padding_mode={mode} cannot pad so much; {way_out} with padding_mode=zeros"
    window = f"dilation * (kernel - 1) + 1 = {reach[0]} x {reach[1]} pixels"
    problem = f"the padded input has {padded_size[0]} x {padded_size[1]}: it does not fit"
    text = f"the window reaches over {window}, and {problem}; {way_out}"
    raise ConfigError([f"kernel={as_typed(kernel)}: {text}"])


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of one number or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def as_typed(value: object) -> str:
    """A pair as it is typed on the command line."""
    if isinstance(value, (tuple, list)):
        return str(value[0]) if value[0] == value[1] else f"[{value[0]},{value[1]}]"
    return str(value)
