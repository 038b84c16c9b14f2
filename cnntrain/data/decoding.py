"""Decoding of one image file to the size and colour of a network's input."""

import contextlib
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

Resize = Literal["crop", "pad", "stretch"]

# Not all of Pillow's: its decoder of PostScript, for example, runs another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
GREY_MODES = ("1", "L", "LA", "La", "I", "F")
# A larger image is first reduced by a whole factor to this many times the wanted size, as by
# Pillow's `reducing_gap`: a photo of 12 megapixels is decoded several times as fast.
REDUCING_GAP = 3.0


@dataclass(frozen=True)
class Decoder:
    """Converts images of any size and mode to uint8 (C, H, W).

    16 bits become 8. The EXIF orientation is applied. Of an animation the first frame is taken.

    Args:
        shape: Channels (1: grey by ITU-R 601, 3: RGB), height and width.
        resize: crop: the shorter side is scaled, then the centre is taken; pad: the image is scaled
            to fit and centred on `background`; stretch: both sides are scaled. Bilinear with
            antialiasing.
        background: What transparent pixels and the margins of `pad` become, 0 (black) to 255.
        invert: Whether dark becomes light, except `background`.
    """

    shape: tuple[int, int, int]
    resize: Resize = "crop"
    background: int = 0
    invert: bool = False

    def read(self, file: Path | IO[bytes]) -> np.ndarray:
        """The image in a file, uint8 (C, H, W); raises what Pillow raises."""
        return self(self.load(file))

    def load(self, file: Path | IO[bytes]) -> Image.Image:
        """The image in a file as it is, but for a large JPEG, which is reduced."""
        with open_image(file) as image:
            # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that suffices.
            factor = REDUCING_GAP * max(self.shape[1:]) / max(1, min(image.size))
            if factor < 1:
                width, height = image.size
                image.draft(None, (round(width * factor), round(height * factor)))
            image.load()
            return image

    def __call__(self, image: Image.Image) -> np.ndarray:
        """An image in memory, uint8 (C, H, W)."""
        return self.resized(self.converted(image))

    def converted(self, image: Image.Image) -> Image.Image:
        """The image upright, in mode L or RGB, and inverted if it is to be."""
        if orientation(image) != 1:  # else `exif_transpose` would copy the image
            with contextlib.suppress(Exception):  # of many classes, if EXIF data are damaged
                image = ImageOps.exif_transpose(image)
        background = 255 - self.background if self.invert else self.background
        image = in_mode(image, "RGB" if self.shape[0] == 3 else "L", background)
        return ImageOps.invert(image) if self.invert else image

    def resized(self, image: Image.Image) -> np.ndarray:
        """A converted image in the size of the network's input, uint8 (C, H, W)."""
        channels, height, width = self.shape
        if image.size != (width, height):
            image = self._resized(image, width, height)
        pixels = np.asarray(image).reshape(height, width, channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        bilinear = Image.Resampling.BILINEAR
        across, down = image.size
        if self.resize == "pad":
            scale = min(width / across, height / down)
            fitted = max(1, round(across * scale)), max(1, round(down * scale))
            fitted = min(width, fitted[0]), min(height, fitted[1])
            if fitted != image.size:
                image = image.resize(fitted, bilinear, reducing_gap=REDUCING_GAP)
            sheet = Image.new(image.mode, (width, height), (self.background,) * len(image.mode))
            # Rounded as by Pillow's ImageOps.pad.
            sheet.paste(image, (round((width - fitted[0]) / 2), round((height - fitted[1]) / 2)))
            return sheet
        box = (0.0, 0.0, float(across), float(down))
        if self.resize == "crop":
            scale = min(across / width, down / height)
            w, h = width * scale, height * scale
            left, top = (across - w) / 2, (down - h) / 2
            box = (left, top, left + w, top + h)
        return image.resize((width, height), bilinear, box, reducing_gap=REDUCING_GAP)


@contextmanager
def open_image(file: Path | IO[bytes]) -> Iterator[Image.Image]:
    """An image file, of which the header is read; UnidentifiedImageError if it is none."""
    if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("is not a regular file")  # a pipe would be waited for
    # Pillow does not close the file of an image that it cannot load.
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(file.open("rb")) if isinstance(file, Path) else file
        yield stack.enter_context(Image.open(stream, formats=FORMATS))


@contextmanager
def no_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings of damaged EXIF data and of more than 89 million pixels.

    Not for each image, as `catch_warnings` is not thread-safe.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_mode(image: Image.Image, mode: str, background: int) -> Image.Image:
    """An image of any mode in mode L or RGB, transparent pixels on a grey of 0 to 255.

    Of 16 bits the upper 8 are taken, as by Pillow for RGB. ValueError for 32 bits, whose range is
    unknown.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        signed = values.min(initial=0) < 0 or values.max(initial=0) > 65535
        if signed or (image.mode == "I" and image.format == "TIFF"):
            raise ValueError("has signed or 32-bit pixels; convert it to 8 or 16 bits")
        key = image.info.get("transparency")
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if isinstance(key, int):
            image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    elif image.mode == "F":
        raise ValueError("has floating-point pixels; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(below, image)
    if image.mode == "LAB":  # is converted to RGB only
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 (upright) if it has none."""
    with contextlib.suppress(Exception):  # of many classes, if EXIF data are damaged
        if (found := int(image.getexif().get(ExifTags.Base.Orientation, 1))) in range(1, 9):
            return found
    return 1


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image after its EXIF orientation is applied."""
    width, height = image.size  # Pillow has swapped those of a TIFF
    swapped = orientation(image) >= 5 and image.format != "TIFF"
    return (width, height) if swapped else (height, width)


def is_colour(image: Image.Image) -> bool:
    """Whether an opened image has colours, by its mode and palette; its pixels are not decoded."""
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
        return bool((palette != palette[:, :1]).any())
    return image.mode.partition(";")[0] not in GREY_MODES


def decoding_error(error: Exception, name: str) -> str:
    """Why an image cannot be decoded, in one line, without the name of the file."""
    if isinstance(error, UnidentifiedImageError):
        return "is not an image, or of an unknown format"
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large: {str(error).split('(')[-1].split(' pixels')[0]} pixels"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.removeprefix(f"{name}: ").split("\n")[0]


def median_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """A height and width for images of these sizes (height, width).

    Their own if they all have one of at most 224 pixels a side; otherwise a square, the largest of
    32, 48, 64, 96 and 128 that is at most the median of the shorter sides.
    """
    if len(set(sizes)) == 1 and max(sizes[0]) <= 224:
        return sizes[0]
    median = float(np.median([min(size) for size in sizes]))
    side = max((side for side in (32, 48, 64, 96, 128) if side <= median), default=32)
    return side, side
