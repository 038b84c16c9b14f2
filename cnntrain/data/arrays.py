"""Images and labels in a NumPy .npz file."""

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from tempfile import TemporaryFile
from threading import Lock
from typing import Any

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from cnntrain.data.dataset import DataError, Part
from cnntrain.data.decoded import PARTS, DecodedData
from cnntrain.data.decoding import decoding_error
from cnntrain.data.entries import Entry, few

LOCK = Lock()  # many threads decode
PAIR = ("images", "labels")


class Arrays(DecodedData):
    """Arrays `images` and `labels` in a NumPy .npz file, or `train_images`, `train_labels`,
    `val_images`, ... as in MedMNIST's files. They may be larger than the memory.

    Images are uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), where C is 1 or 3: the channels are
    the last of four axes if its length is 1 or 3, otherwise the second. Labels, (N,) or (N, 1), are
    strings, or integers: indices in an array `classes` of names if the file has one, otherwise
    names themselves. Arrays of Python objects are not loaded.

    Args:
        root: The file.
        options: See `DecodedData`; the default of `size` is that of the images.
    """

    def __init__(self, *, root: str, **options: Any) -> None:
        super().__init__(root=root, **options)
        self._arrays: dict[str, np.ndarray] = {}

    def open(self) -> None:
        self.size = self.size or self.header(self.listed[0])[0]
        super().open()

    def prepare(self) -> None:
        super().prepare()
        self._arrays.clear()

    @cached_property
    def listed(self) -> list[Entry]:
        """The entries in the stored order."""
        return self.entries()

    def entries(self) -> list[Entry]:
        entries: list[Entry] = []
        with self._archive() as archive:
            found = [name.removesuffix(".npy") for name in archive.namelist()]
            parts: list[Part] = [p for p in PARTS if {f"{p}_{what}" for what in PAIR} & {*found}]
            prefixes = {f"{part}_": part for part in parts} if "train" in parts else {"": None}
            wanted = [prefix + what for prefix in prefixes for what in PAIR]
            if missing := [name for name in wanted if name not in found]:
                raise ValueError(
                    f"has no array {' and '.join(missing)}, but {few(found) or 'nothing'}; save "
                    "images and labels, or train_images and train_labels (and val_..., test_...)"
                )
            classes = _read(archive, "classes").astype(str).ravel() if "classes" in found else None
            counts = [_image_shape(archive, f"{prefix}images")[0] for prefix in prefixes]
            labels = [
                _labels(archive, f"{prefix}labels", count, classes)
                for prefix, count in zip(prefixes, counts, strict=True)
            ]
            stamp = self.root.stat().st_size, self.root.stat().st_mtime_ns
        for (prefix, part), own in zip(prefixes.items(), labels, strict=True):
            texts = own.astype(str).tolist()
            entries += [Entry(f"{prefix}images[{i}]", x, part, *stamp) for i, x in enumerate(texts)]
        if not hasattr(self, "classes"):
            names = np.unique(np.concatenate(labels)) if classes is None else classes
            self.find(classes=names.astype(str).tolist())
        return entries

    def header(self, entry: Entry) -> tuple[tuple[int, int], bool]:
        with self._archive() as archive:
            _, height, width, channels = _image_shape(archive, entry.name.partition("[")[0])
        return (height, width), channels == 3

    def decode(self, entry: Entry) -> np.ndarray:
        name, _, row = entry.name.rstrip("]").partition("[")
        with LOCK:
            if name not in self._arrays:
                self._arrays[name] = self._decompressed(name)
        image = self._arrays[name][int(row)]
        if image.ndim == 3 and image.shape[2] not in (1, 3):
            image = image.transpose(1, 2, 0)
        image = image[..., 0] if image.shape[2:] == (1,) else image
        return self.decoder(Image.fromarray(np.ascontiguousarray(image)))

    def _decompressed(self, name: str) -> np.ndarray:
        """An array in a memory-mapped file in the cache folder, which is deleted already."""
        with self._archive() as archive, archive.open(f"{name}.npy") as file:
            shape, fortran, _ = _header(file)
            try:
                with TemporaryFile(dir=self.cache) as copy:
                    shutil.copyfileobj(file, copy, 2**20)
                    return np.memmap(copy, np.uint8, "r", 0, shape, "F" if fortran else "C")
            except OSError as error:
                raise DataError(
                    f"data.cache={self.cache}: has no room for {name} of {self.root} "
                    f"({error.strerror or error}); choose another folder"
                ) from error

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        """The opened file; all errors become a DataError that names it."""
        try:
            with zipfile.ZipFile(self.root) as archive:
                yield archive
        except DataError:
            raise
        except Exception as error:  # of many classes, if the file is damaged
            hint = "" if isinstance(error, ValueError) else "; name an .npz file of numpy.savez"
            reason = f"data.root={self.root}: {decoding_error(error, '')}{hint}"
            raise DataError(reason) from error


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of an array, whose values follow."""
    first = npy.read_magic(file) == (1, 0)
    return (npy.read_array_header_1_0 if first else npy.read_array_header_2_0)(file)


def _image_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, int, int, int]:
    """Number, height, width and channels of images."""
    with archive.open(f"{name}.npy") as file:
        shape, _, dtype = _header(file)
    if dtype != np.uint8:
        raise ValueError(f"{name} is {dtype}; convert it to uint8, with values from 0 to 255")
    match shape:
        case _ if 0 in shape:
            raise ValueError(f"{name} is empty: {shape}")
        case (count, height, width):
            return count, height, width, 1
        case (count, height, width, 1 | 3 as channels) | (count, 1 | 3 as channels, height, width):
            return count, height, width, channels
    wanted = "(N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels"
    raise ValueError(f"{name} has shape {shape} instead of {wanted}")


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        try:
            return npy.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; save it as integers or strings") from error


def _labels(file: zipfile.ZipFile, name: str, count: int, classes: np.ndarray | None) -> np.ndarray:
    """Names, or numbers if there are no names, (N,)."""
    labels = _read(file, name)
    if labels.shape not in [(count,), (count, 1)] or labels.dtype.kind not in "iuU":
        found = f"{labels.dtype} {labels.shape}"
        raise ValueError(f"{name} is {found} instead of integers or strings ({count},)")
    labels = labels.reshape(count)
    if labels.dtype.kind == "U":
        return labels
    wrong = np.flatnonzero((labels < 0) | (classes is not None and labels >= len(classes)))
    if len(wrong):
        allowed = "0 or more" if classes is None else f"0 to {len(classes) - 1}, as `classes` has"
        raise ValueError(f"{name}[{wrong[0]}] is {labels[wrong[0]]} instead of {allowed}")
    return labels if classes is None else classes[labels]
