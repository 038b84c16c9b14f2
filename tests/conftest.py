"""Fixtures of all tests."""

import contextlib
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ROOT, Command, run_command

# Tensors are small, and pytest-xdist runs a process for each core.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# GNU readline, which pytest imports, sets these for processes that are started.
for name in ("COLUMNS", "LINES"):
    os.unsetenv(name)

__all__ = ["ROOT", "Reject", "Run", "Start", "cnntrain", "reject", "start"]
Run = Callable[..., subprocess.CompletedProcess[str]]
Reject = Callable[..., list[str]]
Start = Callable[..., Any]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Iterator[None]:
    gc.freeze()  # what is imported lives as long as the process; Lightning collects after each run
    result = yield
    gc.unfreeze()  # a library reports leaks otherwise
    return result


@pytest.fixture
def cnntrain(tmp_path: Path) -> Run:
    """`python train.py <arguments>` in an empty folder; environment variables by keyword."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return run_command(["train", *arguments], tmp_path, {**os.environ, **environment})

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `python train.py`, or e.g. torchrun with it, in an empty folder; ends what is left."""
    started: list[Any] = []

    def run(*words: str, by: Sequence[str] = (), **env: str) -> Any:
        environment = {**os.environ, **env}
        if by:
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            command = [*by, str(ROOT / "train.py"), *words]
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
        else:
            started.append(Command(["train", *words], tmp_path, environment))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Reject:
    """The problems that `python train.py <arguments>` prints, in this process and an empty folder.

    Asserts the exit code, and that nothing is written.
    """

    def run(*arguments: str) -> list[str]:
        from cnntrain.commands import train

        files = sorted(tmp_path.rglob("*"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", ["cnntrain train", *arguments])
        monkeypatch.setattr(train, "watching", lambda _: contextlib.nullcontext())
        with pytest.raises(SystemExit) as ended:
            train.main()
        first, *problems = capsys.readouterr().err.splitlines()
        assert (ended.value.code, first) == (2, "cnntrain: invalid configuration")
        assert sorted(tmp_path.rglob("*")) == files
        return problems

    return run


@pytest.fixture(autouse=True)
def reset_loggers() -> Iterator[None]:
    """Undo what a command changes for its process: disabled loggers and their levels."""
    yield
    for name in logging.root.manager.loggerDict:
        logger = logging.getLogger(name)
        logger.disabled = False
        if name.startswith("cnntrain"):
            logger.setLevel(logging.NOTSET)
