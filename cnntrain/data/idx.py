"""IDX files, the format of the MNIST family, plain or gzipped.

Two zero bytes, a type code (8: unsigned byte), the number of dimensions, each dimension as a
big-endian 32-bit integer, then the values, last dimension fastest.
Source: https://yann.lecun.org/exdb/mnist/.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from cnntrain.data.dataset import DataError

GZIP_MAGIC = b"\x1f\x8b"


def read_bytes(path: Path) -> bytes:
    """Content of a file, decompressed if it is gzipped, whatever its name. Raises DataError."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data.startswith(GZIP_MAGIC) else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def parse_idx(data: bytes, name: str | Path) -> np.ndarray:
    """Read-only uint8 array stored in the decompressed content of an IDX file.

    Raises:
        DataError: `data`, of the file `name`, is not an IDX file of unsigned bytes, or its length
            differs from its declared shape.
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


def read_idx(path: Path) -> np.ndarray:
    """Array in an IDX file, plain or gzipped; see `parse_idx`."""
    return parse_idx(read_bytes(path), path)
