"""FashionMNIST's way into the cache folder, with four tiny files in the real ones' place."""

import gzip
import logging
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_fashion_mnist import NAMES, REAL, TEST, TRAIN, Calls, data, use_tiny, write

from cnntrain.data import DataError, FashionMNIST, cache, sources
from cnntrain.data.sources import Source, SourceError


@pytest.fixture(autouse=True)
def _tiny(monkeypatch, caplog):
    use_tiny(monkeypatch)
    caplog.set_level(logging.INFO, logger="cnntrain")


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "a cache" / "fashion_mnist"


def test_complete_cache_is_read_and_not_written(root, monkeypatch, caplog):
    write(root)
    calls = Calls(monkeypatch, never="asked")
    images, labels = data(root).read("train")
    assert images.shape == (TRAIN, 1, 28, 28)
    assert images.tobytes() == REAL[NAMES[0]][16:]
    assert labels.tolist() == [i % 10 for i in range(TRAIN)]
    assert calls.opened == []
    assert sorted(os.listdir(root)) == sorted(NAMES)  # no lock either: it may be read-only
    assert caplog.messages == [f"FashionMNIST: cache folder {root}"]


def test_sources_in_order_each_in_one_log_line(root, tmp_path, monkeypatch, caplog):
    calls = Calls(
        monkeypatch,
        first="no such folder",
        second=write(tmp_path / "partial", {NAMES[0]: REAL[NAMES[0]]}, packed=True),
        third=write(tmp_path / "rest", {n: REAL[n] for n in NAMES[1:]}),
        fourth="never asked",
    )
    data(root).prepare()
    assert calls.opened == ["first", "second", "third"]
    assert {name: (root / name).read_bytes() for name in NAMES} == REAL
    assert sorted(os.listdir(root)) == sorted([*NAMES, cache.LOCK])
    assert caplog.messages == [
        f"FashionMNIST: cache folder {root}",
        "FashionMNIST: trying first",
        "FashionMNIST: trying second",
        "FashionMNIST: trying third",
        f"FashionMNIST: {root} is complete",
    ]


def test_shipped_order_of_sources():
    names = [source.name for source in sources.SOURCES]
    assert [name.split()[0] for name in names] == ["system", "torchvision's", "Debian's"]


def test_system_folder(root, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SYSTEM_FOLDER", tmp_path / "os")
    with pytest.raises(SourceError, match="no such folder"):
        sources.system_folder(tmp_path)
    write(tmp_path / "os", packed=True)
    monkeypatch.setattr(cache, "SOURCES", sources.SOURCES[:1])
    assert len(data(root).test_loader().images) == TEST


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda real: real[:-7], "{short} bytes instead of {size}"),
        (lambda real: b"", "0 bytes instead of {size}"),
        (lambda real: real[:-1] + bytes([real[-1] ^ 1]), "wrong SHA-256 sum"),
    ],
    ids=["truncated", "empty", "altered"],
)
def test_damaged_file_is_named_set_aside_and_fetched_again(
    root, tmp_path, monkeypatch, caplog, name, damage, said
):
    bad = damage(REAL[name])
    write(root, {**REAL, name: bad})
    calls = Calls(monkeypatch, only=write(tmp_path / "source", packed=True))
    FashionMNIST(root=str(root), val_size=5).read("train" if "train" in name else "test")
    size = len(REAL[name])
    said = said.format(size=size, short=size - 7)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f"FashionMNIST: {root / name}: {said}; set aside as {name}.bad"]
    assert (root / f"{name}.bad").read_bytes() == bad
    assert (root / name).read_bytes() == REAL[name]
    assert calls.opened == ["only"]


def test_short_test_file_is_found_at_the_start_but_an_altered_one_is_not_opened(
    root, tmp_path, monkeypatch
):
    calls = Calls(monkeypatch, only=write(tmp_path / "source"))
    altered = REAL[NAMES[2]][:-1] + b"\0"
    write(root, {**REAL, NAMES[2]: altered})
    real_read, opened = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda p: opened.append(p.name) or real_read(p))
    mine = data(root)
    mine.prepare()
    mine.train_loader()
    mine.val_loader()
    assert opened == NAMES[:2]
    assert calls.opened == []
    mine.test_loader()
    assert (root / NAMES[2]).read_bytes() == REAL[NAMES[2]]
    (root / NAMES[3]).write_bytes(b"")
    data(root).prepare()
    assert (root / NAMES[3]).read_bytes() == REAL[NAMES[3]]


def test_gzipped_files_put_into_the_cache_by_hand(root, monkeypatch, caplog):
    write(root, packed=True)
    (root / f"{NAMES[1]}.gz").write_bytes(gzip.compress(REAL[NAMES[1]])[:-4])
    (root / NAMES[1]).write_bytes(REAL[NAMES[1]])
    calls = Calls(monkeypatch)
    data(root).prepare()
    assert calls.opened == []
    assert {name: (root / name).read_bytes() for name in NAMES} == REAL

    for name in NAMES:
        (root / name).unlink()
    with pytest.raises(DataError, match=rf"{NAMES[1]}.gz: damaged gzip file"):
        data(root).prepare()
    assert (root / f"{NAMES[1]}.gz.bad").exists()
    assert f"set aside as {NAMES[1]}.gz.bad" in caplog.text


def test_source_with_other_content_is_refused(root, tmp_path, monkeypatch):
    wrong = {**REAL, NAMES[1]: REAL[NAMES[1]][:-1] + b"\x63"}
    calls = Calls(monkeypatch, liar=write(tmp_path / "liar", wrong, packed=True), last="is empty")
    with pytest.raises(DataError, match=rf"liar: .*{NAMES[1]}.gz: wrong SHA-256 sum") as error:
        data(root).prepare()
    assert calls.opened == ["liar", "last"]
    assert not (root / NAMES[1]).exists()
    assert (root / NAMES[0]).exists()  # what was right is kept
    assert (tmp_path / "liar" / f"{NAMES[1]}.gz").exists()  # others' folders are not touched
    assert "last: is empty" in str(error.value)


def test_nothing_works(root, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SYSTEM_FOLDER", tmp_path / "none")
    monkeypatch.setattr(sources, "TORCHVISION_DOWNLOAD", "raise SystemExit('no route to host')")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    write(root, {NAMES[0]: b"short"})
    with pytest.raises(DataError) as error:
        data(root).prepare()
    size = len(REAL[NAMES[0]])
    assert str(error.value).splitlines() == [
        "FashionMNIST: no source has all files: put the four files of Debian's package "
        f"dataset-fashion-mnist into {root}, or train on the set that comes with cnntrain, "
        "data=fashion_mnist_mini",
        "Tried:",
        f"  cache folder {root}: {NAMES[0]} was set aside (5 bytes instead of {size}), "
        + ", ".join(f"{name} is missing" for name in NAMES[1:]),
        f"  {sources.SOURCES[0].name}: no such folder",
        "  torchvision's download: the download: no route to host",
        "  Debian's archive (apt-get download dataset-fashion-mnist): apt-get is not installed",
    ]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_unwritable_cache_folder(tmp_path, monkeypatch, below):
    calls = Calls(monkeypatch, never="asked")
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(DataError, match=r"cannot write the cache folder .*file.* \(") as error:
        data(blocker / below).prepare()
    message = str(error.value)
    assert "choose another with data.root=<folder>, or train on data=fashion_mnist_mini" in message
    assert "\n" not in message
    assert calls.opened == []


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_interrupted_write_leaves_no_half_file(root, tmp_path, monkeypatch, broken):
    Calls(monkeypatch, only=write(tmp_path / "source"))
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, broken, full)
        with pytest.raises(DataError, match="No space left on device"):
            data(root).prepare()
    assert os.listdir(root) == [cache.LOCK]
    (root / f".{NAMES[0]}.part").write_bytes(b"what a killed process leaves")
    data(root).prepare()
    assert sorted(os.listdir(root)) == sorted([*NAMES, cache.LOCK])


PROCESS = """
import logging, sys, time
from pathlib import Path
import pytest
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import tiny_fashion_mnist as t
from cnntrain.data import cache
from cnntrain.data.sources import Source
root, source, gate = map(Path, sys.argv[1:])
def slow(scratch):
    time.sleep(1)
    return source
with pytest.MonkeyPatch.context() as patch:
    t.use_tiny(patch)
    patch.setattr(cache, "SOURCES", [Source("slow", slow)])
    (gate / str(__import__("os").getpid())).touch()
    while len(list(gate.iterdir())) < 8:
        time.sleep(0.01)
    print(len(t.data(root).train_loader().labels), "images")
"""


def test_eight_processes_on_an_empty_cache(root, tmp_path):
    write(tmp_path / "source", packed=True)
    gate = tmp_path / "gate"
    gate.mkdir()
    path = os.pathsep.join(filter(None, sys.path))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(root), str(tmp_path / "source"), str(gate)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(8)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [0] * 8, outputs
    assert all(f"{TRAIN - 5} images" in out for out, _ in outputs)
    assert sum("trying slow" in out for out, _ in outputs) == 1
    waiting = f"waiting for another process that fills {root}"
    assert sum(waiting in out for out, _ in outputs) >= 1  # a late one finds it complete
    assert sorted(os.listdir(root)) == sorted([*NAMES, cache.LOCK])


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """Stand-ins for apt-get and dpkg-deb before the real ones on the path."""
    packed = write(tmp_path / "packed", packed=True)
    programs = tmp_path / "bin"
    apt = f'echo "$@" >> "{tmp_path}/calls"; case "$*" in *download*) touch {sources.PACKAGE}_1.deb'
    program(programs, "apt-get", f"{apt};; esac")
    into = '"$3/usr/share/datasets/fashion-mnist"'
    program(programs, "dpkg-deb", f'mkdir -p {into} && cp "{packed}"/* {into}')
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(cache, "SOURCES", sources.SOURCES[2:])
    return programs


def test_debian_archive(root, tmp_path, debian):
    data(root).prepare()
    assert {name: (root / name).read_bytes() for name in NAMES} == REAL
    update, download = (tmp_path / "calls").read_text().splitlines()
    assert update.split()[-1] == "update"
    assert download.split()[-2:] == ["download", "dataset-fashion-mnist"]
    for call in (update, download):
        (lists,) = (w for w in call.split() if w.startswith("Dir::State::Lists="))
        (packages,) = (w for w in call.split() if w.startswith("Dir::Cache="))
        folder = Path(lists.partition("=")[2]).parent
        assert folder.name.startswith("cnntrain-")
        assert not folder.exists()  # cleared away
        assert Path(packages.partition("=")[2]).parent == folder


def test_debian_download_counts_not_the_update(root, debian):
    failing = 'case "$*" in *update) echo "E: dead entry"; echo "N: a note"; exit 100;; esac'
    apt = (debian / "apt-get").read_text().partition("\n")[2]
    program(debian, "apt-get", f"{failing}\n{apt}")
    data(root).prepare()

    (root / NAMES[0]).unlink()
    program(debian, "apt-get", f'{failing}\necho "E: Unable to locate package"; exit 100')
    reason = (
        r"apt-get download: E: Unable to locate package \(after apt-get update: E: dead entry\)"
    )
    with pytest.raises(DataError, match=reason):
        data(root).prepare()


def test_debian_unpacking_fails(root, debian):
    program(debian, "dpkg-deb", "exit 2")
    with pytest.raises(DataError, match="dpkg-deb: exit code 2"):
        data(root).prepare()


def test_a_source_that_is_killed(tmp_path, monkeypatch):
    code = "import os; print('50%'); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(sources, "TORCHVISION_DOWNLOAD", code)
    with pytest.raises(SourceError, match=r"^the download: ended by SIGKILL$"):
        sources.torchvision_download(tmp_path)


class Cut(BaseHTTPRequestHandler):
    """Promises a file and hangs up half-way."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "20000")
        self.end_headers()
        self.wfile.write(bytes(10_000))

    def log_message(self, *_: object) -> None:
        pass


def test_a_download_cut_in_the_middle_gives_way_to_the_next_source(root, tmp_path, monkeypatch):
    write(tmp_path / "source")
    with ThreadingHTTPServer(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        begin, *rest = sources.TORCHVISION_DOWNLOAD.partition("FashionMNIST(sys")
        mirror = f"FashionMNIST.mirrors = ['http://127.0.0.1:{server.server_port}/']\n"
        monkeypatch.setattr(sources, "TORCHVISION_DOWNLOAD", begin + mirror + "".join(rest))
        monkeypatch.setattr(cache, "SOURCES", sources.SOURCES[1:2])
        with pytest.raises(DataError, match=r"download: File not found or corrupted\.$"):
            data(root).prepare()
        assert os.listdir(root) == [cache.LOCK]
        monkeypatch.setattr(
            cache, "SOURCES", [*cache.SOURCES, Source("next", lambda _: tmp_path / "source")]
        )
        data(root).prepare()
        server.shutdown()
    assert {name: (root / name).read_bytes() for name in NAMES} == REAL


def test_a_source_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TORCHVISION_DOWNLOAD", "import time; time.sleep(60)")
    monkeypatch.setattr(sources, "TORCHVISION_TIMEOUT", 0.5)
    with pytest.raises(SourceError, match=r"the download: no end after 0\.5 s"):
        sources.torchvision_download(tmp_path)


def test_import_leaves_torchvision_alone():
    code = "import sys, cnntrain.data; sys.exit('torchvision' in sys.modules)"
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
