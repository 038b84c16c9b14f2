"""Fixtures of all tests."""

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forked import ROOT, run_command

# Tensors are small, and pytest-xdist runs a process for each core.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# GNU readline, which pytest imports, sets these for processes that are started.
for name in ("COLUMNS", "LINES"):
    os.unsetenv(name)

__all__ = ["ROOT", "Run", "cnntrain"]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cnntrain(tmp_path: Path) -> Run:
    """`python train.py <arguments>` in an empty folder; environment variables by keyword."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return run_command(["train", *arguments], tmp_path, {**os.environ, **environment})

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
