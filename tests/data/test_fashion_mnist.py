"""FashionMNIST: download, cache folder, repair of damaged files; with four tiny files."""

import gzip
import hashlib
import logging
import os
import random
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torchvision
from tiny_fashion_mnist import (
    CONTENTS,
    NAMES,
    TEST,
    TRAIN,
    Sources,
    data,
    is_complete,
    use_tiny,
    write,
)

from cnntrain.data import DataError, FashionMNIST, fashion_mnist

WAY_OUT = "choose another folder with data.root=<folder>, or train on data=fashion_mnist_mini"


@pytest.fixture(autouse=True)
def _tiny(monkeypatch, caplog):
    use_tiny(monkeypatch)
    caplog.set_level(logging.INFO, logger="cnntrain")


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "a cache" / "fashion_mnist"


@pytest.fixture
def source(tmp_path) -> Path:
    return write(tmp_path / "source", gzipped=True)


def error_line(mine: FashionMNIST) -> str:
    with pytest.raises(DataError) as error:
        mine.prepare()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_complete_cache_is_read_and_not_written(root, monkeypatch, caplog):
    write(root)
    sources = Sources(monkeypatch, unused="called")
    images, labels = data(root).read("train")
    assert images.shape == (TRAIN, 1, 28, 28)
    assert images.tobytes() == CONTENTS[NAMES[0]][16:]
    assert labels.tolist() == [i % 10 for i in range(TRAIN)]
    assert sources.calls == []
    assert sorted(os.listdir(root)) == sorted(NAMES)  # no lock: the folder may be read-only
    assert caplog.messages == [f"FashionMNIST: cache folder {root}"]


def test_sources_in_order_each_in_one_log_line(root, tmp_path, source, monkeypatch, caplog):
    sources = Sources(
        monkeypatch,
        first="no such folder",
        second=write(tmp_path / "partial", {NAMES[0]: CONTENTS[NAMES[0]]}),
        third=source,
        fourth="unused",
    )
    data(root).prepare()
    assert sources.calls == ["first", "second", "second", "third", "third", "third"]
    assert is_complete(root)
    assert sorted(os.listdir(root)) == sorted([*NAMES, fashion_mnist.LOCK])
    assert (root / NAMES[0]).stat().st_mode & 0o777 == 0o644  # the cache may be shared
    assert caplog.messages == [
        f"FashionMNIST: cache folder {root}",
        f"FashionMNIST: trying gzipped files in {root}",
        "FashionMNIST: trying first",
        "FashionMNIST: trying second",
        "FashionMNIST: trying third",
        f"FashionMNIST: {root} is complete",
    ]


def test_shipped_order_of_sources():
    assert [name.split()[0] for name in fashion_mnist.SOURCES] == [
        "system",
        "torchvision's",
        "apt-get",
    ]


def test_system_folder(root, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", write(tmp_path / "os", gzipped=True))
    assert len(data(root).test_loader().images) == TEST


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-7], lambda content: content[:-1] + bytes([content[-1] ^ 1])],
    ids=["truncated", "altered"],
)
def test_damaged_file_is_fetched_again(root, source, monkeypatch, caplog, name, damage):
    damaged = damage(CONTENTS[name])
    write(root, {**CONTENTS, name: damaged})
    Sources(monkeypatch, only=source)
    data(root).read("train" if "train" in name else "test")
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f"FashionMNIST: {root / name} is not the original; renamed to {name}.bad"]
    assert (root / f"{name}.bad").read_bytes() == damaged  # it may be a file of another data set
    assert is_complete(root)


def test_test_set_is_not_opened_before_the_test(root, source, monkeypatch):
    sources = Sources(monkeypatch, only=source)
    write(root, {**CONTENTS, NAMES[2]: CONTENTS[NAMES[2]][:-1] + b"\0"})
    read, opened = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda p: opened.append(p.name) or read(p))
    mine = data(root)
    mine.train_loader()
    mine.val_loader()
    assert opened == NAMES[:2]
    assert sources.calls == []
    mine.test_loader()
    assert is_complete(root)


def test_gzipped_files_in_the_cache_folder(root, monkeypatch):
    write(root, gzipped=True)
    Sources(monkeypatch)
    data(root).prepare()
    assert is_complete(root)


GZIPPED = gzip.compress(CONTENTS[NAMES[0]])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (gzip.compress(bytes(len(CONTENTS[NAMES[0]]))), "wrong SHA-256 sum"),
        (GZIPPED + b"more", "damaged gzip file"),
        (GZIPPED[:-9] + bytes(9), "damaged gzip file"),
        (b"<html>", "wrong SHA-256 sum"),
        (b"", "wrong SHA-256 sum"),
    ],
    ids=["other", "trailing", "checksum", "html", "empty"],
)
def test_source_with_other_content(root, tmp_path, source, monkeypatch, content, problem):
    (source / f"{NAMES[0]}.gz").write_bytes(content)
    Sources(monkeypatch, wrong=source, last="is empty")
    line = error_line(data(root))
    assert problem in line.partition("wrong: ")[2]
    assert "last: is empty" in line
    assert not (root / NAMES[0]).exists()
    assert (source / f"{NAMES[0]}.gz").read_bytes() == content


def test_offline_error_names_all_sources_and_the_way_out(root, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", tmp_path / "none")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    write(root, {NAMES[0]: b"short"})
    line = error_line(data(root))
    assert line.startswith(
        "FashionMNIST: could not be fetched: put the four files of Debian's package "
        "dataset-fashion-mnist into data.root=<folder>, or train on data=fashion_mnist_mini ("
    )
    for part in (
        f"{root / NAMES[0]}: wrong SHA-256 sum",
        f"{root / NAMES[1]}: No such file or directory",
        f"gzipped files in {root}: {root / NAMES[0]}.gz: No such file",
        "system folder ",
        "torchvision's mirror: ",
        "127.0.0.1",
        "apt-get download dataset-fashion-mnist: ",
        "No such file or directory: 'apt-get'",
    ):
        assert part in line


def test_unwritable_cache_folder(tmp_path, monkeypatch):
    sources = Sources(monkeypatch, unused="called")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    write(tmp_path / "no lock", {})
    (tmp_path / "no lock" / fashion_mnist.LOCK / "folder").mkdir(parents=True)
    for folder, problem in {
        "file": "it is not a folder",
        "file/below": "Not a directory",
        "link": "it is not a folder",
        "x" * 300: "File name too long",
        "no lock": "Is a directory",
    }.items():
        line = error_line(data(tmp_path / folder))
        begin = f"FashionMNIST: cannot write the cache folder {tmp_path / folder} ({problem}), but "
        assert line.startswith(begin), line
        assert line.endswith(WAY_OUT)
    assert sources.calls == []


def test_full_disk_leaves_no_partial_file(root, source, monkeypatch):
    Sources(monkeypatch, only=source)
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        assert "(No space left on device)" in error_line(data(root))
    assert os.listdir(root) == [fashion_mnist.LOCK]
    data(root).prepare()
    assert is_complete(root)


def test_invalid_cache_folder():
    with pytest.raises(ValueError, match=r"data\.root='': name a folder"):
        FashionMNIST(root="", val_size=5)


@pytest.mark.parametrize("times", [1, 100])
def test_file_that_changes_while_it_is_read(root, source, monkeypatch, times):
    Sources(monkeypatch, only=source)
    write(root)
    read, left = Path.read_bytes, [times]

    def changing(path: Path) -> bytes:
        content = read(path)
        if path == root / NAMES[0] and left[0]:
            left[0] -= 1
            return content[:1000] + bytes(1000) + content[2000:]
        return content

    monkeypatch.setattr(Path, "read_bytes", changing)
    if times == 1:
        assert data(root).read("train")[0].tobytes() == CONTENTS[NAMES[0]][16:]
    else:
        assert error_line(data(root)) == f"{root / NAMES[0]}: wrong SHA-256 sum"


def test_no_damaged_content_is_ever_returned(tmp_path, source, monkeypatch):
    """Random damage to several files: repaired with a source, an error without."""
    rng = random.Random(0)
    for number in range(30):
        root = write(tmp_path / str(number))
        for name in rng.sample(NAMES, rng.randint(1, 4)):
            path, content = root / name, bytearray(CONTENTS[name])
            where = rng.randrange(len(content))
            match rng.randrange(4):
                case 0:
                    path.write_bytes(content[:where])
                case 1:
                    content[where] ^= 1 << rng.randrange(8)
                    path.write_bytes(content)
                case 2:
                    path.unlink()
                case 3:
                    path.write_bytes(content[:where] + content + content[where:])
        mine, online = data(root), rng.random() < 0.5
        Sources(monkeypatch, only=source if online else "offline")
        if online:
            arrays = [*mine.read("train"), *mine.read("test")]
            for name, values in zip(NAMES, arrays, strict=True):
                assert CONTENTS[name].endswith(values.tobytes())
        else:
            with pytest.raises(DataError, match="only: offline"):
                (mine.read("train"), mine.read("test"))
        shutil.rmtree(root)


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def debian(tmp_path, source, monkeypatch) -> Path:
    """Replacements of apt-get and dpkg-deb, first on the PATH."""
    programs = tmp_path / "bin"
    package = fashion_mnist.PACKAGE
    apt = f'echo "$@" >> "{tmp_path}/calls"; case "$*" in *download*) touch {package}_1.deb'
    program(programs, "apt-get", f"{apt};; esac")
    into = '"$3/usr/share/datasets/fashion-mnist"'
    program(programs, "dpkg-deb", f'mkdir -p {into} && cp "{source}"/* {into}')
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(fashion_mnist, "SOURCES", {"apt": fashion_mnist.debian_package})
    return programs


def test_debian_package(root, tmp_path, debian):
    data(root).prepare()
    assert is_complete(root)
    update, download = (tmp_path / "calls").read_text().splitlines()  # once for all files
    assert update.split()[-1] == "update"
    assert download.split()[-2:] == ["download", "dataset-fashion-mnist"]
    for call in (update, download):
        (lists,) = (w for w in call.split() if w.startswith("Dir::State::Lists="))
        folder = Path(lists.partition("=")[2]).parent
        assert folder.name.startswith("cnntrain-")
        assert not folder.exists()


def test_failed_apt_update_is_ignored_and_failed_download_reported(root, debian):
    failing = 'case "$*" in *update) echo "E: dead entry"; echo "N: a note"; exit 100;; esac'
    apt = (debian / "apt-get").read_text().partition("\n")[2]
    program(debian, "apt-get", f"{failing}\n{apt}")
    data(root).prepare()
    (root / NAMES[0]).unlink()
    program(debian, "apt-get", f'{failing}\necho "E: Unable to locate package"; exit 100')
    assert "apt: apt-get: E: Unable to locate package" in error_line(data(root))


def test_failing_and_hanging_programs(root, debian, monkeypatch):
    program(debian, "dpkg-deb", "exit 2")
    assert "apt: dpkg-deb: exit code 2" in error_line(data(root))
    monkeypatch.setattr(fashion_mnist, "PROGRAM_TIMEOUT", 0.3)
    program(debian, "apt-get", "sleep 30")
    assert "timed out after 0.3 s" in error_line(data(root))


class Mirror(BaseHTTPRequestHandler):
    """Sends gzipped files; closes the connection in the middle of each while `broken`."""

    broken = True

    def do_GET(self) -> None:
        content = gzip.compress(CONTENTS[self.path[1:].removesuffix(".gz")], mtime=0)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.broken else content)

    def log_message(self, *_: object) -> None:
        pass


def test_interrupted_download(root, monkeypatch):
    original = torchvision.datasets.FashionMNIST
    gzipped = {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in CONTENTS.items()}
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in gzipped.items()]
    monkeypatch.setattr(original, "resources", sums)
    monkeypatch.setattr(fashion_mnist, "SOURCES", {"torchvision": fashion_mnist.torchvision_mirror})
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(original, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        assert "torchvision: " in error_line(data(root))
        assert os.listdir(root) == [fashion_mnist.LOCK]
        monkeypatch.setattr(Mirror, "broken", False)
        data(root).prepare()
        server.shutdown()
    assert is_complete(root)
