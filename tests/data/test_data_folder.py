"""The cache folder and its lock: what cannot be written is one line, and nothing is fetched."""

import os
from pathlib import Path

import pytest
from tiny_fashion_mnist import (
    NAMES,
    Calls,
    a_folder,
    a_loop,
    a_socket,
    data,
    is_complete,
    use_tiny,
    write,
)

from cnntrain.data import DataError, cache

ELSEWHERE = "choose another with data.root=<folder>, or train on data=fashion_mnist_mini"


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    use_tiny(monkeypatch)


@pytest.fixture
def root(tmp_path) -> Path:
    return write(tmp_path / "fashion_mnist")


def test_a_stale_lock_is_no_obstacle(root, tmp_path, monkeypatch):
    Calls(monkeypatch, only=write(tmp_path / "source"))
    lock = root / cache.LOCK
    for make in (lambda: lock.write_bytes(b"12345\nhost\n"), lock.mkdir):
        (root / NAMES[0]).unlink()
        lock.unlink(missing_ok=True)
        make()
        data(root).prepare()
        assert is_complete(root)
        assert lock.is_file()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (a_folder, "Is a directory"),
        (a_loop, "Too many levels of symbolic links"),
        (a_socket, "No such device or address"),
    ],
    ids=["folder", "loop", "socket"],
)
def test_something_else_in_place_of_the_lock(root, monkeypatch, make, said):
    calls = Calls(monkeypatch, never="asked")
    (root / NAMES[0]).unlink()
    make(root / cache.LOCK)
    with pytest.raises(DataError) as error:
        data(root).prepare()
    assert str(error.value) == (
        f"FashionMNIST: cannot write the cache folder {root} (.lock: {said}) "
        f"to fetch {NAMES[0]} (No such file or directory): {ELSEWHERE}"
    )
    assert calls.opened == []


@pytest.mark.parametrize("make", [os.mkfifo, a_loop, lambda p: p.symlink_to("precious")])
def test_something_else_in_place_of_the_unfinished_file(root, tmp_path, monkeypatch, make):
    Calls(monkeypatch, only=write(tmp_path / "source"))
    (root / "precious").write_text("precious")
    (root / NAMES[0]).unlink()
    make(root / f".{NAMES[0]}.part")
    data(root).prepare()
    assert is_complete(root)
    assert not os.path.lexists(root / f".{NAMES[0]}.part")
    assert (root / "precious").read_text() == "precious"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.symlink_to("nowhere"), "it is not a folder"),
        (a_loop, "it is not a folder"),
        (os.mkfifo, "it is not a folder"),
        (lambda path: path.write_bytes(b""), "it is not a folder"),
    ],
    ids=["dangling", "loop", "fifo", "file"],
)
def test_something_else_in_place_of_the_cache_folder(tmp_path, monkeypatch, make, said):
    calls = Calls(monkeypatch, never="asked")
    make(tmp_path / "odd")
    with pytest.raises(DataError) as error:
        data(tmp_path / "odd").prepare()
    assert str(error.value).startswith(
        f"FashionMNIST: cannot write the cache folder {tmp_path / 'odd'} ({said}) to fetch "
    )
    assert str(error.value).endswith(ELSEWHERE)
    assert calls.opened == []


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("", r"data\.root='': name a folder"),
        ("a\0b", r"data\.root='a\\x00b': name a folder"),
        ("~nobody knows/x", r"data\.root=~nobody knows/x: .*; write the whole path"),
    ],
)
def test_a_cache_folder_that_has_no_path(folder, said):
    with pytest.raises(ValueError, match=said):
        type(data(Path("x")))(root=folder, val_size=5)


def test_a_name_that_is_too_long(tmp_path, monkeypatch):
    calls = Calls(monkeypatch, never="asked")
    with pytest.raises(DataError, match=r"\(File name too long\) to fetch"):
        data(tmp_path / ("x" * 300)).prepare()
    assert calls.opened == []
