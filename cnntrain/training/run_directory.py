"""The run directory: the whole record of a run."""

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from cnntrain.atomic import replacing, write_json
from cnntrain.config import ConfigError, run_directory_problem
from cnntrain.config.resume import CONFIG, LOCK, OVERRIDES, RESULT, in_use, seal

PACKAGES = ["cnntrain", "torch", "torchvision", "lightning", "hydra-core", "omegaconf", "numpy"]


class RunDirectory:
    """A directory that belongs to one run, and to one process at a time: a context manager.

    Raises ConfigError if another process is training there, or if another run has it already and
    it is not meant to be continued; `option` is what its message calls the directory.
    """

    def __init__(self, path: Path, *, resume: bool = False, option: str = "hydra.run.dir"):
        self.path, self.result = path, path / RESULT
        self.facts: dict[str, Any] = {}
        if not resume and (problem := run_directory_problem(str(path), option)):
            raise ConfigError([problem])  # before the lock is written there
        path.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(path / LOCK)
        try:
            # The system releases it however this process ends. For a moment it is held by whoever
            # asks whether it is in use.
            self.lock.acquire(timeout=1, poll_interval=0.02)
        except Timeout:
            raise ConfigError([str(in_use(path, option))]) from None
        if not resume and (problem := run_directory_problem(str(path), option)):
            self.lock.release()
            raise ConfigError([problem])

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def begin(
        self, cfg: DictConfig, facts: dict[str, Any], overrides: Sequence[str] | None = None
    ) -> None:
        """Write down what is going to be run; `facts` stand in every result.json from now on.

        Not left to Hydra, which would write before the directory is this run's own. `overrides`
        are what was typed for it, if anything was.
        """
        self.facts = facts
        (self.path / CONFIG).parent.mkdir(exist_ok=True)
        with replacing(self.path / CONFIG) as file:
            file.write(OmegaConf.to_yaml(cfg).encode())
        if overrides is not None or not (self.path / OVERRIDES).exists():
            with replacing(self.path / OVERRIDES) as file:
                file.write(OmegaConf.to_yaml(OmegaConf.create(list(overrides or ()))).encode())
        self._write_environment()
        self.write_result("running")

    def write_result(self, status: str, **content: Any) -> None:
        """`status` is running, completed, failed, interrupted or pruned."""
        write_json(self.result, seal({"status": status, **self.facts, **content}))

    def _write_environment(self) -> None:
        """Of the first start, with those of the later ones in a list."""
        path, now = self.path / "environment.json", environment()
        try:
            first = json.loads(path.read_bytes())
            first["resumed"] = [*first.get("resumed", []), now]
        except (OSError, ValueError, AttributeError, TypeError):  # none, or damaged
            first = now
        write_json(path, first)


def environment() -> dict[str, Any]:
    """What a run depends on beside its config: versions, machine, code and command line."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "git": {"revision": _git("rev-parse", "HEAD"), "diff": _git("diff", "HEAD")},
    }


@functools.cache  # every checkpoint has them, and reading a package's version takes a while
def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def conditions() -> dict[str, str]:
    """What the last bits of a result can depend on beside the config."""
    return {
        **versions(),
        "threads": str(torch.get_num_threads()),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def _git(*arguments: str) -> str | None:
    """What git says of this code's checkout, or else of the working directory; None without."""
    for folder in (Path(__file__).parent, Path.cwd()):
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode == 0:
            return done.stdout.strip()
    return None
