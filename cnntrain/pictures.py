"""Pictures of images, kernels, feature maps and confusion: pixels in, pixels out.

A picture is uint8 (H, W, 3), as TensorBoard and Pillow take it. Nothing here knows what is trained.
"""

import io
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Picture = np.ndarray

PAPER, INK = (255, 255, 255), (30, 30, 30)
RIGHT, WRONG = (0, 110, 40), (180, 20, 20)  # of captions
NEGATIVE, POSITIVE = (33, 102, 172), (178, 24, 43)  # the ends of ColorBrewer's RdBu
GAP = 4  # pixels between tiles
TEXT, LINE = 12, 15  # pixels: height of letters in a caption, and from line to line


def signed(values: Tensor) -> Tensor:
    """Numbers (..., H, W) as colours, uint8 (..., 3, H, W): blue below zero, red above.

    White is zero, and full colour the largest of all the absolute values.
    """
    largest = values.abs().max()
    share = values / (largest if largest > 0 else 1)  # -1 to 1
    shade = (share * 127).round().long() + 127
    return _shades()[:, shade.cpu()].movedim(0, -3)


def pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images, float (N, C, H, W), as one sees them: uint8 (N, 3, H, W)."""
    shape = (1, -1, 1, 1)
    m, s = (images.new_tensor(list(x)).reshape(shape) for x in (mean, std))
    seen = ((images * s + m) * 255).round().clamp(0, 255).to(torch.uint8)
    return in_colour(seen)


def in_colour(images: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) as (N, 3, H, W); of other than three channels the first as grey."""
    return images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)


def enlarged(tiles: Tensor, size: int) -> Tensor:
    """Tiles (N, 3, H, W) with every pixel a square, so that the longer side has about `size`."""
    times = max(1, size // max(tiles.shape[-2:]))
    repeated = tiles[..., :, None, :, None].expand(*tiles.shape[:3], times, -1, times)
    return repeated.flatten(-4, -3).flatten(-2)


def grid(tiles: Tensor, columns: int, size: int = 56, gap: int = GAP) -> Picture:
    """Tiles, uint8 (N, 3, H, W), side by side, each `enlarged`."""
    tiles = F.pad(enlarged(tiles, size), (0, gap, 0, gap), value=255)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    missing = tiles.new_full((rows * columns - len(tiles), *tiles.shape[1:]), 255)
    sheet = torch.cat([tiles, missing]).unflatten(0, (rows, columns))  # (R, C, 3, H, W)
    return sheet.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).cpu().numpy()


def captioned(
    tiles: Tensor,
    captions: Sequence[str],
    *,
    columns: int = 8,
    size: int = 84,
    colours: Sequence[tuple[int, int, int]] | None = None,
) -> Picture:
    """Tiles, uint8 (N, 3, H, W), with a text below each, of one or several lines."""
    tiles = enlarged(tiles, size).cpu()
    height, width = tiles.shape[-2:]
    inks = colours or [INK] * len(captions)
    texts = [
        [_written(line, ink) for line in text.split("\n")]
        for text, ink in zip(captions, inks, strict=True)
    ]
    lines = max((len(text) for text in texts), default=0)
    cell_w = max([width, *(line.width for text in texts for line in text)]) + 3 * GAP
    cell_h = height + lines * LINE + 3 * GAP
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (min(columns, len(tiles)) * cell_w, rows * cell_h), PAPER)
    for number, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        x, y = number % columns * cell_w, number // columns * cell_h
        image = Image.fromarray(tile.movedim(0, -1).contiguous().numpy())
        sheet.paste(image, (x + (cell_w - width) // 2, y + GAP))
        for i, line in enumerate(text):
            sheet.paste(line, (x + (cell_w - line.width) // 2, y + height + 2 * GAP + i * LINE))
    return np.asarray(sheet)


@lru_cache(maxsize=1000)
def _written(text: str, ink: tuple[int, int, int]) -> Image.Image:
    """A line of a caption. Most captions come again and again, and writing takes longer than all
    else about a picture."""
    font = _font(TEXT)
    strip = Image.new("RGB", (int(font.getlength(text)) + 1, LINE), PAPER)
    ImageDraw.Draw(strip).text((0, 0), text, fill=ink, font=font)
    return strip


def confusion(counts: Tensor, names: Sequence[str]) -> Picture:
    """How often an image of a class (row) is taken for another (column): counts (K, K).

    The shade is the share of the row. Where there are many classes, numbers and names are left out.
    """
    classes, font = len(names), _font(13)
    cell, numbered = (46, True) if classes <= 20 else (max(1, 920 // classes), False)
    margin = int(max(font.getlength(name) for name in names)) + 12 if numbered else 0
    left, side = margin + 20, classes * cell
    sheet = Image.new("RGB", (left + side + 4, side + margin + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).cpu()
    own = torch.eye(classes, dtype=torch.bool)
    full = torch.where(own[..., None], torch.tensor(RIGHT), torch.tensor(WRONG))
    paper = torch.tensor(PAPER)
    shades = (paper + shares.sqrt()[..., None] * (full - paper)).round().to(torch.uint8)
    cells = enlarged(shades.permute(2, 0, 1)[None], side)[0]
    if cell >= 4:  # lines between them
        cells[:, cell - 1 :: cell] = cells[:, :, cell - 1 :: cell] = 255
    sheet.paste(Image.fromarray(cells.permute(1, 2, 0).contiguous().numpy()), (left, 0))
    for row, column in counts.cpu().nonzero().tolist() if numbered else ():
        middle = (left + column * cell + cell // 2 - 1, row * cell + cell // 2 - 1)
        ink = PAPER if shares[row, column] > 0.35 else INK
        text = str(int(counts[row, column]))
        draw.text(middle, text, fill=ink, font=_font(12), anchor="mm")
    for place, name in enumerate(names if numbered else ()):
        draw.text((left - 6, place * cell + cell // 2), name, fill=INK, font=font, anchor="rm")
        _upwards(sheet, name, (left + place * cell, side + 2), (margin, cell))
    draw.text((left + side // 2, side + margin + 4), "predicted", fill=INK, font=font, anchor="ma")
    _upwards(sheet, "true class", (0, side // 2 - 45), (90, 18))
    return np.asarray(sheet)


def _upwards(sheet: Image.Image, text: str, place: tuple[int, int], size: tuple[int, int]) -> None:
    """Write from below upwards, in a box with its upper left corner at `place`; `size` is its
    height and width."""
    strip = Image.new("RGB", size, PAPER)
    middle = (size[0] - 6, size[1] // 2)
    ImageDraw.Draw(strip).text(middle, text, fill=INK, font=_font(13), anchor="rm")
    sheet.paste(strip.rotate(90, expand=True), place)


@cache
def _shades() -> Tensor:
    """The colours of -127 to 127, uint8 (3, 255)."""
    below, above = (torch.tensor(colour)[:, None] for colour in (NEGATIVE, POSITIVE))
    share = torch.linspace(-1, 1, 255)
    colours = 255 + share.abs() * (torch.where(share > 0, above, below) - 255)
    return colours.round().to(torch.uint8)


def png(picture: Picture) -> bytes:
    """As a file. Ten times as fast as Pillow's default, and somewhat longer."""
    file = io.BytesIO()
    red, green, blue = np.moveaxis(picture, -1, 0)
    if (red == green).all() and (red == blue).all():
        picture = red  # grey: less time and a smaller file
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow has FreeType, in all its wheels"
    return font
