"""Pictures of images, kernels, feature maps and confusion matrices, uint8 (H, W, 3)."""

import io
import textwrap
import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from matplotlib import color_sequences, colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Picture = np.ndarray

BACKGROUND, INK = (255, 255, 255), (30, 30, 30)
NEGATIVE, POSITIVE = (33, 102, 172), (178, 24, 43)  # the ends of ColorBrewer's RdBu
MAX_CELLS = 1000  # per side of a confusion matrix
GAP = 4  # pixels between tiles
FONT_SIZE, LINE = 12, 15  # pixels; of captions
MAX_CHARACTERS = 26  # in a line of a caption


def signed(values: Tensor) -> Tensor:
    """Values (..., H, W) as colours, uint8 (..., 3, H, W), from blue over white (zero) to red.

    The colour is saturated at the largest absolute value.
    """
    largest = values.abs().max()
    share = values / (largest if largest > 0 else 1)  # -1 to 1
    shade = (share * 127).round().long() + 127
    return _shades()[:, shade.cpu()].movedim(0, -3)


def legend(values: Tensor) -> str:
    """Explanation of the colours of `signed`.

    The number always has three significant digits: a shorter one could change the line breaks, and
    with them the height of the picture.
    """
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
    tiles: Tensor,
    captions: Sequence[str],
    *,
    columns: int = 8,
    size: int = 84,
    heading: str = "",
) -> Picture:
    """Tiles, uint8 (N, 3, H, W), with a caption below each and a heading above all of them.

    Long lines are wrapped.
    """
    tiles, font = enlarged(tiles, size).cpu(), _font()
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
        draw.text((GAP, GAP + i * LINE), line, INK, font)
    for number, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        x, y = number % columns * cell_w, top + number // columns * cell_h
        image = Image.fromarray(tile.movedim(0, -1).contiguous().numpy())
        sheet.paste(image, (x + (cell_w - width) // 2, y + GAP))
        for i, line in enumerate(text):
            bottom = y + height + 2 * GAP + i * LINE
            draw.text((x + cell_w // 2, bottom), line, INK, font, anchor="ma")
    return np.asarray(sheet)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters."""
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width)]


def _length(line: str) -> int:
    return int(_font().getlength(line)) + 1


def confusion(counts: Tensor, names: Sequence[str], split: str) -> Picture:
    """Confusion matrix: how often images of a class (row) are predicted as another (column).

    The colour is the share of the row's images, on a square-root scale that makes small shares
    visible. Numbers and names are omitted for more than 20 classes; of more than MAX_CELLS classes,
    neighbours share a cell.

    Args:
        counts: Integers (K, K), a sparse COO tensor.
        names: Of the K classes; long names are shortened.
        split: test or val.
    """
    group = -(-len(names) // MAX_CELLS)
    names = names[::group]
    counts, size = counts.coalesce(), (len(names), len(names))
    dense = sparse(counts.indices() // group, counts.values(), size).to_dense().cpu()
    canvas = FigureCanvasAgg(
        confusion_figure(dense, names, "validation" if split == "val" else split)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font does not have
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def confusion_figure(counts: Tensor, names: Sequence[str], part: str) -> Figure:
    """Figure of a dense confusion matrix of the images of a part of the data set."""
    numbered = len(names) <= 20
    side = max(5.0, 3 + 0.46 * len(names)) if numbered else 10.0  # inches
    figure = Figure((side + 1, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), "magma_r", norm=PowerNorm(0.5, 0, 1))
    axes.set(
        title=f"Confusion matrix of {int(counts.sum()):,} {part} images",
        xlabel="predicted class",
        ylabel="true class",
        xticks=[],
        yticks=[],
    )
    bar = figure.colorbar(image, label="share of the true class", format=PercentFormatter(1))
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    if numbered:
        labels = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
        axes.set_xticks(range(len(labels)), labels, rotation=90, parse_math=False)
        axes.set_yticks(range(len(labels)), labels, parse_math=False)
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.2 else "black"
            number = str(int(counts[row, column]))
            axes.text(column, row, number, ha="center", va="center", color=colour)
    return figure


def sparse(indices: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """COO tensor of `values` (N,) at `indices` (2, N); values at the same index are summed."""
    return torch.sparse_coo_tensor(indices, values, size, check_invariants=True).coalesce()


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


@cache
def _shades() -> Tensor:
    """Colours of -127 to 127, uint8 (3, 255)."""
    below, above = (torch.tensor(colour)[:, None] for colour in (NEGATIVE, POSITIVE))
    share = torch.linspace(-1, 1, 255)
    colours = 255 + share.abs() * (torch.where(share > 0, above, below) - 255)
    return colours.round().to(torch.uint8)


def png(picture: Picture) -> bytes:
    """PNG file, compressed ten times as fast as by Pillow's default, but somewhat larger."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


@cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(FONT_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow has FreeType, in all its wheels"
    return font
