"""Input images of `predict`: files, folders and arrays, converted to the input of a network."""

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
from cnntrain.data import DataError
from cnntrain.data.idx import GZIP_MAGIC, read_idx

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
IDX_SUFFIXES = (".idx", "-ubyte", ".idx.gz", "-ubyte.gz")
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA

ImageSource = Path | tuple[str, Image.Image]  # a file or folder; or an image in memory and its name


class UnreadableError(Exception):
    """A file without a usable image; the message is the reason, without the file name."""


@dataclass(frozen=True)
class InputImage:
    """An image as the input of a network."""

    name: str  # of the file, with an index for IDX files
    pixels: np.ndarray  # uint8 (C, H, W)
    border: float  # `lighter_border` of the image


def image_files(path: Path) -> list[Path]:
    """A file itself, or all PNG, JPEG and IDX files below a folder, without hidden and label files.

    A folder that cannot be listed is returned itself.
    """
    if not path.is_dir():
        return [path]
    files: list[Path] = []
    errors: list[OSError] = []
    for folder, folders, names in os.walk(path, onerror=errors.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [file for name in names if _is_image_file(file := Path(folder, name))]
    return sorted([*files, *(Path(error.filename) for error in errors)])


def _is_image_file(file: Path) -> bool:
    name = file.name.lower()
    labels = "idx1" in name or "labels" in name
    known = name.endswith(IMAGE_SUFFIXES) or (name.endswith(IDX_SUFFIXES) and not labels)
    return known and not name.startswith(".") and file.is_file()


def read_images(
    source: ImageSource, shape: tuple[int, int, int], *, invert: bool, max_pixels: int
) -> Iterator[InputImage]:
    """All images in a PNG, JPEG or IDX file, or the one in memory, as (C, H, W) = `shape`.

    An image is scaled to fit and centred on black. 16 bits become 8; colour becomes grey (ITU-R
    601) where C is 1; transparent pixels become background, which is black. A grey image of the
    size `shape` is not changed.

    Args:
        source: File, or name and image.
        shape: Channels, height and width of the network's input.
        invert: Whether dark becomes light first, as for ink on paper.
        max_pixels: Larger images are not decoded.

    Raises:
        UnreadableError: The file is damaged or of another format, the image is too large, or the
            network has neither 1 nor 3 channels.
    """
    name = str(source if isinstance(source, Path) else source[0])
    try:
        for suffix, image in _decode(source, max_pixels):
            image = _scale(image, shape, invert)
            yield InputImage(name + suffix, _pad(image, shape), lighter_border(np.asarray(image)))
    except UnidentifiedImageError as error:
        raise UnreadableError("is not a PNG, JPEG or IDX file") from error
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    except (DataError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        reason = str(error).removeprefix(f"{name}: ").split("\n")[0]
        raise UnreadableError(reason or "does not fit into the memory") from error


def _decode(source: ImageSource, max_pixels: int) -> Iterator[tuple[str, Image.Image]]:
    """Images, with the suffixes of their names."""
    if not isinstance(source, Path):
        _check_pixels(*source[1].size, max_pixels)
        yield "", _upright(source[1])
        return
    if source.is_dir():
        raise UnreadableError("is a folder that cannot be listed")
    with source.open("rb") as stream:
        head = stream.read(4)
    if not (head.startswith(GZIP_MAGIC) or head[:3] == b"\0\0\x08"):
        yield "", _open(source, max_pixels)
        return
    images = read_idx(source)
    if images.ndim != 3:
        kind = "labels" if images.ndim == 1 else f"an array of {images.ndim} dimensions"
        raise UnreadableError(f"contains {kind}, not images (N, H, W)")
    _check_pixels(images.shape[2], images.shape[1], max_pixels)
    for index, pixels in enumerate(images):
        yield f"[{index}]", Image.fromarray(pixels)


def _open(file: Path, max_pixels: int) -> Image.Image:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # `max_pixels` instead
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF
            image = Image.open(file, formats=["PNG", "JPEG"])
            _check_pixels(*image.size, max_pixels)
            image.load()
            return _upright(image)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of many classes, if only the EXIF data are damaged
        return image


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if not 0 < width * height <= max_pixels:
        problem = f"more than max_pixels={max_pixels:,}" if width * height else "none at all"
        raise UnreadableError(f"has {width:,} x {height:,} pixels, {problem}")


def _scale(image: Image.Image, shape: tuple[int, int, int], invert: bool) -> Image.Image:
    channels, height, width = shape
    if channels not in (1, 3):
        raise UnreadableError(f"is grey or colour, but the network expects {channels} channels")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        background = (255, 255, 255) if invert else (0, 0, 0)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    image = image.convert("RGB" if channels == 3 else "L")
    if invert:
        image = ImageOps.invert(image)
    scale = min(width / image.width, height / image.height)
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _pad(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    _, height, width = shape
    canvas = Image.new(image.mode, (width, height))
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return np.asarray(canvas).reshape(height, width, -1).transpose(2, 0, 1)


def lighter_border(pixels: np.ndarray) -> float:
    """Brightness of the border of an image if it is lighter than the middle, otherwise 0.

    The brightness is the median of a frame of 1/28 of the longer side, as objects may touch the
    edge. It is lighter if darker pixels of the middle outweigh lighter ones. Differences below 8 of
    255, as of noise and uneven light, are ignored.

    Args:
        pixels: uint8 (H, W) or (H, W, 3).

    Returns:
        From 0 to 1.
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


def image_sources(images: Any, name: str = "images") -> Iterator[ImageSource]:
    """Paths and images in the argument of `predict`, with arrays converted to PIL images.

    Raises:
        ConfigError: An object is not an image, or the shape, dtype or values of an array are
            ambiguous.
    """
    if isinstance(images, (str, os.PathLike)):
        if not os.fspath(images):
            raise ConfigError(["images=: there is no such file"])
        yield Path(images)
    elif isinstance(images, Image.Image):
        yield getattr(images, "filename", "") or name, images
    elif hasattr(images, "__array__"):
        arrays = _channels_last(images, name)
        for i, array in enumerate(arrays):
            image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
            yield name if len(arrays) == 1 else f"{name}[{i}]", image
    elif isinstance(images, Iterable):
        for i, each in enumerate(images):
            yield from image_sources(each, f"{name}[{i}]")
    else:
        kinds = "a path, a PIL image, an array, a tensor, or a list of these"
        raise ConfigError([f"{name}: is {type(images).__name__}; give {kinds}"])


def _channels_last(images: Any, name: str) -> np.ndarray:
    """One or several images in an array or tensor as uint8 (N, H, W, C), C in CHANNELS."""
    is_tensor = isinstance(images, torch.Tensor)
    if is_tensor:
        images = images.detach().cpu()
        images = images.float() if images.is_floating_point() else images
    array = np.asarray(images)
    kind = f"{name}: {'tensor' if is_tensor else 'array'} of {array.dtype}, shape {array.shape}"
    # Whether the first or the last dimension of an image can be its channels.
    first, last = (array.ndim in (3, 4) and array.shape[i] in CHANNELS for i in (-3, -1))
    several = array.ndim == 3 and not (is_tensor or last or array.shape[0] in CHANNELS[1:])
    if array.ndim == 2 or several:
        array = array[..., None]
    elif first and (is_tensor or (array.ndim == 4 and not last)):
        array = np.moveaxis(array, -3, -1)
    elif not last or (first and array.ndim == 4):
        shapes = f"(H, W) or {'(C, H, W)' if is_tensor else '(H, W, C)'}; several are (N, C, H, W)"
        raise ConfigError([f"{kind}: the shape of one image is {shapes}; C is 1, 3 or 4"])
    top = 1 if array.dtype.kind in "bf" else 255
    # Written so that NaN is rejected.
    in_range = array.size and array.dtype.kind in "buif" and array.min() >= 0 and array.max() <= top
    if not in_range:
        raise ConfigError([f"{kind}: give integers from 0 to 255 or floats from 0 to 1"])
    return (array * (255 / top)).round().astype(np.uint8).reshape(-1, *array.shape[-3:])
