import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from idx_files import idx_bytes

from cnntrain.data import DataError
from cnntrain.data.idx import IdxFile, parse_idx, read_bytes, read_idx

VALUES = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
GOOD = idx_bytes(VALUES)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_reads_what_was_written(tmp_path, pack):
    path = tmp_path / "a folder with spaces" / "x"
    path.parent.mkdir()
    path.write_bytes(pack(GOOD))
    read = read_idx(path)
    assert read.dtype == np.uint8
    assert not read.flags.writeable  # no copy of the bytes of the file
    np.testing.assert_array_equal(read, VALUES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an idx file (it starts with nothing)"),
        (b"<html>", "not an idx file (it starts with 3c68746d)"),
        (b"\0\0\x0d" + GOOD[3:], "idx type 0x0d, only unsigned bytes (0x08) are read"),
        (b"\0\0\x08\0", "idx header of 0 dimensions in 4 bytes"),
        (GOOD[:10], "idx header of 3 dimensions in 10 bytes"),
        (GOOD[:-1], "59 bytes of values, but the header 3x4x5 calls for 60"),
        (GOOD + b"\0", "61 bytes of values, but the header 3x4x5 calls for 60"),
        (gzip.compress(GOOD, mtime=0)[:-9], "damaged gzip file"),
        (b"\x1f\x8bnonsense", "damaged gzip file"),
    ],
)
def test_malformed_file_is_one_line_that_names_it(tmp_path, data, message):
    path = tmp_path / "broken"
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        read_idx(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="nowhere: No such file or directory"):
        read_idx(tmp_path / "nowhere")


def test_dimensions_beyond_32_bits_do_not_wrap():
    data = struct.pack(">HBB", 0, 8, 2) + struct.pack(">2I", 2**31, 2**33 % 2**32 + 2**31)
    with pytest.raises(DataError, match=str(2**62)):
        parse_idx(data, "huge")


def test_difference_tells_length_from_content():
    # The sum of b"abc" is FIPS 180-2's first example.
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    file = IdxFile("x", 3, known)
    assert file.difference(b"abc") is None
    assert file.difference(b"ab") == "2 bytes instead of 3"
    assert file.difference(b"abd") == "wrong SHA-256 sum"


@pytest.mark.parametrize(
    ("make", "said"),
    [(os.mkfifo, "not a regular file"), (os.mkdir, "is a folder")],
    ids=["fifo", "folder"],
)
def test_what_is_no_file_is_refused_without_waiting(tmp_path, make, said):
    make(tmp_path / "odd")
    with pytest.raises(DataError) as error:
        read_idx(tmp_path / "odd")
    assert str(error.value) == f"{tmp_path / 'odd'}: {said}"


def test_more_than_the_memory_holds(tmp_path, monkeypatch):
    (tmp_path / "huge").write_bytes(GOOD)

    def too_large(path: Path) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", too_large)
    with pytest.raises(DataError, match=r"huge: larger than the memory that is left$"):
        read_idx(tmp_path / "huge")


def test_a_gzip_file_is_decompressed_up_to_a_limit(tmp_path):
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(bytes(30_000_000)))
    assert read_bytes(path, limit=5) == bytes(6)
    assert len(read_bytes(path)) == 30_000_000


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_known_file_is_read_or_refused(tmp_path, pack):
    path = tmp_path / "x"
    file = IdxFile("x", len(GOOD), hashlib.sha256(GOOD).hexdigest())
    path.write_bytes(pack(GOOD))
    assert file.read(path) == GOOD
    for content, said in [
        (GOOD[:-1], f"{len(GOOD) - 1} bytes instead of {len(GOOD)}"),
        (GOOD + b"x", f"more than {len(GOOD)} bytes"),
        (GOOD[:-1] + b"x", "wrong SHA-256 sum"),
    ]:
        path.write_bytes(pack(content))
        with pytest.raises(OSError) as error:  # noqa: PT011
            file.read(path)
        assert (error.value.strerror, error.value.filename) == (said, str(path))
