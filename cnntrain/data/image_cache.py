"""Memory-mapped array of decoded images, in a cache folder that any number of processes share.

A set of images is decoded once, to a folder `<key>`: `images` is an array of uint8 (N, C, H, W),
`records` has a line per row: the image, its size in bytes and time of modification, sums of its
pixels, or why it could not be decoded, and a checksum of the line. `<key>` is a hash of the images;
when some are added or changed, only these are decoded, and the rows of the others are copied.

An interrupted decoding continues where it ended. Files are written, not mapped, until they are
complete: a full disk raises an OSError, whereas a mapped file would end the process by SIGBUS.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from cnntrain.data.dataset import DataError
from cnntrain.data.decoding import decoding_error, no_warnings

log = logging.getLogger(__name__)

BATCH = 16  # images that a thread decodes before it returns them
IMAGES, RECORDS, LOCK = "images", "records", ".lock"

Image = tuple[str, int, int]  # name, bytes, time of modification in ns


@dataclass(frozen=True)
class Record:
    """A row of the array: an image and what was found in it."""

    image: Image
    sums: list[list[int]] | None = None  # of the pixels and of their squares, per channel
    error: str | None = None  # why it could not be decoded; the row is then zero

    def line(self) -> bytes:
        content = json.dumps([self.image, self.sums, self.error]).encode()
        return b"%s %08x\n" % (content, zlib.crc32(content))

    @classmethod
    def of(cls, line: bytes) -> "Record":
        """ValueError if the line is damaged."""
        content, _, checksum = line.rpartition(b" ")
        if checksum != b"%08x\n" % zlib.crc32(content):
            raise ValueError("damaged")
        image, sums, error = json.loads(content)
        return cls(tuple(image), sums, error)


Row = tuple[np.ndarray, Record]


@dataclass(frozen=True)
class DecodedImages:
    """The array uint8 (N, C, H, W), memory-mapped and read-only, and a record per row."""

    pixels: np.ndarray
    records: list[Record]


@dataclass(frozen=True)
class ImageCache:
    """Decoded images in a cache folder.

    Args:
        folder: For images decoded in this way only; created if missing.
        images: Name, bytes and time of modification of each.
        shape: Channels, height and width after decoding.
        decode: Returns an image as uint8 of this shape, given its index; called by many threads.
        title: Of the progress bar.
    """

    folder: Path
    images: Sequence[Image]
    shape: tuple[int, int, int]
    decode: Callable[[int], np.ndarray]
    title: str

    @cached_property
    def own(self) -> Path:
        """The folder of these images."""
        return self.folder / hashlib.sha256(json.dumps(self.images).encode()).hexdigest()[:16]

    def open(self) -> DecodedImages:
        """All images, decoded now unless they are in the cache.

        Raises OSError: the cache cannot be written.
        """
        if found := self._complete():
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            log.info(f"{self.title}: waiting for the process that is decoding them")
            held = lock.acquire()
        with held:
            if not (found := self._complete()):
                self._decode_all()
                found = _read(self.own, self.shape)
            for other in self.folder.iterdir():  # of the images as they were before
                if other not in (self.own, self.folder / LOCK):
                    shutil.rmtree(other, ignore_errors=True)
        return found

    def _complete(self) -> DecodedImages | None:
        """What was decoded before; None if there is more to decode."""
        found = _read(self.own, self.shape)
        if [record.image for record in found.records] != list(self.images):
            return None
        with no_warnings():
            for row, record in enumerate(found.records):
                if record.error:  # may be decoded now: a permission changes no time
                    with contextlib.suppress(Exception):  # decoders raise many classes
                        self.decode(row)
                        return None
        return found

    def _decode_all(self) -> None:
        unfinished = self.own.with_suffix(".part")
        unfinished.mkdir(exist_ok=True)
        done = _read(unfinished, self.shape).records
        earlier = self._earlier(unfinished)
        log.info(f"{self.title}: {len(self.images) - len(done):,} images to {self.own}")
        stopping = threading.Event()

        def batch(start: int) -> list[Row]:
            rows = range(start, min(start + BATCH, len(self.images)))
            return [self._decode_one(row, earlier) for row in rows if not stopping.is_set()]

        # tqdm's own lock is shared with forked processes, one of which may be killed.
        tqdm.set_lock(threading.RLock())
        pool, waiting = ThreadPoolExecutor(cores()), deque[Future[list[Row]]]()
        with (
            (unfinished / IMAGES).open("ab") as pixels,
            (unfinished / RECORDS).open("ab") as records,
            tqdm(total=len(self.images), desc=self.title, leave=False, disable=None) as bar,
            no_warnings(),
        ):
            pixels.truncate(len(done) * math.prod(self.shape))
            records.truncate(sum(len(record.line()) for record in done))
            bar.update(len(done))

            def write(found: list[Row]) -> None:
                pixels.writelines(image.tobytes() for image, _ in found)
                pixels.flush()  # before the records
                records.writelines(record.line() for _, record in found)
                records.flush()
                bar.update(len(found))

            try:
                for start in range(len(done), len(self.images), BATCH):
                    waiting.append(pool.submit(batch, start))
                    if len(waiting) > 2 * cores():  # unlike `pool.map`, which decodes all at once
                        write(waiting.popleft().result())
                for future in waiting:
                    write(future.result())
            finally:
                stopping.set()
                pool.shutdown(cancel_futures=True)
            os.fsync(pixels.fileno())
            os.fsync(records.fileno())
        shutil.rmtree(self.own, ignore_errors=True)  # damaged, or of images that were unreadable
        unfinished.replace(self.own)

    def _earlier(self, unfinished: Path) -> dict[Image, Row]:
        """Rows decoded for an earlier set of images."""
        rows: dict[Image, Row] = {}
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder != unfinished:
                found = _read(folder, self.shape)
                pairs = zip(found.pixels, found.records, strict=True)
                rows |= {record.image: (row, record) for row, record in pairs if not record.error}
        return rows

    def _decode_one(self, row: int, earlier: dict[Image, Row]) -> Row:
        image = self.images[row]
        if image in earlier and _record(image, earlier[image][0]) == earlier[image][1]:
            return earlier[image]
        try:
            pixels = np.asarray(self.decode(row), np.uint8).reshape(self.shape)
        except DataError:  # concerns all images
            raise
        except Exception as error:  # decoders raise many classes
            return np.zeros(self.shape, np.uint8), Record(
                image, error=decoding_error(error, image[0])
            )
        return pixels, _record(image, pixels)


def _record(image: Image, pixels: np.ndarray) -> Record:
    values = pixels.reshape(len(pixels), -1).astype(np.uint16)
    sums = [values.sum(1, np.uint64), (values * values).sum(1, np.uint64)]
    return Record(image, np.stack(sums, 1).tolist())


def _read(folder: Path, shape: tuple[int, int, int]) -> DecodedImages:
    """The rows of a folder up to the first that is incomplete or damaged."""
    records: list[Record] = []
    with contextlib.suppress(OSError, ValueError), (folder / RECORDS).open("rb") as lines:
        for line in lines:
            records.append(Record.of(line))
    with contextlib.suppress(OSError, ValueError):
        size = (folder / IMAGES).stat().st_size
        count = min(len(records), size // math.prod(shape))
        pixels = np.memmap(folder / IMAGES, np.uint8, "r", shape=(count, *shape))
        return DecodedImages(np.asarray(pixels), records[:count])
    return DecodedImages(np.empty((0, *shape), np.uint8), [])


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
