"""Whatever lies in the cache folder is repaired or named in one line; nothing wrong is read."""

import gzip
import os
import random
import shutil
from pathlib import Path

import pytest
from tiny_fashion_mnist import (
    NAMES,
    REAL,
    TRAIN,
    Calls,
    a_folder,
    a_huge_file,
    a_loop,
    a_socket,
    data,
    is_complete,
    use_tiny,
    write,
)

from cnntrain.data import DataError


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    use_tiny(monkeypatch)


@pytest.fixture
def root(tmp_path) -> Path:
    return write(tmp_path / "fashion_mnist")


IN_PLACE_OF_A_FILE = {
    "fifo": (os.mkfifo, "not a regular file"),
    "socket": (a_socket, "not a regular file"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "folder": (a_folder, "is a folder"),
    "huge": (a_huge_file, f"{2**42} bytes instead of"),
    "loop of links": (a_loop, "Too many levels of symbolic links"),
    "link to a wrong file": (
        lambda path: path.symlink_to(__file__),
        f"{Path(__file__).stat().st_size} bytes instead of",
    ),
}


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
@pytest.mark.parametrize(
    ("make", "said"), IN_PLACE_OF_A_FILE.values(), ids=IN_PLACE_OF_A_FILE.keys()
)
def test_something_else_in_place_of_a_file(root, tmp_path, monkeypatch, caplog, name, make, said):
    Calls(monkeypatch, only=write(tmp_path / "source"))
    for times in (1, 2, 3):  # the same again: what was set aside before is no obstacle
        (root / name).unlink()
        make(root / name)
        data(root).prepare()
        assert is_complete(root)
        assert caplog.text.count(f"{root / name}: {said}") == times
    assert os.path.lexists(root / f"{name}.bad")


def test_set_aside_where_files_and_folders_were(root, tmp_path, monkeypatch):
    Calls(monkeypatch, only=write(tmp_path / "source"))
    (root / f"{NAMES[0]}.bad").mkdir()
    for content in (b"first", b"second"):
        (root / NAMES[0]).write_bytes(content)
        data(root).prepare()
    assert (root / f"{NAMES[0]}.bad1").read_bytes() == b"second"  # one of them is kept, not all
    assert sorted(p.name for p in root.glob("*.bad*")) == [
        f"{NAMES[0]}.bad",
        f"{NAMES[0]}.bad1",
    ]


@pytest.mark.parametrize(
    "make", [lambda path: path.symlink_to("nowhere"), lambda path: None], ids=["dangling", "none"]
)
def test_a_missing_file(root, tmp_path, monkeypatch, make):
    Calls(monkeypatch, only=write(tmp_path / "source"))
    (root / NAMES[1]).unlink()
    make(root / NAMES[1])
    data(root).prepare()
    assert is_complete(root)
    assert not (root / NAMES[1]).is_symlink()
    assert not (root / "nowhere").exists()


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_an_unreadable_file_is_fetched_again_before_training(root, tmp_path, monkeypatch, name):
    """Root may read everything, so that the answer of the operating system is feigned."""
    calls = Calls(monkeypatch, only=write(tmp_path / "source"))
    inode, ask = (root / name).stat().st_ino, os.access
    monkeypatch.setattr(os, "access", lambda p, mode: os.stat(p).st_ino != inode and ask(p, mode))
    data(root).prepare()
    assert calls.opened == ["only"]
    assert (root / f"{name}.bad").stat().st_ino == inode
    assert is_complete(root)


def test_a_disk_that_fails_to_read(root, tmp_path, monkeypatch, caplog):
    Calls(monkeypatch, only=write(tmp_path / "source"))
    inode, read = (root / NAMES[1]).stat().st_ino, Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.stat().st_ino == inode:
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    data(root).prepare()
    assert f"{root / NAMES[1]}: Input/output error; set aside" in caplog.text
    assert is_complete(root)


BOMB = gzip.compress(bytes(50_000_000))


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (BOMB, None),
        (gzip.compress(bytes(len(REAL[NAMES[0]]) + 1)), "more than {size} bytes"),
        (gzip.compress(bytes(len(REAL[NAMES[0]]))), "wrong SHA-256 sum"),
        (gzip.compress(REAL[NAMES[0]]) + b"more", "damaged gzip file"),
        (gzip.compress(REAL[NAMES[0]])[:-9] + bytes(9), "damaged gzip file"),
        (b"\x1f\x8b", "damaged gzip file"),
        (b"<html>", "6 bytes instead of {size}"),
        (b"", "0 bytes instead of {size}"),
    ],
    ids=["bomb", "longer", "other", "trailing", "checksum", "magic", "html", "empty"],
)
def test_a_source_with_a_bad_gzip_file(root, tmp_path, monkeypatch, packed, said):
    size = len(REAL[NAMES[0]])
    (root / NAMES[0]).unlink()
    liar = write(tmp_path / "liar", packed=True)
    (liar / f"{NAMES[0]}.gz").write_bytes(packed)
    Calls(monkeypatch, liar=liar)
    with pytest.raises(DataError) as error:
        data(root).prepare()
    said = (said or f"{len(BOMB)} bytes instead of {{size}}").format(size=size)
    last = str(error.value).splitlines()[-1]
    assert last.startswith(f"  liar: {liar / NAMES[0]}.gz: {said}")
    assert not (root / NAMES[0]).exists()
    (root / f"{NAMES[0]}.gz").write_bytes(packed)  # and so if a person puts it into the cache
    with pytest.raises(DataError, match=f"{NAMES[0]}.gz: {said}"):
        data(root).prepare()
    assert (root / f"{NAMES[0]}.gz.bad").read_bytes() == packed


def test_the_gzipped_file_beside_a_damaged_one(root, tmp_path, monkeypatch):
    (root / NAMES[0]).unlink()
    both = write(write(tmp_path / "both"), packed=True)
    (both / NAMES[0]).write_bytes(b"damaged")
    Calls(monkeypatch, both=both)
    data(root).prepare()
    assert is_complete(root)


def test_a_source_of_fifos_and_folders(root, tmp_path, monkeypatch):
    shutil.rmtree(root)
    odd = tmp_path / "odd"
    odd.mkdir()
    os.mkfifo(odd / NAMES[0])
    a_folder(odd / f"{NAMES[1]}.gz")
    a_loop(odd / NAMES[2])
    Calls(monkeypatch, odd=odd, last=write(tmp_path / "source"))
    data(root).prepare()
    assert is_complete(root)


@pytest.mark.parametrize("times", [1, 100])
def test_a_file_that_changes_while_it_is_read(root, tmp_path, monkeypatch, times):
    Calls(monkeypatch, only=write(tmp_path / "source"))
    read, left = Path.read_bytes, [times]

    def changing(path: Path) -> bytes:
        content = read(path)
        if path == root / NAMES[0] and left[0]:
            left[0] -= 1
            return content[:1000] + bytes(1000) + content[2000:]
        return content

    monkeypatch.setattr(Path, "read_bytes", changing)
    if times == 1:
        images, _ = data(root).read("train")
        assert images.tobytes() == REAL[NAMES[0]][16:]
    else:
        with pytest.raises(DataError) as error:
            data(root).read("train")
        assert str(error.value).startswith(
            f"FashionMNIST: {root / NAMES[0]}: wrong SHA-256 sum, though it was right a moment ago"
        )
        assert "choose another folder with data.root=<folder>" in str(error.value)
        assert "\n" not in str(error.value)


def test_nothing_wrong_is_read_whatever_the_damage(tmp_path, monkeypatch):
    """200 damages, several at once: with a source the set is repaired, without it is refused."""
    chance = random.Random(0)
    source = write(tmp_path / "source", packed=True)
    for number in range(200):
        root = write(tmp_path / str(number))
        for name in chance.sample(NAMES, chance.randint(1, 4)):
            path, content = root / name, bytearray(REAL[name])
            where = chance.randrange(len(content))
            match chance.randrange(4):
                case 0:
                    path.write_bytes(content[:where])
                case 1:
                    content[where] ^= 1 << chance.randrange(8)
                    path.write_bytes(content)
                case 2:
                    path.unlink()
                case 3:
                    path.write_bytes(content[:where] + content + content[where:])
        given = chance.choice([source, "nothing here"])
        Calls(monkeypatch, only=given)
        mine = data(root)
        if given != source:
            with pytest.raises(DataError, match="no source has all files"):
                (mine.read("train"), mine.read("test"))
            continue
        train, test = mine.read("train"), mine.read("test")
        for name, values in zip(NAMES, [*train, *test], strict=True):
            assert REAL[name].endswith(values.tobytes())
        assert len(train[0]) == TRAIN
        shutil.rmtree(root)
