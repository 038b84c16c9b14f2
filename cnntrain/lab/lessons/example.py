"""A small convolution with all that is computed on the way, of whole numbers."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from cnntrain.config import ConfigError
from cnntrain.conv import Im2colConv2d
from cnntrain.conv.geometry import Amounts, Geometry, pad, padded, padding_amounts

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
    geometry = Geometry(stride, dilation, groups)
    amounts = padding_amounts(padding, kernel, dilation)
    _check_reach(size, kernel, dilation, amounts, padding_mode)
    _check_matrix(geometry, padded(size, amounts), kernel, in_channels, out_channels)
    try:
        conv = Im2colConv2d(
            in_channels, out_channels, kernel, stride, padding, dilation, groups, False,
            padding_mode,
        )  # fmt: skip
        count = in_channels * size[0] * size[1]
        image = torch.arange(1.0, count + 1).reshape(in_channels, *size)
        around = pad(image[None], amounts, padding_mode)[0]
    except (ValueError, RuntimeError) as error:
        said = str(error).split("\n")[0]
        raise ConfigError(
            [f"padding={shown(padding)}: {said} (padding_mode={padding_mode})"]
        ) from None
    numbers = torch.arange(conv.weight.numel()).reshape(conv.weight.shape)
    conv.weight.data = ((numbers * 3 + numbers // 4) % 5 - 2).float()  # -2 to 2, without a pattern
    columns = _columns(around, geometry, kernel)
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


def _check_matrix(
    geometry: Geometry,
    there: tuple[int, int],
    kernel: tuple[int, int],
    in_channels: int,
    out_channels: int,
) -> None:
    """Whether a finger can follow it; found out before anything is computed."""
    rows = in_channels // geometry.groups * kernel[0] * kernel[1]
    oh, ow = geometry.output_size(there, kernel)
    for what, number, most in [
        ("the column matrix has {} rows", rows, MOST_ROWS),
        ("the column matrix has {} columns", max(oh, 0) * max(ow, 0), MOST_COLUMNS),
        ("there are {} kernels", out_channels, MOST_ROWS),
        ("the padded input has {} numbers", in_channels * there[0] * there[1], 3 * MOST_PIXELS),
    ]:
        if number > most:
            said = what.format(f"{number:,}")
            raise ConfigError([f"lesson window: {said}, and {most} can be followed; take less"])


def _check_size(size: tuple[int, int], channels: int) -> None:
    if channels * size[0] * size[1] > MOST_PIXELS:
        raise ConfigError(
            [
                f"size={shown(size)}: with in_channels={channels} that is more than {MOST_PIXELS} "
                "numbers, which nobody can follow; take less"
            ]
        )


def _check_reach(
    size: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    amounts: Amounts,
    mode: Mode,
) -> None:
    """The reason why a kernel has no place, and the padding that makes it one."""
    there = padded(size, amounts)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if there[0] >= reach[0] and there[1] >= reach[1]:
        return
    helps = [max(0, -(-(r - s) // 2)) for r, s in zip(reach, size, strict=True)]
    take = f"[{helps[0]},{helps[1]}]" if helps[0] != helps[1] else helps[0]
    over = f"dilation * (kernel - 1) + 1 = {reach[0]} x {reach[1]}"
    way_out = f"the smallest padding that helps is padding={take}"
    most = {"reflect": -1, "circular": 0}  # of the size: how much these have to pad with
    if mode in most and any(h > s + most[mode] for h, s in zip(helps, size, strict=True)):
        way_out = (
            f"padding_mode={mode} cannot pad so much; the smallest padding that helps is "
            f"padding={take} with padding_mode=zeros"
        )
    raise ConfigError(
        [
            f"kernel={shown(kernel)}: the window reaches over {over} pixels, and the padded input "
            f"has {there[0]} x {there[1]}: there is no place to put it; {way_out}"
        ]
    )


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(down, right)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def shown(value: object) -> str:
    """A pair as one types it."""
    if isinstance(value, (tuple, list)):
        return str(value[0]) if value[0] == value[1] else f"[{value[0]},{value[1]}]"
    return str(value)
