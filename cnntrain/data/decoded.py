"""Base class of data sets whose images are decoded: sizes, colour, split by hash, cache."""

import hashlib
import json
import logging
import math
import os
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from cnntrain.data.dataset import (
    DataError,
    ImageData,
    Part,
    Share,
    mean_and_std,
    shared_tensor,
)
from cnntrain.data.decoding import Decoder, Resize, decoding_error, median_size, no_warnings
from cnntrain.data.entries import Entry, by_hash, few, split_by_hash
from cnntrain.data.image_cache import DecodedImages, ImageCache

log = logging.getLogger(__name__)

SAMPLE = 1000  # images whose headers decide on size and colour
CACHE = "~/.cache/cnntrain/images"
PARTS: tuple[Part, ...] = ("train", "val", "test")


class DecodedData(ImageData):
    """Images of any size and mode, decoded once to a memory-mapped array in a cache folder.

    Where `entries` names no validation or no test images, they are split off the training images of
    each class by a hash of the names: the split depends on neither the machine nor the order of the
    files, and adding files moves few others from one part to another.

    Args:
        root: Where the images are.
        size: Height and width of the network's input, or one number for both; None: the size that
            all images have, up to 224; otherwise the largest of 32, 48, 64, 96 and 128 that is at
            most the median of their shorter sides.
        resize: crop: the shorter side is scaled to the size, then the centre is taken; pad: scaled
            to fit and centred on `background`; stretch: both sides are scaled.
        color: rgb or grey; None: rgb if any image has colours.
        background: What transparent pixels become, and margins with `pad`: 0 (black) to 255.
        val_fraction: Of the images of each class, for validation, if there is no such part.
        test_fraction: Likewise for the test.
        on_error: For images that cannot be decoded. stop: an error; skip: they are left out.
        cache: Folder of the decoded arrays.
        batch_size: Training images per batch, summed over all processes.
        options: Other arguments of `ImageData`, except `val_size`.
    """

    mapped = True

    def __init__(
        self,
        *,
        root: str,
        size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None,
        resize: Resize = "crop",
        color: Literal["rgb", "grey"] | None = None,
        background: NonNegativeInt = 255,
        val_fraction: Share = 0.1,
        test_fraction: Share = 0.1,
        on_error: Literal["stop", "skip"] = "stop",
        cache: str = CACHE,
        batch_size: PositiveInt = 32,
        **options: Any,
    ) -> None:
        if not root:
            raise ValueError("data.root='': name a folder or file")
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                f"data.val_fraction={val_fraction} data.test_fraction={test_fraction}: leave "
                "nothing to train on; their sum must be less than 1"
            )
        if background > 255:
            raise ValueError(f"data.background={background}: is a grey from 0 (black) to 255")
        self.root = Path(os.path.expanduser(root))
        self.size: Any = (size, size) if isinstance(size, int) else size
        self.resize, self.color, self.background = resize, color, background
        self.test_fraction, self.on_error = test_fraction, on_error
        self.cache = Path(os.path.expanduser(cache))
        self.ignored: list[str] = []  # files and folders that `entries` leaves out, for the log
        self.empty: list[str] = []  # folders without images, where it expects some
        self._decoded: DecodedImages
        super().__init__(val_fraction=val_fraction, batch_size=batch_size, **options)

    @abstractmethod
    def entries(self) -> list[Entry]:
        """All images, without decoding them, in any order. Raises DataError."""

    @abstractmethod
    def header(self, entry: Entry) -> tuple[tuple[int, int], bool]:
        """Height and width of an image, and whether it has colours. Raises what Pillow raises."""

    @abstractmethod
    def decode(self, entry: Entry) -> np.ndarray:
        """The image as the network's input, uint8 (C, H, W). Raises what Pillow raises."""

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.shape, self.resize, self.background)

    def open(self) -> None:
        labels = sorted({entry.label for entry in self.listed})
        if not hasattr(self, "classes"):  # `entries` may find them
            if odd := [name for name in labels if name == "???" or "${" in name]:
                raise DataError(f"{self.root}: {few(odd)} cannot be a name in a config; rename it")
            self.find(classes=labels)
        if self.empty:
            raise DataError(
                f"data.root={self.root}: no images of its own in {few(self.empty)}; add some, or "
                "remove or hide it"
            )
        self._check_parts(self.rows)
        self.measure()

    def measure(self) -> None:
        """Find out `shape` and the sizes of the parts. Raises DataError: no image can be read."""
        if hasattr(self, "shape"):  # recorded by an earlier run
            return
        size, color = self.size, self.color
        if not (size and color):
            sizes, colours = self._sample()
            size, color = size or median_size(sizes), color or ("rgb" if any(colours) else "grey")
            log.info(f"{self.root}: size {size[0]}x{size[1]}, {color}, by what the images are")
        self.find(shape=(3 if color == "rgb" else 1, *size), files=self._fingerprint())
        self.find(**{f"{part}_size": len(rows) for part, rows in self.rows.items()})
        self.train_size += self.val_size

    def _sample(self) -> tuple[list[tuple[int, int]], list[bool]]:
        """Size and colour of some of the images, those that can be read; DataError without any."""
        found, failed = [], []
        with no_warnings():
            for entry in by_hash(self.listed)[:SAMPLE]:
                try:
                    found.append(self.header(entry))
                except Exception as error:  # decoders raise many classes
                    failed.append(f"{entry.name}: {decoding_error(error, entry.name)}")
        if not found:
            raise DataError(self._unreadable(failed))
        sizes, colours = zip(*found, strict=True)
        return list(sizes), list(colours)

    def prepare(self) -> None:
        if self._train is not None:
            return
        self.open()
        if (was := self.found.get("files")) and was != self._fingerprint():
            log.warning(f"{self.root}: other images than those of the run")
        options = [str(self.root.resolve()), self.shape, self.resize, self.background]
        key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
        stamps = [(entry.name, entry.nbytes, entry.modified) for entry in self.listed]
        if self.ignored:
            log.info(f"{self.root}: ignored {few(self.ignored)}")
        cache = ImageCache(
            self.cache / key,
            stamps,
            self.shape,
            lambda row: self.decode(self.listed[row]),
            f"decoding {self.root.name}",
        )
        try:
            images = cache.open()
        except OSError as error:
            raise DataError(
                f"data.cache={self.cache}: cannot be written ({error.strerror or error}); choose "
                "another folder"
            ) from error
        failed = {i: record.error for i, record in enumerate(images.records) if record.error}
        if failed:
            lines = [f"{self.listed[i].name}: {error}" for i, error in failed.items()]
            if self.on_error == "stop" or len(failed) == len(stamps):
                raise DataError(self._unreadable(lines))
            log.warning(f"{self.root}: left out {few(lines)}")
            left_out = np.array(list(failed))
            self.rows = {part: np.setdiff1d(rows, left_out) for part, rows in self.rows.items()}
            self._check_parts(self.rows)
            self.train_size, self.val_size = len(self.rows["train"]), len(self.rows["val"])
            self.train_size += self.val_size
        self._decoded = images
        pixels = shared_tensor(images.pixels)
        self._train = pixels, torch.from_numpy(self.labels)
        if not (hasattr(self, "mean") and hasattr(self, "std")):
            for name, values in zip(("mean", "std"), self._statistics(), strict=True):
                self.find(**({} if hasattr(self, name) else {name: values}))

    def read(self, split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
        """All images and labels; `split` and `names` say which are of which part."""
        self.prepare()
        return self._decoded.pixels, self.labels

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        return self.rows["train"], self.rows["val"]

    def names(self, part: Part) -> list[str]:
        return [self.listed[row].name for row in self.rows[part]]

    def part(self, part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
        self.prepare()
        assert self._train is not None
        return *self._train, torch.from_numpy(self.rows[part])

    def _statistics(self) -> tuple[list[float], list[float]]:
        own = [self._decoded.records[row].sums for row in self.rows["train"]]
        sums = np.array(own, np.int64).sum(0)  # (C, 2)
        return mean_and_std(sums.T.tolist(), len(own) * math.prod(self.shape[1:]))

    @cached_property
    def listed(self) -> list[Entry]:
        """The entries by name."""
        return sorted(self.entries(), key=lambda entry: entry.name)

    @cached_property
    def labels(self) -> np.ndarray:
        """Index of the class of each entry, int64 (N,)."""
        number = {name: k for k, name in enumerate(self.classes)}
        if other := {entry.label for entry in self.listed} - number.keys():
            raise DataError(f"{self.root}: has classes that the run has not: {', '.join(other)}")
        return np.array([number[entry.label] for entry in self.listed], np.int64)

    @cached_property
    def rows(self) -> dict[Part, np.ndarray]:
        """Indices of the entries of each part, ascending."""
        parts = split_by_hash(self.listed, self.val_fraction, self.test_fraction, self.split_seed)
        return {part: np.flatnonzero(parts == part) for part in PARTS}

    def _check_parts(self, rows: Mapping[Part, np.ndarray]) -> None:
        """Raise DataError if these parts cannot be trained, validated and tested on."""
        training = rows["train"]
        if self.num_classes < 2:
            raise DataError(f"{self.root}: has one class only, {self.classes[0]}; two are needed")
        counts = np.bincount(self.labels[training], minlength=self.num_classes)
        if empty := [self.classes[k] for k in np.flatnonzero(counts == 0)]:
            raise DataError(
                f"{self.root}: {few(empty)} without training images; add some, or leave the class "
                "out"
            )
        for part in PARTS[1:]:
            if not len(rows[part]):
                raise DataError(f"{self.root}: has no {part} images; add some, or a larger set")
        if len(training) < self.batch_size:
            raise DataError(
                f"data.batch_size={self.batch_size}: is more than the {len(training)} training "
                f"images; take at most {len(training)}"
            )

    def _fingerprint(self) -> str:
        """Hash of names, sizes, classes and parts of the files."""
        files = [(e.name, e.label, e.part, e.nbytes) for e in self.listed]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]

    def _unreadable(self, lines: list[str]) -> str:
        return (
            f"{self.root}: {len(lines):,} of {len(self.listed):,} images cannot be decoded: "
            f"{few(lines)}; repair or remove them, or leave them out with data.on_error=skip"
        )
