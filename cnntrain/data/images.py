"""What a data set of labelled images is to the rest of cnntrain."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from cnntrain.data.augment import Augment
from cnntrain.data.idx import DataError
from cnntrain.data.loader import Loader, Normalise

Probability = Annotated[float, Field(ge=0, le=1)]


class ImageData(ABC):
    """Labelled images: a training set, of which a fixed part validates, and a test set.

    A data set of one's own is a subclass with the class attributes below and `read`; what that
    returns is checked against them. Making one reads nothing; `prepare` does.

    Args:
        batch_size: Training images in a batch, of all processes together.
        eval_batch_size: Validation or test images in a batch, likewise.
        val_size: Training images set apart for validation.
        split_seed: Chooses which; has nothing to do with a run's seed.
        hflip: Probability of a left-right flip of a training image.
        crop: Pixels of padding before a random crop of a training image; 0 is off.
        erase: Probability that a rectangle of a training image is made black.
        augment_epochs: How many epochs, from the first one on, crop and erase; None: all.

    Raises:
        ValueError: `val_size` leaves nothing to train on.
    """

    shape: ClassVar[tuple[int, int, int]]  # (C, H, W)
    classes: ClassVar[tuple[str, ...]]  # the name of each label
    mean: ClassVar[tuple[float, ...]]  # of the pixels scaled to 0..1, per channel
    std: ClassVar[tuple[float, ...]]
    train_size: ClassVar[int]  # images in the training set, validation included

    def __init__(
        self,
        *,
        batch_size: PositiveInt = 128,
        eval_batch_size: PositiveInt = 1024,
        val_size: PositiveInt = 5000,
        split_seed: NonNegativeInt = 0,
        hflip: Probability = 0.0,
        crop: NonNegativeInt = 0,
        erase: Probability = 0.0,
        augment_epochs: NonNegativeInt | None = None,
    ) -> None:
        if val_size >= self.train_size:
            raise ValueError(
                f"data.val_size={val_size} leaves nothing of the {self.train_size} training "
                f"images to train on: choose at most {self.train_size - 1}"
            )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.split_seed = split_seed
        self.augment = Augment(hflip=hflip, crop=crop, erase=erase)
        self.augment_epochs = augment_epochs
        self._parts: dict[str, tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def normalised(self, images: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Images of one's own, uint8 (B, C, H, W), as loaders yield theirs."""
        device = torch.device(device)
        return Normalise(self.mean, self.std, device)(images.to(device))

    @abstractmethod
    def read(self, split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
        """The set's images, uint8 (N, C, H, W), and labels, integers (N,); fetched if need be.

        Raises:
            DataError: They cannot be had; the message says what to do.
        """

    def file_names(self, split: Literal["train", "test"]) -> tuple[str, str]:
        """What an error calls the source of a split's images and that of its labels."""
        return f"{split} images", f"{split} labels"

    def prepare(self) -> None:
        """Fetches the data if need be, and reads the training set. It may take minutes, with a
        log line for what it does; the test set stays closed.

        Raises:
            DataError: The data cannot be had or is not what the class says; the message names
                the file and what is wrong or what to do.
        """
        if self._parts is None:
            images, labels = _tensors(*self._checked("train"))
            # Both parts index the same images: a copy of each would double the memory.
            train, val = map(torch.from_numpy, self.split())
            self._parts = {
                "train": (images, labels[train], train),
                "val": (images, labels[val], val),
            }

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """The training set's indices to train on and to validate with, ascending.

        NumPy promises a bit generator's raw numbers for good, as it does not its shuffles: the
        same images validate whatever the versions.
        """
        raw = np.random.PCG64(self.split_seed).random_raw(self.train_size)
        order = np.argsort(raw, kind="stable")
        return np.sort(order[self.val_size :]), np.sort(order[: self.val_size])

    def train_loader(
        self, seed: int = 0, device: torch.device | str = "cpu", *, rank: int = 0, world: int = 1
    ) -> Loader:
        """Shuffled and augmented training batches, as `seed` and the epoch determine; of `world`
        processes, the one called `rank` gets its part of each."""
        images, labels, rows = self._part("train")
        return Loader(
            images,
            labels,
            self.batch_size,
            rows=rows,
            mean=self.mean,
            std=self.std,
            shuffle=True,
            seed=seed,
            augment=self.augment,
            augment_epochs=self.augment_epochs,
            device=device,
            rank=rank,
            world=world,
        )

    def val_loader(
        self, device: torch.device | str = "cpu", *, rank: int = 0, world: int = 1
    ) -> Loader:
        """Validation batches, in the stored order, shared likewise."""
        images, labels, rows = self._part("val")
        return self._eval_loader(images, labels, device, rank, world, rows)

    def test_loader(
        self, device: torch.device | str = "cpu", *, rank: int = 0, world: int = 1
    ) -> Loader:
        """Test batches, in the stored order, shared likewise. Reads the test set: call it once,
        at the end.

        Raises:
            DataError: As `prepare`.
        """
        return self._eval_loader(*_tensors(*self._checked("test")), device, rank, world)

    def _checked(self, split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
        """What `read` returns, if it is what the class says."""
        name = type(self).__name__
        images, labels = self.read(split)
        of_images, of_labels = self.file_names(split)
        size = self.train_size if split == "train" else None
        if problem := _images_problem(images, self.shape, size):
            raise DataError(f"{name}: {of_images}: {problem}")
        if problem := _labels_problem(labels, len(images), self.num_classes):
            raise DataError(f"{name}: {of_labels}: {problem}")
        return images, labels

    def _part(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        self.prepare()
        assert self._parts is not None
        return self._parts[name]

    def _eval_loader(
        self,
        images: Tensor,
        labels: Tensor,
        device: torch.device | str,
        rank: int,
        world: int,
        rows: Tensor | None = None,
    ) -> Loader:
        return Loader(
            images,
            labels,
            self.eval_batch_size,
            rows=rows,
            mean=self.mean,
            std=self.std,
            device=device,
            rank=rank,
            world=world,
        )


def _images_problem(images: object, shape: tuple[int, int, int], size: int | None) -> str | None:
    """Why these are not uint8 (N, *shape), with N = `size`, or any N but 0 if that is None."""
    wanted = f"uint8 (N, {', '.join(map(str, shape))})"
    if not isinstance(images, np.ndarray):
        return f"a {type(images).__name__} instead of an array, {wanted}"
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != tuple(shape):
        return f"images are {images.dtype} {images.shape} instead of {wanted}"
    if len(images) == 0 or size not in (None, len(images)):
        return f"{len(images)} images instead of {size or 'at least one'}"
    return None


def _labels_problem(labels: object, size: int, num_classes: int) -> str | None:
    """Why these are not integers (N,), from 0 to num_classes - 1, with N = `size`."""
    if not isinstance(labels, np.ndarray):
        return f"a {type(labels).__name__} instead of an array, integers (N,)"
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        return f"labels are {labels.dtype} {labels.shape} instead of integers (N,)"
    if len(labels) != size:
        return f"{len(labels)} labels for {size} images"
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        return (
            f"label {labels[wrong[0]]} at index {wrong[0]} is not one of {num_classes} classes, "
            f"0 to {num_classes - 1} ({len(wrong)} of {size} labels are not)"
        )
    return None


def _tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 (N, C, H, W) and int64 (N,). The images share the array's memory, unless it has
    negative strides, which torch does not support."""
    if min(images.strides) < 0:
        images = images.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor written
        shared = torch.from_numpy(images)
    return shared, torch.from_numpy(labels.astype(np.int64))
