"""The idx file format of the MNIST family, plain or gzipped.

A file is two zero bytes, a type code (8: unsigned byte), the number of dimensions, each dimension
as a big-endian 32-bit integer, and then the values, last dimension fastest.
Source: the format's description at https://yann.lecun.org/exdb/mnist/.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

UNSIGNED_BYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"


class DataError(RuntimeError):
    """A data set cannot be read or obtained; the message says which file and what to do."""


@dataclass(frozen=True)
class IdxFile:
    """A known idx file: its name, and what its decompressed bytes must be.

    Args:
        name: File name without ".gz".
        size: Length in bytes.
        sha256: SHA-256 sum in hexadecimal.
    """

    name: str
    size: int
    sha256: str

    def difference(self, data: bytes) -> str | None:
        """Says how `data` differs from this file; None if it is this file, bit for bit."""
        if len(data) != self.size:
            return f"{len(data)} bytes instead of {self.size}"
        if hashlib.sha256(data).hexdigest() != self.sha256:
            return "wrong SHA-256 sum"
        return None


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed if it is gzipped, whatever its name says.

    Raises:
        DataError: The file is a damaged gzip file.
        OSError: It cannot be read.
    """
    data = path.read_bytes()
    if not data.startswith(GZIP_MAGIC):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error})") from error


def parse_idx(data: bytes, name: str | Path) -> np.ndarray:
    """The array in the bytes of an idx file.

    Args:
        data: The file's decompressed content.
        name: The file's name for error messages.

    Returns:
        A writable uint8 array with the dimensions that the file declares.

    Raises:
        DataError: The bytes are no idx file of unsigned bytes, or not as long as declared.
    """
    if len(data) < 4 or data[:2] != b"\0\0":
        raise DataError(f"{name}: not an idx file (it starts with {data[:4].hex() or 'nothing'})")
    if data[2] != UNSIGNED_BYTE:
        raise DataError(f"{name}: idx type 0x{data[2]:02x}, only unsigned bytes (0x08) are read")
    header = 4 + 4 * data[3]
    if data[3] == 0 or len(data) < header:
        raise DataError(f"{name}: idx header of {data[3]} dimensions in {len(data)} bytes")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=data[3], offset=4))
    if len(data) != header + math.prod(shape):
        raise DataError(
            f"{name}: {len(data) - header} bytes of values, "
            f"but the header {'x'.join(map(str, shape))} calls for {math.prod(shape)}"
        )
    # frombuffer shares the read-only bytes, which torch.from_numpy warns of: copy.
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def read_idx(path: Path) -> np.ndarray:
    """Reads an idx file, plain or gzipped, into a uint8 array.

    Raises:
        DataError: The file is missing, damaged or no idx file of unsigned bytes; one line.
    """
    try:
        return parse_idx(read_bytes(path), path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
