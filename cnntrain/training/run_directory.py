"""The run directory: the whole record of a run."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from cnntrain.config import ConfigError, run_directory_problem

PACKAGES = ["cnntrain", "torch", "torchvision", "lightning", "hydra-core", "omegaconf", "numpy"]


class RunDirectory:
    """A directory that belongs to one run. ConfigError if another run has it already."""

    def __init__(self, path: Path, cfg: DictConfig):
        self.path = path
        self.result = path / "result.json"
        path.mkdir(parents=True, exist_ok=True)
        try:
            self.result.touch(exist_ok=False)  # claims it: of two that try, one succeeds
        except FileExistsError:
            raise ConfigError([str(run_directory_problem(str(path)))]) from None
        config = path / ".hydra" / "config.yaml"
        if not config.exists():  # called from Python: Hydra has written nothing
            config.parent.mkdir(exist_ok=True)
            config.write_text(OmegaConf.to_yaml(cfg))
        write_json(path / "environment.json", environment())

    def write_result(self, status: str, **content: Any) -> None:
        """`status` is running, completed, failed or interrupted."""
        write_json(self.result, {"status": status, **content})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write all of a file or nothing: readers never see half of it, nor does a crash leave half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def environment() -> dict[str, Any]:
    """What a run depends on beside its config: versions, machine, code and command line."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "versions": {"python": platform.python_version(), **versions},
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "git": {"revision": _git("rev-parse", "HEAD"), "diff": _git("diff", "HEAD")},
    }


def _git(*arguments: str) -> str | None:
    """What git says of this code's checkout, or else of the working directory; None without."""
    for folder in (Path(__file__).parent, Path.cwd()):
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode == 0:
            return done.stdout.strip()
    return None
