"""Base class of data sets: labelled images, their split and their loaders."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from cnntrain.data.augment import Augment
from cnntrain.data.decoding import Decoder
from cnntrain.data.loader import Loader, Normalise
from cnntrain.terminal import NoTraceback

Part = Literal["train", "val", "test"]
Share = Annotated[float, Field(gt=0, lt=1)]

LISTS = ("classes", "shape", "mean", "std")  # attributes that are tuples


class DataError(NoTraceback, RuntimeError):
    """A data set cannot be read or downloaded; the message names the file and the way out."""


class ImageData(ABC):
    """Labelled images: a training set, part of which is held out for validation, and a test set.

    A subclass defines `read` and `classes`. The other attributes below are computed from the data,
    unless the subclass defines them too, as class attributes, properties or in its constructor;
    then the arrays that `read` returns are checked against them. The constructor reads no data;
    `prepare` does, and `open` if `shape` or `train_size` is not defined.

    Args:
        batch_size: Training images per batch, summed over all processes.
        eval_batch_size: Validation or test images per batch, likewise.
        val_size: Training images held out for validation; None: `val_fraction` of them.
        val_fraction: See `val_size`.
        split_seed: Chooses them; independent of the run's seed.
        mean: Mean of the pixels scaled to 0..1, per channel; None: see the attribute.
        std: Standard deviation, likewise.
        augment_epochs: See `Loader`.
        sampler: Of training images; see `Loader`.
        recorded: What an earlier run found in the data, from its config; see `found`.
        augmentation: Of training images; see `Augment`.

    Attributes:
        classes: Name of each label.
        shape: Channels, height and width of an image.
        train_size: Images in the training set, validation included.
        mean: Mean of the pixels of the training images scaled to 0..1, per channel.
        std: Standard deviation, likewise.
        found: Those of the attributes that are not defined by the class, for the config of a run.
        decoder: Converts other images, for `predict`.

    Raises:
        ValueError: `val_size` leaves no image to train on.
    """

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    kwargs_class = Augment  # whose arguments the constructor takes too, for the checks of a config
    mapped = False  # whether the images are in a memory-mapped file

    def __init__(
        self,
        *,
        batch_size: PositiveInt = 128,
        eval_batch_size: PositiveInt = 1024,
        val_size: PositiveInt | None = None,
        val_fraction: Share = 0.1,
        split_seed: NonNegativeInt = 0,
        mean: Sequence[float] | None = None,
        std: Annotated[Sequence[PositiveFloat], Field(min_length=1)] | None = None,
        augment_epochs: NonNegativeInt | None = None,
        sampler: Literal["balanced"] | None = None,
        recorded: Mapping[str, Any] | None = None,
        **augmentation: Any,
    ) -> None:
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size, self.val_fraction = val_size or 0, val_fraction
        self.split_seed = split_seed
        self.augment = Augment(**augmentation)
        self.augment_epochs = augment_epochs
        self.sampler = sampler
        self._train: tuple[Tensor, Tensor] | None = None
        self.found: dict[str, Any] = {}
        self.find(**(recorded or {}))
        self.given = {"mean": mean, "std": std}
        for name, values in self.given.items():
            if values is not None:
                setattr(self, name, tuple(values))
        if hasattr(self, "train_size"):
            self._hold_out()

    def find(self, **attributes: Any) -> None:
        """Set attributes that the class does not define, and record them in `found`."""
        for name, value in attributes.items():
            value = tuple(value) if isinstance(value, Sequence) and name in LISTS else value
            setattr(self, name, value)
            self.found[name] = list(value) if isinstance(value, tuple) else value

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take the normalisation of pretrained weights, of RGB images, unless options give it."""
        for name, values in {"mean": mean, "std": std}.items():
            if self.given[name] is None:
                values = values if self.shape[0] == 3 else [sum(values) / 3] * self.shape[0]
                self.find(**{name: values})

    def _hold_out(self) -> None:
        size = self.train_size
        self.val_size = self.val_size or min(max(1, round(self.val_fraction * size)), size - 1)
        if not 0 < self.val_size < size:
            raise ValueError(
                f"data.val_size={self.val_size} leaves nothing of the {size} training "
                f"images to train on: choose at most {size - 1}"
            )

    def open(self) -> None:
        """Find out `shape` and `train_size`, reading the training set if they are not defined.

        Raises DataError: it cannot be read.
        """
        if not hasattr(self, "shape") or not hasattr(self, "train_size"):
            self.prepare()

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
            images, labels = self._train = self._checked("train")
            if not hasattr(self, "shape"):
                self.find(shape=tuple(images.shape[1:]))
            if not hasattr(self, "train_size"):
                self.find(train_size=len(labels))
                self._hold_out()
            if not (hasattr(self, "mean") and hasattr(self, "std")):
                for name, values in zip(("mean", "std"), self._statistics(), strict=True):
                    self.find(**({} if hasattr(self, name) else {name: values}))

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
        return self._loader("train", self.batch_size, **options)

    def val_loader(self, device: torch.device | str = "cpu", **share: int) -> Loader:
        """Validation batches, in the stored order; see `train_loader`."""
        return self._loader("val", self.eval_batch_size, device=device, **share)

    def test_loader(self, device: torch.device | str = "cpu", **share: int) -> Loader:
        """Test batches, in the stored order; see `train_loader`. Reads the test set."""
        return self._loader("test", self.eval_batch_size, device=device, **share)

    def names(self, part: Part) -> list[str] | None:
        """Name of each image of a part, such as its file, in the stored order; None: has none."""
        return None

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.shape, resize="pad")

    def _loader(self, part: Part, size: int, **options: Any) -> Loader:
        images, labels, rows = self.part(part)
        options |= {"rows": rows, "mean": self.mean, "std": self.std}
        options |= {"num_classes": self.num_classes, "prefetch": self.mapped}
        return Loader(images, labels if rows is None else labels[rows], size, **options)

    def part(self, part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images (M, C, H, W), their labels (M,), and which of them are the part; None: all."""
        if part == "test":
            return *self._checked("test"), None
        self.prepare()
        assert self._train is not None
        return *self._train, torch.from_numpy(self.split()[part == "val"])

    def _statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the images to train on, per channel."""
        images, _, rows = self.part("train")
        assert rows is not None
        sums = torch.zeros(2, images.shape[1], dtype=torch.int64)
        for some in rows.split(1024):
            values = images[some].long()
            sums += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
        return mean_and_std(sums.tolist(), len(rows) * images[0, 0].numel())

    def _checked(self, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        """Images, uint8 (N, C, H, W), and labels, int64 (N,), if `read` returns what it should.

        The images share the memory of the array, unless it has negative strides.
        """
        images, labels = map(np.asarray, self.read(split))
        if problem := self._problem(split, images, labels):
            raise DataError(f"{type(self).__name__}: {split} set: {problem}")
        if min(images.strides) < 0:
            images = images.copy()
        return shared_tensor(images), torch.from_numpy(labels.astype(np.int64))

    def _problem(self, split: str, images: np.ndarray, labels: np.ndarray) -> str | None:
        shape: Sequence[Any] = getattr(self, "shape", ("C", "H", "W"))
        wanted = f"uint8 (N, {', '.join(map(str, shape))})"
        fits = images.shape[1:] == tuple(shape) if hasattr(self, "shape") else images.ndim == 4
        if images.dtype != np.uint8 or not fits:
            return f"images are {images.dtype} {images.shape} instead of {wanted}"
        known = split == "train" and hasattr(self, "train_size")
        size = self.train_size if known else len(images)
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


def shared_tensor(images: np.ndarray) -> Tensor:
    """A tensor in the memory of an array, which may be read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(images)


def mean_and_std(sums: Sequence[Sequence[int]], count: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixels scaled to 0..1, per channel.

    Args:
        sums: Of the pixels, and of their squares, per channel: (2, C).
        count: Pixels in each channel.
    """
    mean = [total / count for total in sums[0]]
    variances = [square / count - m * m for m, square in zip(mean, sums[1], strict=True)]
    # Images without any contrast are only shifted.
    std = [max(variance, 0.0) ** 0.5 or 255.0 for variance in variances]
    return [m / 255 for m in mean], [s / 255 for s in std]
