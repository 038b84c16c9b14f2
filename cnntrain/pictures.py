"""Pictures of images, kernels, feature maps and confusion matrices, uint8 (H, W, 3)."""

import io
import textwrap
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import torch
from matplotlib import color_sequences, colormaps, font_manager, get_data_path
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Picture = np.ndarray

BACKGROUND, INK = (255, 255, 255), (30, 30, 30)
NEGATIVE, POSITIVE = (33, 102, 172), (178, 24, 43)  # the ends of ColorBrewer's RdBu
COLOURS = np.array([NEGATIVE, BACKGROUND, POSITIVE]) / 255
SIGNED = LinearSegmentedColormap.from_list("signed", COLOURS, 255)
MAX_CELLS = 1000  # per side of a confusion matrix
GAP = 4  # pixels between tiles
FONT_SIZE, LINE = 12, 15  # pixels; of captions
MAX_CHARACTERS = 26  # in a line of a caption
TICKS = (0, 1, 5, 10, 25, 50, 75, 100)  # %; of the confusion matrix's colour bar


def signed(values: Tensor) -> Tensor:
    """Values (..., H, W) as colours, uint8 (..., 3, H, W), from blue over white (zero) to red.

    The colour is saturated at the largest absolute value.
    """
    largest = values.abs().max()
    share = values / (largest if largest > 0 else 1)  # -1 to 1
    shade = (share * 127).round().long() + 127
    return torch.from_numpy(SIGNED(shade.cpu().numpy(), bytes=True)[..., :3]).movedim(-1, -3)


def legend(values: Tensor) -> str:
    """Explanation of the colours of `signed`, of constant length: so are its line breaks."""
    largest = f"{float(values.abs().max()):#.3g}".rstrip(".")
    return f"Red is positive, blue negative, white 0; full colour is ±{largest}, the same for all."


def pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images, float (N, C, H, W), in their original colours: uint8 (N, 3, H, W)."""
    shape = (1, -1, 1, 1)
    m, s = (images.new_tensor(list(x)).reshape(shape) for x in (mean, std))
    original = ((images * s + m) * 255).round().clamp(0, 255).to(torch.uint8)
    return in_colour(original)


def in_colour(images: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) as (N, 3, H, W); unless C is 3, the first channel as grey."""
    return images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)


def enlarged(tiles: Tensor, size: int) -> Tensor:
    """Tiles (N, 3, H, W) with repeated pixels, so that the longer side has about `size` pixels."""
    times = max(1, size // max(tiles.shape[-2:]))
    repeated = tiles[..., :, None, :, None].expand(*tiles.shape[:3], times, -1, times)
    return repeated.flatten(-4, -3).flatten(-2)


def captioned(
    tiles: Tensor, captions: Sequence[str], *, columns: int = 8, size: int = 84, heading: str = ""
) -> Picture:
    """Tiles, uint8 (N, 3, H, W), with a caption below each and a heading above, both wrapped."""
    tiles = enlarged(tiles, size).cpu()
    height, width = tiles.shape[-2:]
    texts = [_wrapped(text, MAX_CHARACTERS) for text in captions]
    lines = max((len(text) for text in texts), default=0)
    cell_w = max([width, *(_length(line) for text in texts for line in text)]) + 3 * GAP
    cell_h = height + lines * LINE + 3 * GAP
    across, rows = min(columns, len(tiles)) * cell_w, -(-len(tiles) // columns)
    head = _wrapped(heading, max(40, across // 7))
    top = len(head) * LINE + GAP if heading else 0
    across = max([across, *(_length(line) + 2 * GAP for line in head)])
    sheet = Image.new("RGB", (across, top + rows * cell_h), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(head):
        draw.text((GAP, GAP + i * LINE), line, INK, _font(FONT_SIZE, font_file(line)))
    for number, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        x, y = number % columns * cell_w, top + number // columns * cell_h
        image = Image.fromarray(tile.movedim(0, -1).contiguous().numpy())
        sheet.paste(image, (x + (cell_w - width) // 2, y + GAP))
        for i, line in enumerate(text):
            bottom = y + height + 2 * GAP + i * LINE
            font = _font(FONT_SIZE, font_file(line))
            draw.text((x + cell_w // 2, bottom), line, INK, font, anchor="ma")
    return np.asarray(sheet)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters."""
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width)]


def _length(line: str) -> int:
    return int(_font(FONT_SIZE, font_file(line)).getlength(line)) + 1


def confusion(pairs: Tensor, occurrences: Tensor, names: Sequence[str], split: str) -> Picture:
    """Confusion matrix: how often images of a class (row) are predicted as another (column).

    The colour is the share of the row's images, on a square-root scale that makes small shares
    visible. Numbers and names are omitted for more than 20 classes; of more than MAX_CELLS classes,
    neighbours share a pixel. Drawn with Pillow: matplotlib takes about 0.3 s for it, which would
    dominate short epochs on a GPU.

    Args:
        pairs, occurrences: True and predicted class (M, 2), and how often they occur (M,).
        names: Of the K classes; long names are shortened.
        split: test or val.
    """
    group = -(-len(names) // MAX_CELLS)
    names = names[::group]
    classes, font = len(names), _font(13)
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    counts.index_put_(tuple((pairs // group).T), occurrences, accumulate=True)
    cell, numbered = (46, True) if classes <= 20 else (max(1, 920 // classes), False)
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
    part = "validation" if split == "val" else split
    title = f"Confusion matrix of {int(counts.sum()):,} {part} images"
    margin = int(max(font.getlength(name) for name in names)) + 12 if numbered else 0
    left, top, side = margin + 24, 28, classes * cell
    bar, tall = left + side + 24, max(side, 160)  # colour bar
    width = max(bar + 90, int(font.getlength(title)) + 12)
    sheet = Image.new("RGB", (width, top + max(side + margin + 28, tall + 12)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    vertical = ImageFont.TransposedFont(font, Image.Transpose.ROTATE_90)
    draw.text((6, 5), title, fill=INK, font=font)
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).cpu()
    cells = enlarged(_shaded(shares).permute(2, 0, 1)[None], side)[0].clone()
    if cell >= 4:  # lines between them
        cells[:, cell - 1 :: cell] = cells[:, :, cell - 1 :: cell] = 255
    sheet.paste(Image.fromarray(cells.permute(1, 2, 0).contiguous().numpy()), (left, top))
    for row, column in counts.cpu().nonzero().tolist() if numbered else ():
        middle = (left + column * cell + cell // 2 - 1, top + row * cell + cell // 2 - 1)
        ink = BACKGROUND if shares[row, column] > 0.2 else INK
        text = str(int(counts[row, column]))
        draw.text(middle, text, fill=ink, font=_font(12), anchor="mm")
    for i, name in enumerate(names if numbered else ()):
        draw.text((left - 6, top + i * cell + cell // 2), name, INK, font, anchor="rm")
        draw.text((left + i * cell + cell // 2 - 6, top + side + 8), name, INK, vertical)
    bottom = top + side + margin + 4
    draw.text((left + side // 2, bottom), "predicted class", INK, font, anchor="ma")
    draw.text((3, max(top, top + side // 2 - 35)), "true class", INK, vertical)
    shades = _shaded(torch.linspace(1, 0, tall).square()[:, None].expand(-1, 16))
    sheet.paste(Image.fromarray(shades.numpy()), (bar, top))
    for tick in TICKS:
        y = top + round((1 - (tick / 100) ** 0.5) * (tall - 1))
        draw.line((bar + 16, y, bar + 20, y), fill=INK)
        draw.text((bar + 24, y), f"{tick} %", fill=INK, font=_font(12), anchor="lm")
    draw.text((bar + 67, top + tall // 2 - 74), "share of the true class", INK, vertical)
    return np.asarray(sheet)


def _shaded(shares: Tensor) -> Tensor:
    """Shares from 0 to 1 as colours of the map magma, uint8 (..., 3)."""
    shades = (shares.sqrt() * 255).round().long().numpy()
    return torch.from_numpy(colormaps["magma_r"](shades, bytes=True)[..., :3])


def framed(images: Tensor, labels: Sequence[int], classes: int) -> Tensor:
    """Images, uint8 (N, 3, H, W), framed in the colour of their class.

    Up to ten classes have colours that colour-blind readers can distinguish (Petroff 2021).
    """
    ten = color_sequences["petroff10"] if classes <= 10 else None
    colours = np.array(ten or colormaps["turbo"](np.linspace(0, 1, classes))[:, :3]) * 255
    width = max(2, max(images.shape[2:]) // 10)
    height, across = (side + 2 * width for side in images.shape[2:])
    frames = torch.from_numpy(colours.round().astype(np.uint8))[labels, :, None, None]
    sheet = frames.repeat(1, 1, height, across)
    sheet[:, :, width:-width, width:-width] = images
    return sheet


def png(picture: Picture) -> bytes:
    """PNG file, compressed ten times as fast as by Pillow's default, but somewhat larger."""
    file = io.BytesIO()
    red, green, blue = np.moveaxis(picture, -1, 0)
    if (red == green).all() and (red == blue).all():
        picture = red  # grey: a smaller file
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


@lru_cache(1000)
def font_file(text: str) -> str | None:
    """A font that has all characters of a text: "" is Pillow's own, None that there is none.

    Pillow's has the Latin alphabet; matplotlib's Greek, Cyrillic, Arabic and Hebrew too; other
    scripts need a font of the system.
    """
    needed = {ord(character) for character in text if not character.isspace()}
    if max(needed, default=0) < 0x180:
        return ""
    own = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    system = sorted(font_manager.findSystemFonts(), key=lambda path: ("Regular" not in path, path))
    return next((path for path in (own, *system) if needed <= _characters(path)), None)


@cache
def _characters(path: str) -> frozenset[int]:
    try:
        _font(FONT_SIZE, path)  # fails for fonts of bitmaps, such as coloured emoji
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _font(size: int, path: str | None = None) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow has FreeType, in all its wheels"
    return font
