"""IDX files, the format of the MNIST family, plain or gzipped.

Two zero bytes, a type code (8: unsigned byte), the number of dimensions, each dimension as a
big-endian 32-bit integer, then the values, last dimension fastest.
Source: https://yann.lecun.org/exdb/mnist/.
"""

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np

from cnntrain.data.dataset import DataError

GZIP_MAGIC = b"\x1f\x8b"
MAX_BYTES = 2**32


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Content of a regular file, decompressed if it is gzipped, whatever its name.

    Args:
        path: The file.
        limit: Largest size in bytes, decompressed.

    Raises:
        DataError: The file cannot be read, is a damaged gzip file or larger than `limit`.
    """
    largest = limit + limit // 1000 + 1024  # gzip enlarges what it cannot compress
    try:
        size = path.stat().st_size
        if not path.is_file():  # reading a pipe would block until somebody writes to it
            raise DataError(f"{path}: is not a regular file")
        data = path.read_bytes() if size <= largest else b""
        if data.startswith(GZIP_MAGIC):
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(limit + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise DataError(f"{path}: larger than the available memory") from error
    if size > largest or len(data) > limit:
        raise DataError(f"{path}: larger than {limit:,} bytes")
    return data


def parse_idx(data: bytes, name: str | Path) -> np.ndarray:
    """Array stored in the content of an IDX file.

    Args:
        data: Decompressed content.
        name: File name for error messages.

    Returns:
        Read-only uint8 array of the declared shape.

    Raises:
        DataError: `data` is not an IDX file of unsigned bytes, or its length differs from its
            declared shape.
    """
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * (dimensions := (data[3:4] or b"\0")[0]):
        raise DataError(
            f"{name}: not an IDX file of unsigned bytes (starts with 0x{data[:4].hex()})"
        )
    shape = tuple(np.frombuffer(data, ">u4", dimensions, offset=4).tolist())
    values = data[4 + 4 * dimensions :]
    if len(values) != math.prod(shape):
        raise DataError(
            f"{name}: {len(values)} bytes of values instead of {math.prod(shape)} for the declared "
            f"shape {'x'.join(map(str, shape))}"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def read_idx(path: Path, limit: int = MAX_BYTES) -> np.ndarray:
    """Array in an IDX file, plain or gzipped; see `read_bytes` and `parse_idx`."""
    return parse_idx(read_bytes(path, limit), path)
