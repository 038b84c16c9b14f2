"""In-memory loader: batches are gathered, augmented and normalised as tensors, on the device.

No worker processes, no Python code per sample, after airbench's CifarLoader
(https://github.com/KellerJordan/cifar10-airbench).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.augment import Augment, mix, transformed

# Independent random streams of an epoch: augmentation does not change the order.
ORDER, AUGMENT, TRANSFORM, MIX = range(4)

# Bytes of normalised images computed at once, as several small batches: launching a kernel costs
# more than computing a small batch. On the CPU they should fit into the cache of a core.
CHUNK_BYTES = {"cpu": 1_700_000, "cuda": 64_000_000}


class Normalise:
    """Converts uint8 images (B, C, H, W) to float32: (x / 255 - mean) / std.

    Args:
        mean: Mean of the pixels scaled to 0..1; one number, or one per channel.
        std: Standard deviation, likewise.
        device: Device of the images.
    """

    def __init__(
        self, mean: float | Sequence[float], std: float | Sequence[float], device: torch.device
    ) -> None:
        m = torch.tensor(mean, dtype=torch.float64).reshape(-1, 1, 1)
        s = torch.tensor(std, dtype=torch.float64).reshape(-1, 1, 1)
        self.scale = (1 / (255 * s)).to(device, torch.float32)  # (1 or C, 1, 1)
        self.shift = (-m / s).to(device, torch.float32)

    def __call__(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).mul_(self.scale).add_(self.shift)


class Loader:
    """Iterates over batches of labelled images in memory; one iteration is one epoch.

    The order is a pure function of (seed, epoch), and the augmentation of a sample one of (seed,
    epoch, position in the order), the same on every device. No global random state is read or
    changed. Lightning calls `set_epoch`.

    In distributed training every batch is divided: a process gets every `world`-th image, starting
    with image `rank`. Its share of the last batch may be empty. mixup and CutMix mix images of the
    same share.

    Args:
        images: uint8 (M, C, H, W), with any strides.
        labels: int64 (N,).
        batch_size: Samples per batch, summed over all processes; the last batch has the rest.
        mean, std: See `Normalise`.
        rows: int64 (N,), indices of the images that belong to `labels`; None: all, M = N. On the
            CPU the images are indexed, not copied.
        shuffle: Whether each epoch has a new order instead of the stored one.
        sampler: balanced: a shuffled epoch has as many samples, drawn with replacement, each class
            in `labels` with the same probability; None: every sample once.
        seed: Determines order and augmentation.
        augment: Augmentation; None: none.
        augment_epochs: Number of epochs, from the first on, with more augmentation than flips;
            None: all.
        num_classes: For mixup and CutMix, with which labels are probabilities, float32 (B,
            num_classes), instead of int64 (B,).
        prefetch: Whether a background thread gathers images ahead, if they are not on a GPU: for
            memory-mapped ones, so that training does not wait for the disk.
        device: Device of the batches. The images are moved there once if they take at most half
            of its free memory, else each batch is moved.
        rank, world: Rank of this process, and number of processes.
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
        sampler: Literal["balanced"] | None = None,
        seed: int = 0,
        augment: Augment | None = None,
        augment_epochs: int | None = None,
        num_classes: int = 0,
        prefetch: bool = False,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.batch_size = batch_size
        self.rank, self.world = rank, world
        self.shuffle, self.sampler = shuffle, sampler
        self.seed = seed
        self.epoch = 0
        self.start = 0
        self.seconds = 0.0  # spent on making batches so far
        self.augment = augment or Augment()
        self.augment_epochs = augment_epochs
        self.num_classes = num_classes
        self.device = torch.device(device)
        nbytes = len(labels) * images[:1].nbytes
        storage = self.device if fits(nbytes, self.device) else torch.device("cpu")
        self.images, self.index = images, rows  # (M, C, H, W), and (N,) or None
        self.positions = torch.arange(len(labels)) if rows is None else rows  # in the data set
        if storage != images.device:
            moved = torch.empty((len(labels), *images.shape[1:]), dtype=torch.uint8, device=storage)
            for part in torch.arange(len(labels)).split(4096):  # without a second copy on the CPU
                moved[part[0] : part[-1] + 1] = self.stored(part)
            self.images, self.index = moved, None
        self.prefetch = prefetch and storage.type == "cpu"
        self.labels = labels.to(storage)  # (N,)
        self.normalise = Normalise(mean, std, self.device)
        chunk = CHUNK_BYTES.get(self.device.type, CHUNK_BYTES["cuda"])
        self.chunk_batches = max(1, chunk // (4 * batch_size * images[:1].numel()))

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return -(-len(self.labels) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of iterations that begin from now on."""
        self.epoch = epoch

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Lightning calls `batch_sampler.sampler.set_epoch` before every epoch.

        An attribute `sampler` of the loader itself would make Lightning rebuild it as a DataLoader.
        """
        return SimpleNamespace(sampler=self)

    def start_at(self, batch: int) -> None:
        """Let the next iteration begin with this batch (0 is the first), to resume an epoch."""
        self.start = batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator, which reads the epoch at its first batch: Lightning creates the iterator of
        # the first epoch before it sets the epoch.
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
        """Number of images in a batch, summed over all processes."""
        return min(self.batch_size, len(self.labels) - batch * self.batch_size)

    def indices(self, epoch: int, batch: int) -> Tensor:
        """Rows of `labels` in a batch of an epoch: int64 (B,), on the CPU."""
        return self._shares(self._order(epoch))[batch]

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """One batch of any epoch, as iteration yields it."""
        return next(self.batches(epoch, index))

    def rows(self, indices: Tensor) -> Tensor:
        """Images of these rows of `labels` (B,), normalised, not augmented: (B, C, H, W)."""
        return self.normalise(send(self.stored(indices), self.device))

    def stored(self, rows: Tensor | None = None) -> Tensor:
        """Images of these rows of `labels` (B,), or of all: uint8 (B, C, H, W)."""
        if rows is None:
            return self.images if self.index is None else self.images[self.index]
        rows = rows.to(self.images.device)
        # index_select: contiguous for any strides of `images`.
        return self.images.index_select(0, rows if self.index is None else self.index[rows])

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of any epoch from batch `start` on, as iteration yields them."""
        n, (height, width) = len(self.labels), self.images.shape[2:]
        order = send(self._order(epoch), self.images.device)
        labels = self._shares(send(self.labels.index_select(0, order), self.device))
        rows = self._shares(order)
        augment = self.augment
        if self.augment_epochs is not None and epoch >= self.augment_epochs:
            augment = augment.flips()
        transforms = augment.transforms(height, width)
        if augment:
            drawn = augment.draw(n, height, width, self._generator(epoch, AUGMENT))
            parameters = self._shares(send(drawn, self.device))
        if transforms:
            generator = self._generator(epoch, TRANSFORM)
            seeds = self._shares(torch.randint(2**63 - 1, (n,), generator=generator))
        if augment.mixes:
            numbers = np.random.default_rng(self._seeds(epoch, MIX))
            mixing = augment.draw_mixing(n, self.batch_size, height, width, numbers)
            mixed = self._shares(send(mixing, self.device))

        # Nothing else in the thread: pinning memory there would break the capture of a CUDA graph.
        def gather(group: slice) -> Tensor:
            return self.stored(torch.cat(rows[group]))

        starts = range(start, len(rows), self.chunk_batches)
        groups = [slice(first, first + self.chunk_batches) for first in starts]
        gathered = ahead(gather, groups) if self.prefetch else map(gather, groups)
        for group, images in zip(groups, gathered, strict=True):
            images = send(images, self.device)
            if transforms:
                images = transformed(images, transforms, torch.cat(seeds[group]))
            if augment:
                images = augment.apply(images, torch.cat(parameters[group], -1))
            sizes = [len(batch) for batch in rows[group]]
            batches = zip(self.normalise(images).split(sizes), labels[group], strict=True)
            if augment.mixes:
                for batch, drawn in zip(batches, mixed[group], strict=True):
                    yield mix(*batch, drawn, self.num_classes)
            else:
                yield from batches

    def _shares(self, epoch: Tensor) -> list[Tensor]:
        """This process's share of every batch of an epoch: (..., N) in pieces of (..., B)."""
        batches = epoch.split(self.batch_size, -1)
        return [batch[..., self.rank :: self.world] for batch in batches]

    def _order(self, epoch: int) -> Tensor:
        """Rows of the epoch in order: every row once, or sampled; int64 (N,), on the CPU."""
        n, generator = len(self.labels), self._generator(epoch, ORDER)
        if not self.shuffle:
            return torch.arange(n)
        if self.sampler is None:
            return torch.randperm(n, generator=generator)
        # A class, then one of its images, in integers: the same on every machine.
        labels = self.labels.cpu()
        counts = labels.unique(return_counts=True)[1]  # of the classes in `labels`
        classes = torch.randint(len(counts), (n,), generator=generator)
        offsets = torch.randint(2**62, (n,), generator=generator) % counts[classes]
        return labels.argsort(stable=True)[(counts.cumsum(0) - counts)[classes] + offsets]

    def _generator(self, epoch: int, stream: int) -> torch.Generator:
        mixed = self._seeds(epoch, stream)
        return torch.Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))

    def _seeds(self, epoch: int, stream: int) -> np.random.SeedSequence:
        # Unlike with seed + epoch, no two pairs of seed and epoch have the same stream.
        return np.random.SeedSequence([self.seed, epoch, stream])


def fits(nbytes: int, device: torch.device) -> bool:
    """Whether images of this size may be stored on a device, in at most half of its free memory."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes <= free // 2


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor without a host-device synchronisation, which requires pinned memory."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def ahead(
    function: Callable[[slice], Tensor], items: Iterable[slice], depth: int = 2
) -> Iterator[Tensor]:
    """`map`, computed in one background thread, which is `depth` results ahead of the consumer and
    ends with the iteration, also with one that is abandoned."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        pending = deque[Future[Tensor]]()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
