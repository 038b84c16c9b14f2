"""What several rooms' tests share: a run in a process of its own, as a user starts one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# The tensors are small: threads would only wait for one another, for long where cores are shared.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# GNU readline, which pytest imports, sets these for processes that are started.
for name in ("COLUMNS", "LINES"):
    os.unsetenv(name)

ROOT = Path(__file__).parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cnntrain(tmp_path: Path) -> Run:
    """Start `python train.py <arguments>` in an empty folder; environment variables by keyword."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
