"""Input images of `predict`: files, folders and arrays, converted to the input of a network."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cnntrain.config import ConfigError
from cnntrain.data.decoding import SUFFIXES, Decoder, decoding_error, no_warnings
from cnntrain.data.idx import GZIP_MAGIC, read_idx

ENDINGS = (*SUFFIXES, ".idx", "-ubyte", ".idx.gz", "-ubyte.gz")
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA

ImageSource = Path | tuple[str, Image.Image]  # a file; or an image in memory and its name


@dataclass(frozen=True)
class InputImage:
    """An image as the input of a network, or the error that it cannot be read."""

    name: str  # of the file, with an index for IDX files
    pixels: np.ndarray | None = None  # uint8 (C, H, W)
    light_border: bool = False
    error: str | None = None  # without the file name


def find_images(images: Any) -> list[ImageSource]:
    """Files and images in the argument of `predict`; ConfigError for anything else.

    Of a folder these are all image and IDX files below it, without hidden and label files.
    """
    if sources := list(_sources(images, "images")):
        return sources
    raise ConfigError(["images=[]: name a file or a folder"])


def _sources(images: Any, name: str) -> Iterator[ImageSource]:
    if isinstance(images, (str, os.PathLike)):
        yield from _files(os.fspath(images))
    elif isinstance(images, Image.Image):
        yield getattr(images, "filename", "") or name, images
    elif hasattr(images, "__array__"):
        arrays = _channels_last(images, name)
        for i, array in enumerate(arrays):
            image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
            yield name if len(arrays) == 1 else f"{name}[{i}]", image
    elif isinstance(images, Iterable):
        for i, each in enumerate(images):
            yield from _sources(each, f"{name}[{i}]")
    else:
        kinds = "a path, a PIL image, an array, a tensor, or a list of these"
        raise ConfigError([f"{name}: is {type(images).__name__}; give {kinds}"])


def _files(path: str) -> list[Path]:
    if not os.path.exists(path):
        raise ConfigError([f"images={path}: there is no such file"])
    if not os.path.isdir(path):
        return [Path(path)]
    files = sorted(file for file in Path(path).rglob("*") if _is_image(file.relative_to(path)))
    if not files:
        raise ConfigError([f"images={path}: contains no image or IDX file"])
    return files


def _is_image(file: Path) -> bool:
    name, hidden = file.name.lower(), any(part.startswith(".") for part in file.parts)
    return name.endswith(ENDINGS) and not hidden and "idx1" not in name and "labels" not in name


def _channels_last(images: Any, name: str) -> np.ndarray:
    """One or several images in an array or tensor as uint8 (N, H, W, C), C in CHANNELS."""
    is_tensor = isinstance(images, torch.Tensor)
    if is_tensor:
        images = images.detach().cpu()
        images = images.float() if images.is_floating_point() else images
    array = np.asarray(images)
    kind = f"{name}: {'tensor' if is_tensor else 'array'} of {array.dtype}, shape {array.shape}"
    # Whether the first or the last dimension of an image can be its channels.
    first, last = (array.ndim > 2 and array.shape[i] in CHANNELS for i in (-3, -1))
    if first and (is_tensor or array.ndim == 4):
        array = np.moveaxis(array, -3, -1)
    elif not last and array.ndim < 4 and (not first or len(array) == 1):
        array = array[..., None]
    if array.ndim not in (3, 4) or array.shape[-1] not in CHANNELS:
        shapes = f"(H, W) or {'(C, H, W)' if is_tensor else '(H, W, C)'}; several are (N, C, H, W)"
        raise ConfigError([f"{kind}: the shape of one image is {shapes}; C is 1, 3 or 4"])
    top = 1 if array.dtype.kind in "bf" else 255
    # Written so that NaN is rejected.
    in_range = array.size and array.dtype.kind in "buif" and array.min() >= 0 and array.max() <= top
    if not in_range:
        raise ConfigError([f"{kind}: give integers from 0 to 255 or floats from 0 to 1"])
    return (array * (255 / top)).round().astype(np.uint8).reshape(-1, *array.shape[-3:])


def read_images(source: ImageSource, decoder: Decoder) -> Iterator[InputImage]:
    """All images in an image or IDX file, or the one in memory, as inputs of the network.

    An image has an `error` if the file is damaged, of another format or too large, or if the
    network's images are neither grey nor RGB.
    """
    name = str(source if isinstance(source, Path) else source[0])
    try:
        if decoder.shape[0] not in (1, 3):
            channels = decoder.shape[0]
            raise ValueError(f"is grey or colour, but the network expects {channels} channels")
        with no_warnings():
            for suffix, image in _load(source, decoder):
                image = decoder.converted(image)
                pixels, light = decoder.resized(image), _has_light_border(image)
                yield InputImage(name + suffix, pixels, light)
    except Exception as error:  # decoders raise many classes
        yield InputImage(name, error=decoding_error(error, name))


def _load(source: ImageSource, decoder: Decoder) -> Iterator[tuple[str, Image.Image]]:
    """Images, with the suffixes of their names."""
    if not isinstance(source, Path):
        yield "", source[1]
        return
    with source.open("rb") as stream:
        head = stream.read(4)
    if not (head.startswith(GZIP_MAGIC) or head[:3] == b"\0\0\x08"):
        yield "", decoder.load(source)
        return
    images = read_idx(source)
    if images.ndim != 3:
        raise ValueError(f"contains an array of {images.ndim} dimensions, not (N, H, W)")
    for index, pixels in enumerate(images):
        yield f"[{index}]", Image.fromarray(pixels)


def _has_light_border(image: Image.Image) -> bool:
    """Whether more than half of the outermost pixels are light, as paper is."""
    grey = np.asarray(image.convert("L"))
    return bool(np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])) > 127)
