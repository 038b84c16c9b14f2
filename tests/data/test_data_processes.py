"""Processes that fill one cache folder: killed at any moment, several at once, out of disk.

They are forks of this one, with its tiny files and sources: no time is spent on imports.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from tiny_fashion_mnist import NAMES, REAL, TRAIN, Calls, data, is_complete, use_tiny, write

from cnntrain.data import DataError, cache
from cnntrain.data.sources import Source

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
CLEAN = sorted([*NAMES, cache.LOCK])


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    use_tiny(monkeypatch)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "fashion_mnist"


def start(work: Callable[[], object]) -> int:
    """A fork that does the work: it exits with 0, or with 1 if that raises."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def end(pid: int) -> int:
    """Waits for a fork; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def nothing_half_written(root: Path) -> bool:
    return all((root / n).read_bytes() == REAL[n] for n in NAMES if (root / n).exists())


def die_at(monkeypatch, function: str, call: int) -> None:
    """SIGKILL at a call of a function of `os`, before it has done anything."""
    numbers, really = count(), getattr(os, function)

    def call_or_die(*arguments: object) -> object:
        if next(numbers) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return really(*arguments)

    monkeypatch.setattr(os, function, call_or_die)


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_killed_around_each_write(root, tmp_path, monkeypatch, function, call):
    Calls(monkeypatch, only=write(tmp_path / "source"))

    def work() -> None:
        die_at(monkeypatch, function, call)
        data(root).prepare()

    assert end(start(work)) == -signal.SIGKILL
    assert nothing_half_written(root)
    assert len([n for n in NAMES if (root / n).exists()]) == call
    data(root).prepare()
    assert is_complete(root)
    assert sorted(os.listdir(root)) == CLEAN


@pytest.mark.parametrize("call", range(4))
def test_killed_before_a_wrong_file_is_set_aside(root, tmp_path, monkeypatch, call):
    write(root, dict.fromkeys(NAMES, b"wrong"))
    Calls(monkeypatch, only=write(tmp_path / "source"))

    def work() -> None:
        die_at(monkeypatch, "replace", call)
        data(root).prepare()

    assert end(start(work)) == -signal.SIGKILL
    data(root).prepare()
    assert is_complete(root)
    assert sorted(os.listdir(root)) == sorted([*CLEAN, *(f"{name}.bad" for name in NAMES)])


def test_killed_in_the_middle_of_a_file(root, tmp_path, monkeypatch):
    Calls(monkeypatch, only=write(tmp_path / "source"))

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        data(root).prepare()

    assert end(start(work)) == -signal.SIGXFSZ
    assert sorted(os.listdir(root)) == sorted([cache.LOCK, f".{NAMES[0]}.part"])
    assert (root / f".{NAMES[0]}.part").stat().st_size == 10_000
    data(root).prepare()
    assert is_complete(root)
    assert sorted(os.listdir(root)) == CLEAN


def test_killed_at_random_again_and_again(root, tmp_path, monkeypatch):
    chance = random.Random(0)
    Calls(monkeypatch, only=write(tmp_path / "source", packed=True))
    killed = 0
    for _ in range(60):
        shutil.rmtree(root, ignore_errors=True)
        write(root, {name: b"wrong" for name in NAMES if chance.random() < 0.3})
        fork = start(lambda: data(root).prepare())
        time.sleep(chance.uniform(0, 0.015))
        os.kill(fork, signal.SIGKILL)
        killed += end(fork) == -signal.SIGKILL
        for name in NAMES:
            content = (root / name).read_bytes() if (root / name).exists() else b"wrong"
            assert content in (REAL[name], b"wrong")
        data(root).prepare()
        assert is_complete(root)
        assert not list(root.glob("*.part"))
    assert killed > 0


def test_who_waits_for_a_process_that_is_killed_takes_its_place(root, tmp_path, monkeypatch):
    source = write(tmp_path / "source")
    (tmp_path / "asked").mkdir()
    (tmp_path / "waiting").mkdir()

    def first_hangs(scratch: Path) -> Path:
        if not list((tmp_path / "asked").iterdir()):
            (tmp_path / "asked" / str(os.getpid())).touch()
            time.sleep(600)
        return source

    monkeypatch.setattr(cache, "SOURCES", [Source("hangs", first_hangs)])
    monkeypatch.setattr(
        cache.log, "info", lambda said, *_: "wait" in said and (tmp_path / "waiting/x").touch()
    )
    first = start(lambda: data(root).prepare())
    until(lambda: list((tmp_path / "asked").iterdir()))
    second = start(lambda: data(root).prepare())
    until(lambda: list((tmp_path / "waiting").iterdir()))
    os.kill(first, signal.SIGKILL)
    assert (end(first), end(second)) == (-signal.SIGKILL, 0)
    assert is_complete(root)


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("processes", [2, 8])
@pytest.mark.parametrize("damage", ["empty", "damaged"])
def test_several_at_once(root, tmp_path, monkeypatch, processes, damage):
    source = write(tmp_path / "source", packed=True)
    asked = tmp_path / "asked"

    def counted(scratch: Path) -> Path:
        with asked.open("a") as stream:
            stream.write("asked\n")
        time.sleep(0.1)
        return source

    monkeypatch.setattr(cache, "SOURCES", [Source("counted", counted)])
    if damage == "damaged":
        write(root, {**REAL, NAMES[0]: REAL[NAMES[0]][:-1] + b"x", NAMES[2]: b""})

    def work() -> None:
        loader = data(root).train_loader()
        assert len(loader.labels) == TRAIN - 5

    forks = [start(work) for _ in range(processes)]
    assert [end(fork) for fork in forks] == [0] * processes
    assert asked.read_text() == "asked\n"
    assert is_complete(root)
    aside = [f"{NAMES[0]}.bad", f"{NAMES[2]}.bad"] if damage == "damaged" else []
    assert sorted(os.listdir(root)) == sorted([*CLEAN, *aside])


def test_a_limit_to_the_size_of_files(root, tmp_path, monkeypatch):
    Calls(monkeypatch, only=write(tmp_path / "source", packed=True))

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with pytest.raises(DataError) as error:
            data(root).prepare()
        assert str(error.value) == (
            f"FashionMNIST: cannot write the cache folder {root} (File too large) to store "
            f"{NAMES[0]}: choose another with data.root=<folder>, or train on "
            "data=fashion_mnist_mini"
        )

    assert end(start(work)) == 0
    assert os.listdir(root) == [cache.LOCK]


MOUNTS = """
import os, sys
from pathlib import Path
import pytest
import tiny_fashion_mnist as t
from cnntrain.data import DataError
folder = Path(sys.argv[1])
def attempt(root):
    try:
        t.data(root).train_loader(), t.data(root).test_loader()
        print("read")
    except DataError as error:
        print(error)
with pytest.MonkeyPatch.context() as patch:
    t.use_tiny(patch)
    t.Calls(patch, only=folder / "source")
    attempt(folder / "complete")
    attempt(folder / "damaged")
    attempt(folder / "full")
    print(sorted(os.listdir(folder / "full")))
    (folder / "full" / "ballast").unlink()
    attempt(folder / "full")
"""


def test_a_read_only_and_a_full_disk(tmp_path):
    """Real ones, mounted in a namespace of its own: root may write where permissions forbid it."""
    mount = (
        "set -e; cd $0; "
        "for each in complete damaged; do mount --bind $each $each; "
        "mount -o remount,bind,ro $each; done; "
        "mount -t tmpfs -o size=64k,mode=755 tmpfs full; "
        "head -c 50000 /dev/zero > full/ballast; "
    )
    for name in ("complete", "damaged", "source"):
        write(tmp_path / name)
    (tmp_path / "damaged" / NAMES[1]).write_bytes(b"short")
    (tmp_path / "full").mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    unshare = ["unshare", "-rm", "sh", "-c"]
    trial = subprocess.run([*unshare, mount, tmp_path], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"no mounts of one's own here: {trial.stderr.strip()}")
    done = subprocess.run(
        [*unshare, f'{mount} exec "$1" -c "$2" "$0"', tmp_path, sys.executable, MOUNTS],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    elsewhere = "choose another with data.root=<folder>, or train on data=fashion_mnist_mini"
    assert done.stdout.splitlines() == [
        "read",
        f"FashionMNIST: cannot write the cache folder {tmp_path}/damaged (.lock: Read-only file "
        f"system) to fetch {NAMES[1]} (5 bytes instead of {len(REAL[NAMES[1]])}): {elsewhere}",
        f"FashionMNIST: cannot write the cache folder {tmp_path}/full (No space left on device) "
        f"to store {NAMES[0]}: {elsewhere}",
        str([cache.LOCK, "ballast"]),
        "read",
    ]
