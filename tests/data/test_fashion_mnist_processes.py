"""FashionMNIST's cache folder: several processes at once, killed processes, real disks.

The processes are forks of this one, with its tiny files and sources: no time is spent on imports.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_fashion_mnist import CONTENTS, NAMES, TRAIN, Sources, data, is_complete, use_tiny, write

from cnntrain.data import DataError, fashion_mnist

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
COMPLETE = sorted([*NAMES, fashion_mnist.LOCK])


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    use_tiny(monkeypatch)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "fashion_mnist"


def start(work: Callable[[], object]) -> int:
    """A fork that does the work; its exit code is 1 if that raises."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def end(pid: int) -> int:
    """Wait for a fork: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("call", [0, 3])
def test_killed_before_a_file_gets_its_name(root, tmp_path, monkeypatch, call):
    Sources(monkeypatch, only=write(tmp_path / "source"))
    rename, calls = Path.replace, []

    def rename_or_die(*arguments: object) -> None:
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(arguments)
        rename(*arguments)

    def work() -> None:
        monkeypatch.setattr(Path, "replace", rename_or_die)
        data(root).prepare()

    assert end(start(work)) == -signal.SIGKILL
    assert [name for name in NAMES if (root / name).exists()] == NAMES[:call]
    assert all((root / name).read_bytes() == CONTENTS[name] for name in NAMES[:call])
    data(root).prepare()
    assert is_complete(root)


def test_waiting_process_replaces_a_killed_one(root, tmp_path, monkeypatch):
    source, called, waiting = write(tmp_path / "source"), tmp_path / "called", tmp_path / "waiting"

    def first_call_hangs(name: str, scratch: Path) -> Path:
        if not called.exists():
            called.touch()
            time.sleep(600)
        return source / name

    monkeypatch.setattr(fashion_mnist, "SOURCES", {"hangs": first_call_hangs})
    monkeypatch.setattr(
        fashion_mnist.log, "info", lambda *_: waiting.touch() if called.exists() else None
    )
    first = start(lambda: data(root).prepare())
    wait_for(called)
    second = start(lambda: data(root).prepare())
    wait_for(waiting)
    os.kill(first, signal.SIGKILL)
    assert (end(first), end(second)) == (-signal.SIGKILL, 0)
    assert is_complete(root)


@pytest.mark.parametrize("damage", ["empty", "damaged"])
def test_several_processes_at_once(root, tmp_path, monkeypatch, damage):
    source, calls = write(tmp_path / "source", gzipped=True), tmp_path / "calls"

    def counted(name: str, scratch: Path) -> Path:
        with calls.open("a") as stream:
            stream.write(f"{name}\n")
        time.sleep(0.05)
        return source / f"{name}.gz"

    monkeypatch.setattr(fashion_mnist, "SOURCES", {"counted": counted})
    fetched, renamed = NAMES, []
    if damage == "damaged":
        write(root, {**CONTENTS, NAMES[0]: CONTENTS[NAMES[0]][:-1] + b"x", NAMES[2]: b""})
        fetched, renamed = [NAMES[0], NAMES[2]], [f"{NAMES[0]}.bad", f"{NAMES[2]}.bad"]

    def work() -> None:
        assert len(data(root).train_loader().labels) == TRAIN - 5

    forks = [start(work) for _ in range(4)]
    assert [end(fork) for fork in forks] == [0] * 4
    assert calls.read_text().split() == fetched
    assert is_complete(root)
    assert sorted(os.listdir(root)) == sorted([*COMPLETE, *renamed])


def test_limit_of_the_file_size(root, tmp_path, monkeypatch):
    Sources(monkeypatch, only=write(tmp_path / "source", gzipped=True))

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with pytest.raises(DataError, match=r"cannot write the cache folder .* \(File too large\)"):
            data(root).prepare()

    assert end(start(work)) == 0
    assert os.listdir(root) == [fashion_mnist.LOCK]


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
    t.Sources(patch, only=folder / "source")
    attempt(folder / "complete")
    attempt(folder / "damaged")
    attempt(folder / "full")
    print(sorted(os.listdir(folder / "full")))
    (folder / "full" / "ballast").unlink()
    attempt(folder / "full")
"""


def test_read_only_and_full_disk(tmp_path):
    """Real ones, mounted in a separate namespace: permissions do not stop root from writing."""
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
        pytest.skip(f"cannot mount in a namespace: {trial.stderr.strip()}")
    done = subprocess.run(
        [*unshare, f'{mount} exec "$1" -c "$2" "$0"', tmp_path, sys.executable, MOUNTS],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    way_out = "choose another folder with data.root=<folder>, or train on data=fashion_mnist_mini"
    assert done.stdout.splitlines() == [
        "read",
        f"FashionMNIST: cannot write the cache folder {tmp_path}/damaged (Read-only file system), "
        f"but {tmp_path}/damaged/{NAMES[1]}: 5 bytes instead of {len(CONTENTS[NAMES[1]])}: "
        f"{way_out}",
        f"FashionMNIST: cannot write the cache folder {tmp_path}/full (No space left on device), "
        f"but {tmp_path}/full/{NAMES[0]}: is missing: {way_out}",
        str([fashion_mnist.LOCK, "ballast"]),
        "read",
    ]
