"""Pictures from files and arrays, of any size and kind, as a network was trained on them."""

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from cnntrain.config import ConfigError
from cnntrain.data.idx import GZIP_MAGIC, DataError, parse_idx, read_bytes

PICTURES = (".png", ".jpg", ".jpeg")
IDX = (".idx", "-ubyte", ".idx.gz", "-ubyte.gz")
LARGEST_IDX = 2**32  # bytes
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA

Given = Path | tuple[str, Image.Image]  # a file or folder; or a picture in memory and its name


class Unreadable(Exception):
    """A file that holds no picture that can be used; the message says why, without its name."""


@dataclass(frozen=True)
class Picture:
    """One of them: `index` is its place in an idx file."""

    file: Path
    index: int | None
    pixels: np.ndarray  # uint8 (C, H, W), as the network is to see it
    border: float = 0.0  # brightness along the edge, 0 to 1, if lighter than the middle; else 0

    @property
    def name(self) -> str:
        return str(self.file) if self.index is None else f"{self.file}[{self.index}]"


def picture_files(path: Path) -> list[Path]:
    """The file itself, or of a folder, and of those in it, all PNG, JPEG and idx files by their
    names, sorted; none of files of labels. A folder that cannot be looked into stands for itself.
    """
    if not path.is_dir():
        return [path]
    found: list[Path] = []
    closed: list[OSError] = []
    for folder, folders, files in os.walk(path, onerror=closed.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [file for name in files if _named_as_pictures(file := Path(folder, name))]
    return sorted([*found, *(Path(error.filename) for error in closed)])


def _named_as_pictures(file: Path) -> bool:
    name = file.name.lower()
    if name.startswith(".") or not file.is_file():
        return False
    labels = "idx1" in name or "labels" in name
    return name.endswith(PICTURES) or (name.endswith(IDX) and not labels)


def read_pictures(
    given: Given, shape: tuple[int, int, int], *, invert: bool, max_pixels: int
) -> Iterator[Picture]:
    """All pictures in a PNG, JPEG or idx file, or the one in memory, each `fitted`.

    Raises:
        Unreadable: It is damaged, of another kind, or beyond `max_pixels`.
    """
    file = given if isinstance(given, Path) else Path(given[0])
    try:
        if not isinstance(given, Path):
            _limit(*given[1].size, max_pixels)
            yield Picture(file, None, fitted(_upright(given[1]), shape, invert))
            return
        if file.is_dir():
            raise Unreadable("a folder that cannot be looked into")
        with file.open("rb") as stream:
            head = stream.read(4)
        if head.startswith(GZIP_MAGIC) or head[:3] == b"\0\0\x08":
            for index, pixels in enumerate(_idx(file, max_pixels)):
                yield _picture(file, index, Image.fromarray(pixels), shape, invert)
        else:
            yield _picture(file, None, _opened(file, max_pixels), shape, invert)
    except (UnidentifiedImageError, OSError) as error:
        strange = isinstance(error, UnidentifiedImageError)
        why = "is neither PNG, JPEG nor idx" if strange else (error.strerror or str(error))
        raise Unreadable(why) from error
    except (DataError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        said = str(error).removeprefix(f"{file}: ").split("\n")[0]
        raise Unreadable(said or "does not fit into the memory") from error


def given_pictures(images: Any, name: str = "images") -> Iterator[Given]:
    """All pictures in what `predict` was given, arrays as PIL images.

    Raises ConfigError for an object that is no picture, or an array whose shape, dtype or values
    leave open what it shows.
    """
    if isinstance(images, (str, os.PathLike)):
        if not os.fspath(images):
            raise ConfigError(["images=: there is no such file"])
        yield Path(images)
    elif isinstance(images, Image.Image):
        yield getattr(images, "filename", "") or name, images
    elif hasattr(images, "__array__"):
        pixels = _channels_last(images, name)
        for i, one in enumerate(pixels):
            image = Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one)
            yield name if len(pixels) == 1 else f"{name}[{i}]", image
    elif isinstance(images, Iterable):
        for i, one in enumerate(images):
            yield from given_pictures(one, f"{name}[{i}]")
    else:
        kinds = "a path, a PIL image, an array, a tensor, or a list of these"
        raise ConfigError([f"{name}: is {type(images).__name__}; give {kinds}"])


def _channels_last(images: Any, name: str) -> np.ndarray:
    """One or several images in an array or tensor as uint8 (N, H, W, C), C in CHANNELS."""
    tensor = isinstance(images, torch.Tensor)
    if tensor:
        images = images.detach().cpu()
        images = images.float() if images.is_floating_point() else images
    array = np.asarray(images)
    what = f"{name}: {'tensor' if tensor else 'array'} of {array.dtype}, shape {array.shape}"
    # Whether the first or the last dimension of an image can be its channels.
    first, last = (array.ndim in (3, 4) and array.shape[i] in CHANNELS for i in (-3, -1))
    several = array.ndim == 3 and not (tensor or last or array.shape[0] in CHANNELS[1:])
    if array.ndim == 2 or several:
        array = array[..., None]
    elif first and (tensor or (array.ndim == 4 and not last)):
        array = np.moveaxis(array, -3, -1)
    elif not last or (first and array.ndim == 4):
        shapes = f"(H, W) or {'(C, H, W)' if tensor else '(H, W, C)'}; several are (N, C, H, W)"
        raise ConfigError([f"{what}: the shape of one image is {shapes}; C is 1, 3 or 4"])
    kind, top = array.dtype.kind, 1 if array.dtype.kind in "bf" else 255
    # NaN is rejected as well.
    if not array.size or kind not in "buif" or not (array.min() >= 0 and array.max() <= top):
        raise ConfigError([f"{what}: give integers from 0 to 255 or floats from 0 to 1"])
    return (array * (255 / top)).round().astype(np.uint8).reshape(-1, *array.shape[-3:])


def _idx(file: Path, max_pixels: int) -> np.ndarray:
    """uint8 (N, H, W)."""
    if file.stat().st_size > LARGEST_IDX:
        raise Unreadable(f"is larger than {LARGEST_IDX:,} bytes")
    content = read_bytes(file, limit=LARGEST_IDX)
    if len(content) > LARGEST_IDX:
        raise Unreadable(f"is larger than {LARGEST_IDX:,} bytes when unpacked")
    found = parse_idx(content, file)
    if found.ndim != 3:
        what = "labels" if found.ndim == 1 else f"an array of {found.ndim} dimensions"
        raise Unreadable(f"holds {what}, not images (N, H, W)")
    if found.shape[1] * found.shape[2] == 0:
        raise Unreadable("holds images without a pixel")
    _limit(found.shape[2], found.shape[1], max_pixels)
    return found


def _opened(file: Path, max_pixels: int) -> Image.Image:
    # Pillow's own limit warns of what may be, and has no say here: ours is known before decoding.
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF, which says how a picture was taken
            image = Image.open(file, formats=["PNG", "JPEG"])
            _limit(*image.size, max_pixels)
            image.load()
            return _upright(image)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of many classes: EXIF that is damaged; the picture itself is not
        return image


def _limit(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Unreadable(f"has {width:,} x {height:,} pixels, more than max_pixels={max_pixels:,}")


def _picture(
    file: Path, index: int | None, image: Image.Image, shape: tuple[int, int, int], invert: bool
) -> Picture:
    scaled = _scaled(image, shape, invert)
    return Picture(file, index, _centred(scaled, shape), lighter_border(np.asarray(scaled)))


def lighter_border(pixels: np.ndarray) -> float:
    """How bright the edge of a picture (H, W) or (H, W, 3), uint8, is, from 0 to 1; 0 where it is
    no lighter than the middle.

    The median of a frame of 1/28 of the longer side, as an object may reach the edge. Lighter: what
    is darker than that in the middle outweighs what is lighter, differences below 8 of 255 left
    out, so that noise and uneven light do not count, but a small object does.
    """
    grey = pixels.reshape(*pixels.shape[:2], -1).mean(2)
    frame = max(1, max(grey.shape) // 28)
    middle = grey[frame:-frame, frame:-frame]
    if not middle.size:
        return 0.0
    edge = np.ones(grey.shape, bool)
    edge[frame:-frame, frame:-frame] = False
    border = float(np.median(grey[edge]))
    darker, lighter = ((sign * (border - middle) - 8).clip(0).mean() for sign in (1, -1))
    return border / 255 if darker > lighter + 0.25 else 0.0


def fitted(image: Image.Image, shape: tuple[int, int, int], invert: bool) -> np.ndarray:
    """A picture as large as possible in the middle of a black one of `shape`, (C, H, W), uint8.

    Sixteen bits become eight, colour becomes grey (ITU-R 601) where C is 1. With `invert`, what is
    dark becomes light first: of ink on paper, light strokes on black. What is transparent becomes
    black either way. A grey picture of this very size stays as it is, bit for bit.

    Raises:
        Unreadable: C is neither 1 nor 3.
    """
    return _centred(_scaled(image, shape, invert), shape)


def _scaled(image: Image.Image, shape: tuple[int, int, int], invert: bool) -> Image.Image:
    """The part of `fitted` that shows the picture."""
    channels, height, width = shape
    if channels not in (1, 3):
        raise Unreadable(f"is grey or colour, and the network sees {channels} channels")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        paper = (255, 255, 255) if invert else (0, 0, 0)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*paper, 255)), image)
    image = image.convert("RGB" if channels == 3 else "L")
    if invert:
        image = ImageOps.invert(image)
    scale = min(width / image.width, height / image.height)
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)  # of an area, where it is smaller
    return image


def _centred(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    _, height, width = shape
    whole = Image.new(image.mode, (width, height))
    whole.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    pixels = np.asarray(whole)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
