"""Batches out of memory: gathered, augmented and normalised where the images lie.

After airbench's CifarLoader (https://github.com/KellerJordan/cifar10-airbench): no worker
processes, no work per sample in Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.augment import Augment

# What is random in an epoch; each has a stream of its own, so that one does not shift the other.
ORDER, AUGMENT = 0, 1

# Bytes of normalised images made together, as launching a kernel takes longer than a kernel for a
# few of them: what stays in a core's cache, and on a GPU much more.
TOGETHER = {"cpu": 1_700_000, "cuda": 64_000_000}


class Normalise:
    """Makes uint8 images (B, C, H, W) on `device` float32: (x / 255 - mean) / std.

    `mean` and `std` are of the pixels scaled to 0..1; one number, or one per channel.
    """

    def __init__(
        self, mean: float | Sequence[float], std: float | Sequence[float], device: torch.device
    ) -> None:
        # That is scale * x + shift.
        m = torch.tensor(mean, dtype=torch.float64).reshape(-1, 1, 1)
        s = torch.tensor(std, dtype=torch.float64).reshape(-1, 1, 1)
        scale = 1 / (255 * s)
        self.scale = scale.to(device, torch.float32)  # (1 or C, 1, 1)
        self.shift = (-m / s).to(device, torch.float32)
        self.same_scale = scale.item() if scale.numel() == 1 else None

    def __call__(self, images: Tensor) -> Tensor:
        if self.same_scale is not None:
            # Converts, scales and shifts in one pass over the memory.
            return torch.add(self.shift, images, alpha=self.same_scale)
        return images.to(torch.float32).mul_(self.scale).add_(self.shift)


class Loader:
    """Iterates over labelled images in memory; one iteration is one epoch.

    Several processes that train together share every batch: each gets every `world`-th image of
    it, from image `rank` on, as it would be without the others. Its part may be empty.

    The order is a pure function of (seed, epoch), a sample's augmentation one of (seed, epoch,
    position in the order): no other random number, PyTorch's global ones included, is read or
    changed, and both are the same on every device. Lightning sets the epoch by itself.

    Args:
        images: uint8 (M, C, H, W), of any strides.
        labels: int64 (N,).
        batch_size: Samples in a batch, of all processes; the last one holds the rest.
        mean: Of the pixels scaled to 0..1; one number, or one per channel.
        std: Standard deviation, likewise.
        rows: int64 (N,), the images of these labels; None: all of them, M = N. On the CPU the
            images are indexed, not copied.
        shuffle: A new order each epoch instead of the stored one.
        seed: Of order and augmentation, not negative.
        augment: What to do to the uint8 images first.
        augment_epochs: How many epochs, from the first one on, crop and erase; None: all. The
            later ones flip alone, as they would have.
        device: Where the batches are wanted. Images and labels move there once if they fit, and
            a batch at a time otherwise.
        rank: Which of the processes this is, from 0.
        world: How many there are.

    Yields:
        Images normalised to (x / 255 - mean) / std, float32 (B, C, H, W), and labels (B,).

    Raises:
        ValueError: Sizes or types that do not go together.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        rows: Tensor | None = None,
        shuffle: bool = False,
        seed: int = 0,
        augment: Augment | None = None,
        augment_epochs: int | None = None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images must be uint8 (N, C, H, W), not {images.dtype} {tuple(images.shape)}"
            )
        if labels.shape != (count := images.shape[:1] if rows is None else rows.shape):
            raise ValueError(f"{count[0]} images but labels of shape {tuple(labels.shape)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.batch_size = batch_size
        self.rank, self.world = rank, world
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.start = 0
        self.seconds = 0.0  # that making batches has taken in all, so far
        self.augment = augment or Augment()
        self.augment_epochs = augment_epochs
        self.device = torch.device(device)
        nbytes = len(labels) * images[:1].nbytes
        home = self.device if fits(nbytes, self.device) else torch.device("cpu")
        self.images, self.index = images, rows  # (M, C, H, W), and (N,) or None
        if home != images.device:
            moved = torch.empty((len(labels), *images.shape[1:]), dtype=torch.uint8, device=home)
            for part in torch.arange(len(labels)).split(4096):  # no copy of all of them here
                moved[part[0] : part[-1] + 1] = self.stored(part)
            self.images, self.index = moved, None
        self.labels = labels.to(home)  # (N,)
        self.normalise = Normalise(mean, std, self.device)
        together = TOGETHER.get(self.device.type, TOGETHER["cuda"])
        self.at_once = max(1, together // (4 * batch_size * images[:1].numel()))  # batches

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return -(-len(self.labels) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the iterations that begin from now on."""
        self.epoch = epoch

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for `sampler.set_epoch`, which it calls before every epoch.

        The loader itself has no `sampler`: Lightning would take it for a DataLoader to rebuild.
        """
        return SimpleNamespace(sampler=self)

    def start_at(self, batch: int) -> None:
        """Lets the next iteration, and only that, begin with this batch (0 is the first): an epoch
        that was interrupted goes on where it was."""
        self.start = batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator reads the epoch at the first batch: Lightning makes the first epoch's
        # iterator before it sets the epoch.
        start, self.start = self.start, 0
        batches = self.batches(self.epoch, start)
        while True:
            begun = perf_counter()
            batch = next(batches, None)
            self.seconds += perf_counter() - begun
            if batch is None:
                return
            yield batch

    def size(self, batch: int) -> int:
        """How many images are in a batch, of all processes."""
        return min(self.batch_size, len(self.labels) - batch * self.batch_size)

    def indices(self, epoch: int, batch: int) -> Tensor:
        """Which images are in a batch of an epoch: int64 (B,), rows of `labels`, on the CPU."""
        return self._parts(self._order(epoch))[batch]

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """One batch of any epoch, as iterating yields it."""
        return next(self.batches(epoch, index))

    def rows(self, indices: Tensor) -> Tensor:
        """The images of these rows of `labels` (B,), normalised, not augmented, (B, C, H, W)."""
        return self.normalise(send(self.stored(indices), self.device))

    def stored(self, rows: Tensor | None = None) -> Tensor:
        """The images of these rows of `labels` (B,), or of all: uint8 (B, C, H, W)."""
        if rows is None:
            return self.images if self.index is None else self.images[self.index]
        rows = rows.to(self.images.device)
        # Contiguous, whatever the strides of `images`.
        return self.images.index_select(0, rows if self.index is None else self.index[rows])

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of any epoch from the batch `start` on, as iterating yields them."""
        n, (height, width) = len(self.labels), self.images.shape[2:]
        order = send(self._order(epoch), self.images.device)
        labels = self._parts(send(self.labels.index_select(0, order), self.device))
        rows = self._parts(order)
        augment, parameters = self.augment, list[Tensor]()
        if self.augment_epochs is not None and epoch >= self.augment_epochs:
            augment = replace(augment, crop=0, erase=0.0)
        if augment:
            drawn = augment.draw(n, height, width, self._generator(epoch, AUGMENT))
            parameters = list(self._parts(send(drawn, self.device)))
        for first in range(start, len(rows), self.at_once):
            group = slice(first, first + self.at_once)
            images = send(self.stored(_joined(rows[group])), self.device)
            if augment:
                images = augment.apply(images, _joined(parameters[group]))
            sizes = [len(batch) for batch in rows[group]]
            yield from zip(self.normalise(images).split(sizes), labels[group], strict=True)

    def _parts(self, epoch: Tensor) -> Sequence[Tensor]:
        """This process's part of every batch of an epoch: (..., N) in pieces of (..., B)."""
        batches = epoch.split(self.batch_size, -1)
        if self.world == 1:
            return batches
        return [batch[..., self.rank :: self.world] for batch in batches]

    def _order(self, epoch: int) -> Tensor:
        """Every row once, int64 (N,) on the CPU, in the order of the epoch."""
        if not self.shuffle:
            return torch.arange(len(self.labels))
        return torch.randperm(len(self.labels), generator=self._generator(epoch, ORDER))

    def _generator(self, epoch: int, stream: int) -> torch.Generator:
        """A generator on the CPU that (seed, epoch) determine. SeedSequence mixes: seed 0 of
        epoch 1 has nothing in common with seed 1 of epoch 0."""
        mixed = np.random.SeedSequence([self.seed, epoch, stream])
        return torch.Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of batches (..., B) behind each other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def fits(nbytes: int, device: torch.device) -> bool:
    """Whether the images may live on the device: half of its free memory is left to training."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes <= free // 2


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor without making the CPU wait: only pinned memory is copied in passing."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
