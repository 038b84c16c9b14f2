"""Memory-mapped array of decoded images, in a cache folder that any number of processes share.

A set of images is decoded once, to a file `<key>.npy` of uint8 (N, C, H, W). Beside it,
`<key>.jsonl` has a line per row: the image, its size in bytes and time of modification, sums of its
pixels, or why it could not be decoded. `<key>` is a hash of the images; when some are added or
changed, only these are decoded, and the rows of the others are copied.

An interrupted decoding continues where it ended. Files are written, not mapped, until they are
complete: a full disk raises an OSError, whereas a mapped file would end the process by SIGBUS.
"""

import contextlib
import hashlib
import json
import logging
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from cnntrain.data.dataset import DataError
from cnntrain.data.decoding import decoding_error, no_warnings

log = logging.getLogger(__name__)

BATCH = 64  # images that a thread decodes before it returns them
LOCK = ".lock"

Image = tuple[str, int, int]  # name, bytes, time of modification in ns
Argument, Value = TypeVar("Argument"), TypeVar("Value")


@dataclass(frozen=True)
class Record:
    """A row of the array: an image and what was found in it."""

    image: Image
    sums: list[list[int]] | None = None  # of the pixels and of their squares, per channel
    error: str | None = None  # why it could not be decoded; the row is then zero

    def json(self) -> str:
        return json.dumps([self.image, self.sums, self.error]) + "\n"

    @classmethod
    def of(cls, line: str) -> "Record":
        image, sums, error = json.loads(line)
        return cls(tuple(image), sums, error)


@dataclass(frozen=True)
class DecodedImages:
    """The array uint8 (N, C, H, W), memory-mapped and read-only, and a record per row."""

    pixels: np.ndarray
    records: list[Record]


def decoded(
    folder: Path,
    images: Sequence[Image],
    shape: tuple[int, int, int],
    decode: Callable[[int], np.ndarray],
    title: str,
) -> DecodedImages:
    """All images, decoded now unless they are in the cache.

    Args:
        folder: Of the cache, for images decoded in this way only; created if missing.
        images: Name, bytes and time of modification of each.
        shape: Channels, height and width after decoding.
        decode: Returns an image as uint8 of this shape, given its index; called by many threads.
        title: Of the progress bar.

    Raises:
        OSError: The cache cannot be written.
    """
    key = hashlib.sha256(json.dumps(images).encode()).hexdigest()[:16]
    array, records = folder / f"{key}.npy", folder / f"{key}.jsonl"

    def complete() -> DecodedImages | None:
        found = _open(array, records, len(images), shape)
        return None if found is None or _repaired(found, decode) else found

    if found := complete():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, title):
        if not (found := complete()):
            _decode_all(array, records, images, shape, decode, title)
            found = _open(array, records, len(images), shape)
        assert found is not None, "was just written"
        for file in folder.glob("*.npy"):  # of the images as they were before
            if file != array:
                with contextlib.suppress(OSError):  # is in use, on Windows
                    file.unlink()
                    file.with_suffix(".jsonl").unlink(missing_ok=True)
    return found


def _repaired(found: DecodedImages, decode: Callable[[int], np.ndarray]) -> bool:
    """Whether an image that could not be decoded now can be: a permission changes no file."""
    for row, record in enumerate(found.records):
        if record.error:
            with contextlib.suppress(Exception):  # decoders raise many classes
                decode(row)
                return True
    return False


@contextlib.contextmanager
def _locked(folder: Path, title: str) -> Iterator[None]:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info(f"{title}: waiting for the process that is decoding them")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _open(
    array: Path, records: Path, count: int, shape: tuple[int, int, int]
) -> DecodedImages | None:
    """The complete files; None if there are none, or they are damaged."""
    try:
        lines = records.read_text(encoding="utf-8").splitlines()
        with array.open("rb") as file:
            offset = _header(file, count, shape)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        pixels = np.frombuffer(mapped, np.uint8, offset=offset).reshape(count, *shape)
        found = [Record.of(line) for line in lines]
    except (OSError, ValueError, TypeError):
        return None
    return DecodedImages(pixels, found) if len(found) == count else None


def _header(file: IO[bytes], count: int, shape: tuple[int, int, int]) -> int:
    """Length of the header of an .npy file; ValueError if it is of another array."""
    np.lib.format.read_magic(file)
    if np.lib.format.read_array_header_1_0(file) != ((count, *shape), False, np.dtype("uint8")):
        raise ValueError("another array")
    return file.tell()


def _decode_all(
    array: Path,
    records: Path,
    images: Sequence[Image],
    shape: tuple[int, int, int],
    decode: Callable[[int], np.ndarray],
    title: str,
) -> None:
    """Write both files, at first under other names."""
    unfinished = array.with_suffix(".npy.part"), records.with_suffix(".jsonl.part")
    for other in array.parent.glob("*.part"):
        if other not in unfinished:
            other.unlink()
    earlier = _earlier(array.parent, shape)

    def batch(start: int) -> tuple[bytes, str]:
        found = [
            _decode_one(row, images[row], shape, decode, earlier)
            for row in range(start, min(start + BATCH, len(images)))
        ]
        pixels = b"".join(image.tobytes() for image, _ in found)
        return pixels, "".join(record.json() for _, record in found)

    with unfinished[0].open("a+b") as raw, unfinished[1].open("a+b") as lines:
        done = _continue(raw, lines, images, shape)
        options: dict[str, Any] = {"unit": " images", "leave": False, "disable": None}
        bar = tqdm(total=len(images), initial=done, desc=title, **options)
        with bar, no_warnings():
            for pixels, text in map_ahead(batch, range(done, len(images), BATCH), cores()):
                raw.write(pixels)
                raw.flush()  # before its records
                lines.write(text.encode())
                lines.flush()
                bar.update(text.count("\n"))
        for file in (raw, lines):
            os.fsync(file.fileno())
    unfinished[1].replace(records)
    unfinished[0].replace(array)


def _continue(
    raw: IO[bytes], lines: IO[bytes], images: Sequence[Image], shape: tuple[int, int, int]
) -> int:
    """Cut unfinished files to the rows that are complete in both; the number of these rows."""
    done, row = 0, math.prod(shape)
    lines.seek(0)
    try:
        raw.seek(0)
        offset = _header(raw, len(images), shape)
        rows = (raw.seek(0, os.SEEK_END) - offset) // row
        end = 0
        for line, image in zip(lines.readlines()[:rows], images, strict=False):
            if not line.endswith(b"\n") or Record.of(line.decode()).image != image:
                break
            done, end = done + 1, end + len(line)
        raw.truncate(offset + done * row)
        lines.truncate(end)
    except (ValueError, TypeError):
        raw.truncate(0)
        lines.truncate(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *shape)}
        np.lib.format.write_array_header_1_0(raw, header)
    return done


def _earlier(folder: Path, shape: tuple[int, int, int]) -> dict[Image, np.ndarray]:
    """Rows decoded for an earlier set of images."""
    rows: dict[Image, np.ndarray] = {}
    for array in folder.glob("*.npy"):
        with contextlib.suppress(OSError, ValueError):
            count = len(np.load(array, mmap_mode="r"))
            if found := _open(array, array.with_suffix(".jsonl"), count, shape):
                pairs = zip(found.records, found.pixels, strict=True)
                rows |= {record.image: pixels for record, pixels in pairs if record.error is None}
    return rows


def _decode_one(
    row: int,
    image: Image,
    shape: tuple[int, int, int],
    decode: Callable[[int], np.ndarray],
    earlier: dict[Image, np.ndarray],
) -> tuple[np.ndarray, Record]:
    try:
        pixels = earlier[image] if image in earlier else decode(row)
    except DataError:  # concerns all images
        raise
    except Exception as error:  # decoders raise many classes
        return np.zeros(shape, np.uint8), Record(image, error=decoding_error(error, image[0]))
    values = pixels.reshape(shape[0], -1).astype(np.uint64)
    sums = np.stack([values.sum(1), (values * values).sum(1)], 1)
    return pixels, Record(image, sums.tolist())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_ahead(
    function: Callable[[Argument], Value], arguments: Iterable[Argument], threads: int = 1
) -> Iterator[Value]:
    """`map` by threads, in order; unlike `Executor.map` at most two results per thread wait."""
    pool, waiting = ThreadPoolExecutor(threads), deque[Future[Value]]()
    try:
        for argument in arguments:
            waiting.append(pool.submit(function, argument))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
