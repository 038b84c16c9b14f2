"""The run directory: the complete record of a run."""

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

import cnntrain
from cnntrain.atomic import replacing, write_json
from cnntrain.config import ConfigError, config_hash, run_directory_problem
from cnntrain.config.resume import CONFIG, LOCK, OVERRIDES, RESULT, add_checksum, in_use

PACKAGES = ["torch", "torchvision", "lightning", "hydra-core", "omegaconf", "numpy"]


class RunDirectory:
    """A directory locked for one process: a context manager.

    Raises ConfigError, which calls the directory `option`, if another process is training there,
    or if it holds another run and `resume` is false.
    """

    def __init__(self, path: Path, *, resume: bool = False, option: str = "hydra.run.dir"):
        self.path, self.result = path, path / RESULT
        self.facts: dict[str, Any] = {}
        path.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(path / LOCK)
        try:
            # Released by the system however this process ends; held briefly by `is_running`.
            self.lock.acquire(timeout=1, poll_interval=0.02)
        except Timeout:
            raise ConfigError([in_use(path, option)]) from None
        if not resume and (problem := run_directory_problem(str(path), option)):
            self.lock.release()
            raise ConfigError([problem])

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def begin(self, cfg: DictConfig, overrides: Sequence[str] | None = None) -> None:
        """Write config, overrides, environment and the first result.json.

        Not left to Hydra, which would write before the directory is locked by this run.
        """
        self.facts = {"config_hash": config_hash(cfg), "seed": cfg.seed}
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
        write_json(self.result, add_checksum({"status": status, **self.facts, **content}))

    def _write_environment(self) -> None:
        """environment.json of the first start, with those of resumed ones in a list."""
        path, now = self.path / "environment.json", environment()
        try:
            first = json.loads(path.read_bytes())
            first["resumed"] = [*first.get("resumed", []), now]
        except (OSError, ValueError, AttributeError, TypeError):  # none, or damaged
            first = now
        write_json(path, first)


def environment() -> dict[str, Any]:
    """Versions, machine, git revision and command line."""
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


@functools.cache  # written to every checkpoint
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version(), "cnntrain": cnntrain.__version__}
    return found | {package: importlib.metadata.version(package) for package in PACKAGES}


def conditions() -> dict[str, str]:
    """What can change the last bits of a result, beside the config."""
    return {
        **versions(),
        "threads": str(torch.get_num_threads()),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def _git(*arguments: str) -> str | None:
    """Output of git in this checkout, or else in the working directory; None without git."""
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
