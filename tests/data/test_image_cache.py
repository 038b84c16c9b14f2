"""Cache of decoded images: damage, interruptions and several processes."""

import logging
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cnntrain.data.image_cache import IMAGES, LOCK, RECORDS, ImageCache
from cnntrain.interruption import Interrupted, watching

SHAPE = (3, 4, 5)
N = 100


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, SHAPE, np.uint8)


class Cache:
    """A cache of `count` images, named by numbers, that records which of them are decoded."""

    def __init__(self, folder: Path, count: int = N, seconds: float = 0) -> None:
        self.folder, self.calls, self.seconds = folder / "cache", folder / "calls", seconds
        self.numbers = list(range(count))
        self.broken: set[int] = set()

    def decode(self, row: int) -> np.ndarray:
        number = self.numbers[row]
        with self.calls.open("a") as file:
            file.write(f"{number}\n")
        time.sleep(self.seconds)
        if number in self.broken:
            raise OSError("image file is truncated")
        return pixels(number)

    def cache(self) -> ImageCache:
        images = [(f"{number}.png", 10, number) for number in self.numbers]
        return ImageCache(self.folder, images, SHAPE, self.decode, "decoding")

    def decoded(self) -> list[int]:
        """Opens it; the images decoded for that, sorted. Asserts that all are right."""
        self.calls.write_text("")
        found = self.cache().open()
        assert [record.image[0] for record in found.records] == [f"{n}.png" for n in self.numbers]
        assert found.pixels.shape == (len(self.numbers), *SHAPE)
        for number, row, record in zip(self.numbers, found.pixels, found.records, strict=True):
            expected = pixels(number).astype(int)
            if number in self.broken:
                assert (record.sums, record.error) == (None, "image file is truncated")
                assert not row.any()
                continue
            sums = [[int(c.sum()), int((c * c).sum())] for c in expected]
            assert (row == expected).all()
            assert (record.sums, record.error) == (sums, None)
        return sorted(map(int, self.calls.read_text().split()))

    def files(self) -> set[str]:
        """What is in the cache folder, but for its lock."""
        return {path.name for path in self.folder.iterdir()} - {LOCK}


def start(work: Callable[[], object]) -> int:
    """Call it in a fork, which exits with 0, 128 + signal, or 1 after an exception."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        with watching("raise"):
            work()
        code = 0
    except Interrupted as error:
        code = error.exit_code
    finally:
        os._exit(code)


def end(pid: int) -> int:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("does not end")


def test_decoded_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.decoded() == [*range(N)]
    assert cache.decoded() == []
    assert cache.files() == {cache.cache().own.name}
    found = cache.cache().open().pixels
    assert not found.flags.writeable
    assert isinstance(found.base, np.memmap)


def test_changed_images_are_decoded_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.decoded()
    mapped = cache.cache().open().pixels
    cache.numbers[7:9] = [500]
    cache.numbers.append(501)
    assert cache.decoded() == [500, 501]
    assert len(cache.files()) == 1  # the array as it was before is removed
    assert (mapped[7] == pixels(7)).all()  # but can be read by a process that has mapped it


def test_unreadable_images(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.broken = {3, 40}
    assert cache.decoded() == [*range(N)]
    assert set(cache.decoded()) == {3, 40}  # tried again
    cache.broken = {3}
    assert set(cache.decoded()) == {3, 40}
    cache.broken = set()
    assert set(cache.decoded()) == {3}
    assert cache.decoded() == []


def test_wrong_shape_is_an_error_of_the_image(tmp_path: Path) -> None:
    images = [("a", 0, 0), ("b", 0, 0)]
    arrays = [np.zeros((3, 4, 6), np.uint8), np.ones(SHAPE, np.uint8)]
    cache = ImageCache(tmp_path / "c", images, SHAPE, arrays.__getitem__, "decoding")
    first, second = cache.open().records
    assert "cannot reshape" in (first.error or "")
    assert second.error is None


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("file", [IMAGES, RECORDS])
@pytest.mark.parametrize("damage", ["empty", "cut", "deleted", "folder"])
def test_damaged_files(tmp_path: Path, file: str, damage: str) -> None:
    cache = Cache(tmp_path)
    cache.decoded()
    path = cache.cache().own / file
    size = path.stat().st_size
    if damage in ("empty", "cut"):
        os.truncate(path, 0 if damage == "empty" else size * 3 // 4)
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    decoded = cache.decoded()
    assert decoded
    assert len(decoded) <= N // 3 or damage != "cut"
    assert cache.decoded() == []


def test_flipped_bits_in_the_records(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 20)
    cache.decoded()
    records = cache.cache().own / RECORDS
    rng = random.Random(0)
    for _ in range(40):
        flip(records, rng.randrange(records.stat().st_size))
        assert cache.decoded()
    assert cache.decoded() == []


def test_flipped_bit_in_a_row_that_is_copied(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.decoded()
    flip(cache.cache().own / IMAGES, 5 * 60 + 1)
    cache.numbers.append(500)
    assert cache.decoded() == [5, 500]


def test_names_of_any_kind(tmp_path: Path) -> None:
    names = ["\udce9.png", "a\nb.png", "日本.png", "x" * 5000, '"\\,[]', "\u2028"]
    images = [(name, 0, 0) for name in names]
    for _ in range(2):
        found = ImageCache(tmp_path / "c", images, SHAPE, pixels, "decoding").open()
        assert [record.image[0] for record in found.records] == names


def test_kills(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 400, 0.002)
    rng = random.Random(1)
    cache.calls.touch()
    for _ in range(12):
        pid = start(lambda: cache.cache().open())
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    cache.seconds = 0
    assert len(cache.decoded()) < 400  # continued
    other = Cache(tmp_path / "other", 400)
    (tmp_path / "other").mkdir()
    other.decoded()
    for file in (IMAGES, RECORDS):
        assert (cache.cache().own / file).read_bytes() == (other.cache().own / file).read_bytes()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals(tmp_path: Path, signum: int) -> None:
    cache = Cache(tmp_path, 2000, 0.01)
    cache.calls.touch()
    pid = start(lambda: cache.cache().open())
    while cache.calls.stat().st_size < 500:
        time.sleep(0.005)
    os.kill(pid, signum)
    assert end(pid) == 128 + signum
    begun = len(cache.calls.read_text().split())
    assert begun < 2000
    cache.seconds = 0
    assert 2000 - begun <= len(cache.decoded()) < 2000


def test_images_added_after_an_interruption(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.decoded()
    own = cache.cache().own
    own.rename(own.with_suffix(".part"))
    cache.numbers.insert(0, 500)
    assert cache.decoded() == [500]
    assert cache.files() == {cache.cache().own.name}


def test_two_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path, 200, 0.01)
    cache.calls.touch()
    pid = start(lambda: cache.cache().open())
    while not cache.calls.stat().st_size:
        time.sleep(0.005)
    with caplog.at_level(logging.INFO):
        found = cache.cache().open()
    assert end(pid) == 0
    assert caplog.messages == ["decoding: waiting for the process that is decoding them"]
    assert (found.pixels[150] == pixels(150)).all()
    assert sorted(map(int, cache.calls.read_text().split())) == [*range(200)]


def test_full_disk(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        with pytest.raises(OSError, match="File too large"):
            cache.cache().open()

    assert end(start(work)) == 0
    assert set(cache.decoded()) <= {*range(N)}
    assert cache.decoded() == []


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.folder.write_text("a file")
    with pytest.raises(OSError, match="exists"):
        cache.cache().open()
    cache.folder.unlink()
    cache.decoded()
    (cache.folder / LOCK).unlink()  # a complete cache needs no lock: it may be read-only
    shutil.copytree(cache.folder, tmp_path / "copy")
    before = sorted(cache.folder.rglob("*"))
    assert cache.decoded() == []
    assert sorted(cache.folder.rglob("*")) == before
