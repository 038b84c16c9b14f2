"""Commands in forked processes, which need not import torch and Lightning for five seconds each.

A fork server has imported them; each command runs in a fork of it, with its own working directory,
environment, arguments, streams and exit code. Members of a sweep are forks of the sweep.
"""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
PRELOAD = ["cnntrain.training", "cnntrain.inference", "cnntrain.commands.train", "forked", "warm"]


@cache
def server() -> Any:
    """The context of the fork server, which is started with this process's sys.path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return context


class Command:
    """`cnntrain <arguments>` in `folder`, started, with the methods of `subprocess.Popen`."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] = os.environ
    ):
        self.streams = tempfile.TemporaryDirectory()
        call = (list(arguments), str(folder), dict(environment), self.streams.name)
        self.process = server().Process(target=_main, args=call)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 300) -> int | None:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode

    def output(self) -> tuple[str, str]:
        """What it has written to stdout and stderr."""
        folder = Path(self.streams.name)
        return (folder / "out").read_text(), (folder / "err").read_text()

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.wait(timeout)
        return self.output()


def run_command(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str] = os.environ, **how: Any
) -> subprocess.CompletedProcess[str]:
    """`cnntrain <arguments>` in `folder`, as `subprocess.run` would run it."""
    command = Command(arguments, folder, environment)
    out, err = command.communicate(**how)
    return subprocess.CompletedProcess([*arguments], command.returncode, out, err)


def wait_until(process: subprocess.Popen[str] | Command, true: Callable[[], bool]) -> None:
    """Poll; fails when the process ends before, and ends it at the timeout."""
    deadline = time.monotonic() + 200
    while not true():
        if process.poll() is None and time.monotonic() > deadline:
            process.kill()
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def _main(arguments: list[str], folder: str, environment: dict[str, str], streams: str) -> None:
    gc.freeze()  # a collection would copy every page of what the server has imported
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [str(ROOT), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(os.path.join(streams, name), os.O_CREAT | os.O_WRONLY)
        os.dup2(file, descriptor)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.dont_write_bytecode = True
    sys.argv = ["cnntrain", *arguments]
    sys.orig_argv = [sys.executable, "-m", "cnntrain", *arguments]
    from cnntrain.commands import main
    from cnntrain.sweeps import processes

    processes.METHOD, processes.PROCESSES = "fork", multiprocessing.get_context("fork")
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
