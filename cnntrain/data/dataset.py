"""Base class of data sets: labelled images, their split and their loaders."""

import warnings
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from cnntrain.data.augment import Augment
from cnntrain.data.loader import Loader, Normalise
from cnntrain.terminal import NoTraceback

Probability = Annotated[float, Field(ge=0, le=1)]


class DataError(NoTraceback, RuntimeError):
    """A data set cannot be read or downloaded; the message names the file and the way out."""


class ImageData(ABC):
    """Labelled images: a training set, part of which is held out for validation, and a test set.

    A subclass defines `read` and the attributes below, as class attributes, properties or in its
    constructor. The arrays that `read` returns are checked against them. The constructor reads no
    data; `prepare` does.

    Args:
        batch_size: Training images per batch, summed over all processes.
        eval_batch_size: Validation or test images per batch, likewise.
        val_size: Training images held out for validation.
        split_seed: Chooses them; independent of the run's seed.
        hflip: Probability of a horizontal flip of a training image.
        crop: Pixels of padding before a random crop of a training image; 0: no crop.
        erase: Probability that a rectangle of a training image is erased.
        augment_epochs: Number of epochs, from the first on, with crop and erase; None: all.
        sampler: Of training images; see `Loader`.

    Attributes:
        shape: Channels, height and width of an image.
        classes: Name of each label.
        mean: Mean of the pixels scaled to 0..1, per channel.
        std: Standard deviation, likewise.
        train_size: Images in the training set, validation included.

    Raises:
        ValueError: `val_size` leaves no image to train on.
    """

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_size: int

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
        sampler: Literal["balanced"] | None = None,
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
        self.sampler = sampler
        self._train: tuple[Tensor, Tensor] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @abstractmethod
    def read(self, split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 (N, C, H, W), and labels, integers (N,), downloaded if necessary.

        Raises:
            DataError: They cannot be read or downloaded.
        """

    def prepare(self) -> None:
        """Read the training set, downloaded if necessary; the test set is not opened.

        Raises DataError: it cannot be read, or does not agree with the attributes of the class.
        """
        if self._train is None:
            self._train = self._checked("train")

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices in the training set to train on and to validate with, ascending."""
        # For all versions of NumPy: the raw numbers of a bit generator are guaranteed.
        raw = np.random.PCG64(self.split_seed).random_raw(self.train_size)
        order = np.argsort(raw, kind="stable")
        return np.sort(order[self.val_size :]), np.sort(order[: self.val_size])

    def class_counts(self) -> Tensor:
        """Images of each class to train on, those held out left out: int64 (classes,), on the CPU.

        Reads the training set.
        """
        self.prepare()
        assert self._train is not None
        labels = self._train[1][torch.from_numpy(self.split()[0])]
        return labels.bincount(minlength=self.num_classes)

    def normalised(self, images: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Other images, uint8 (B, C, H, W), normalised as those of the loaders."""
        device = torch.device(device)
        return Normalise(self.mean, self.std, device)(images.to(device))

    def train_loader(
        self, seed: int = 0, device: torch.device | str = "cpu", *, rank: int = 0, world: int = 1
    ) -> Loader:
        """Shuffled and augmented training batches, a function of `seed` and the epoch.

        Args:
            seed: The run's seed.
            device: Where the batches are made.
            rank: Of this process; it gets every `world`-th image of a batch.
            world: Number of processes.
        """
        options: dict[str, Any] = {"augment": self.augment, "augment_epochs": self.augment_epochs}
        options |= {"shuffle": True, "seed": seed, "device": device, "rank": rank, "world": world}
        options["sampler"] = self.sampler
        return self._train_part(0, self.batch_size, **options)

    def val_loader(self, device: torch.device | str = "cpu", **share: int) -> Loader:
        """Validation batches, in the stored order; see `train_loader`."""
        return self._train_part(1, self.eval_batch_size, device=device, **share)

    def test_loader(self, device: torch.device | str = "cpu", **share: int) -> Loader:
        """Test batches, in the stored order; see `train_loader`. Reads the test set."""
        images, labels = self._checked("test")
        options: dict[str, Any] = {"mean": self.mean, "std": self.std, "device": device, **share}
        return Loader(images, labels, self.eval_batch_size, **options)

    def _train_part(self, part: int, size: int, **options: Any) -> Loader:
        self.prepare()
        assert self._train is not None
        images, labels = self._train  # both parts index the same images
        rows = torch.from_numpy(self.split()[part])
        options |= {"rows": rows, "mean": self.mean, "std": self.std}
        return Loader(images, labels[rows], size, **options)

    def _checked(self, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """Images, uint8 (N, C, H, W), and labels, int64 (N,), if `read` returns what it should.

        The images share the memory of the array, unless it has negative strides.
        """
        images, labels = map(np.asarray, self.read(split))
        if problem := self._problem(split, images, labels):
            raise DataError(f"{type(self).__name__}: {split} set: {problem}")
        if min(images.strides) < 0:
            images = images.copy()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            shared = torch.from_numpy(images)
        return shared, torch.from_numpy(labels.astype(np.int64))

    def _problem(self, split: str, images: np.ndarray, labels: np.ndarray) -> str | None:
        wanted = f"uint8 (N, {', '.join(map(str, self.shape))})"
        if images.dtype != np.uint8 or images.shape[1:] != tuple(self.shape):
            return f"images are {images.dtype} {images.shape} instead of {wanted}"
        size = self.train_size if split == "train" else len(images)
        if len(images) != size or not size:
            return f"{len(images)} images instead of {size or 'at least one'}"
        if labels.dtype.kind not in "iu" or labels.shape != (size,):
            return f"labels are {labels.dtype} {labels.shape} instead of integers ({size},)"
        wrong = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(wrong):
            return (
                f"label {labels[wrong[0]]} at index {wrong[0]} is not one of {self.num_classes} "
                f"classes, 0 to {self.num_classes - 1} ({len(wrong)} of {size} labels are not)"
            )
        return None
