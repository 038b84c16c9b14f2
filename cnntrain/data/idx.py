"""The idx file format of the MNIST family, plain or gzipped.

A file is two zero bytes, a type code (8: unsigned byte), the number of dimensions, each dimension
as a big-endian 32-bit integer, and then the values, last dimension fastest.
Source: the format's description at https://yann.lecun.org/exdb/mnist/.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import math
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnntrain.notebook import OneLine

UNSIGNED_BYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"


class DataError(OneLine, RuntimeError):
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

    def look(self, path: Path) -> None:
        """Whether a readable file of the right length lies there, found out without opening it.

        Raises:
            OSError: None does; `strerror` says why.
        """
        status = _regular(path)
        if status.st_size != self.size:
            raise _wrong(path, f"{status.st_size} bytes instead of {self.size}")
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def read(self, path: Path) -> bytes:
        """The decompressed content of this file, plain or gzipped at `path`, bit for bit.

        Raises:
            OSError: It cannot be read or is another file; `strerror` says why.
        """
        size = _regular(path).st_size
        if size > 2 * self.size + 1024:  # more than gzip could have made of it
            raise _wrong(path, f"{size} bytes instead of {self.size}")
        data = read_bytes(path, limit=self.size)
        if len(data) > self.size:
            raise _wrong(path, f"more than {self.size} bytes")
        if problem := self.difference(data):
            raise _wrong(path, problem)
        return data


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The content of a file, decompressed if it is gzipped, whatever its name says.

    Args:
        path: The file.
        limit: A gzip file is decompressed no further than one byte past this length.

    Raises:
        OSError: It cannot be read or is a damaged gzip file; `strerror` says why.
    """
    _regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        error.filename = str(path)  # that of a failing disk has none
        raise
    if not data.startswith(GZIP_MAGIC):
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as unpacked:
            return unpacked.read(-1 if limit is None else limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _wrong(path, f"damaged gzip file ({error})") from error


def _regular(path: Path) -> os.stat_result:
    """A regular file's status; reading another kind could wait for a writer, or have no end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _wrong(path, "is a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    return status


def _wrong(path: Path, problem: str) -> OSError:
    return OSError(errno.EINVAL, problem, str(path))


def parse_idx(data: bytes, name: str | Path) -> np.ndarray:
    """The array in the bytes of an idx file.

    Args:
        data: The file's decompressed content.
        name: The file's name for error messages.

    Returns:
        A read-only uint8 array with the dimensions that the file declares.

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
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_idx(path: Path) -> np.ndarray:
    """Reads an idx file, plain or gzipped, into a uint8 array.

    Raises:
        DataError: The file is missing, damaged or no idx file of unsigned bytes; one line.
    """
    try:
        return parse_idx(read_bytes(path), path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise DataError(f"{path}: larger than the memory that is left") from error
