"""IDX files: what is read, and one line for what is not."""

import gzip
import struct

import numpy as np
import pytest
from idx_files import idx_bytes

from cnntrain.data import DataError
from cnntrain.data.idx import parse_idx, read_idx

VALUES = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
GOOD = idx_bytes(VALUES)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_round_trip(tmp_path, pack):
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
        (b"", "not an IDX file of unsigned bytes (starts with 0x)"),
        (b"<html>", "not an IDX file of unsigned bytes (starts with 0x3c68746d)"),
        (b"\0\0\x0d" + GOOD[3:], "not an IDX file of unsigned bytes (starts with 0x00000d03)"),
        (b"\0\0\x08", "not an IDX file of unsigned bytes (starts with 0x000008)"),
        (GOOD[:10], "not an IDX file of unsigned bytes (starts with 0x00000803)"),
        (GOOD[:-1], "59 bytes of values instead of 60 for the declared shape 3x4x5"),
        (GOOD + b"\0", "61 bytes of values instead of 60 for the declared shape 3x4x5"),
        (gzip.compress(GOOD, mtime=0)[:-9], "damaged gzip file"),
        (b"\x1f\x8bnonsense", "damaged gzip file"),
    ],
)
def test_malformed_file_is_named_in_one_line(tmp_path, data, message):
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


def test_folder_is_rejected(tmp_path):
    with pytest.raises(DataError, match="Is a directory"):
        read_idx(tmp_path)
