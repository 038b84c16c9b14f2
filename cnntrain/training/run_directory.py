"""The run directory, the complete record of a run; results read from it; output of `train`."""

import contextlib
import csv
import functools
import importlib.metadata
import io
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib import figure
from matplotlib.ticker import MaxNLocator
from omegaconf import DictConfig, OmegaConf
from rich.logging import RichHandler
from torch import nn

import cnntrain
from cnntrain.atomic import replacing, write_json
from cnntrain.config import ConfigError, config_hash, run_directory_problem
from cnntrain.config.resume import CONFIG, LOCK, OVERRIDES, RESULT, add_checksum, in_use
from cnntrain.terminal import TerminalHandler, png_html, table_html

PACKAGES = ["torch", "torchvision", "lightning", "hydra-core", "omegaconf", "numpy"]


class RunDirectory(contextlib.ExitStack):
    """A directory locked for one process: a context manager.

    Raises ConfigError, which calls the directory `option`, if another process is training there,
    or if it holds another run and `resume` is false.
    """

    def __init__(self, path: Path, *, resume: bool = False, option: str = "hydra.run.dir"):
        super().__init__()
        self.path = path
        self.facts: dict[str, Any] = {}
        if not resume and (problem := run_directory_problem(str(path), option)):
            raise ConfigError([problem])  # before the lock is written there
        path.mkdir(parents=True, exist_ok=True)
        try:
            # Released by the system however this process ends; held briefly by `is_running`.
            self.enter_context(FileLock(path / LOCK).acquire(timeout=1, poll_interval=0.02))
        except Timeout:
            raise ConfigError([in_use(path, option)]) from None
        if not resume and (problem := run_directory_problem(str(path), option)):
            self.close()  # a run that has begun and ended since then
            raise ConfigError([problem])

    def begin(self, cfg: DictConfig, overrides: Sequence[str] | None = None) -> None:
        """Write the first files. Hydra would do it before the directory is locked by this run."""
        self.facts = {"config_hash": config_hash(cfg), "seed": cfg.seed}
        (self.path / CONFIG).parent.mkdir(exist_ok=True)
        self.write_config(cfg)
        if overrides is not None or not (self.path / OVERRIDES).exists():
            with replacing(self.path / OVERRIDES) as file:
                file.write(OmegaConf.to_yaml(OmegaConf.create(list(overrides or ()))).encode())
        path, now = self.path / "environment.json", environment()
        try:  # the environments of resumed starts are added to that of the first
            first = json.loads(path.read_bytes())
            first["resumed"] = [*first.get("resumed", []), now]
        except (OSError, ValueError, AttributeError, TypeError):  # none, or damaged
            first = now
        write_json(path, first)
        self.write_result("running")

    def write_config(self, cfg: DictConfig) -> None:
        with replacing(self.path / CONFIG) as file:
            file.write(OmegaConf.to_yaml(cfg).encode())

    def write_result(self, status: str, **content: Any) -> None:
        """`status` is running, completed, failed, interrupted or pruned."""
        write_json(self.path / RESULT, add_checksum({"status": status, **self.facts, **content}))


def environment() -> dict[str, Any]:
    """Versions, machine, git revision and command line."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
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
    threads, processor = str(torch.get_num_threads()), torch.backends.cpu.get_cpu_capability()
    return versions() | {"threads": threads, "processor": processor}


def _git(*arguments: str) -> str | None:
    """Output of git in this checkout, or else in the working directory; None without git."""
    for folder in (Path(__file__).parent, Path.cwd()):
        command = ["git", "-C", str(folder), *arguments]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            output = subprocess.check_output(command, stderr=subprocess.DEVNULL, timeout=10)
            return output.decode(errors="replace").strip()
    return None


class Figure(figure.Figure):
    """A matplotlib figure that notebooks display without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


@dataclass(frozen=True)
class Result:
    """A completed run. Can be passed wherever a function takes a run directory.

    Attributes:
        metrics: Losses in nats and accuracies from 0 to 1, of the tested epoch and the test.
        directory: The run directory.
        seconds: Total time, including that before a resume.
        images_per_second: Training images per second of fitting, validation included.
        history: Columns of metrics.csv, a value per epoch, NaN where there is none.
    """

    metrics: dict[str, float]
    directory: Path
    seconds: float
    images_per_second: float
    history: dict[str, np.ndarray] = field(repr=False, compare=False)
    load: Callable[[], nn.Module] = field(repr=False, compare=False)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The network with the tested weights, in evaluation mode on the CPU.

        It maps normalised images, float32 (N, C, H, W), to logits (N, classes). The weights are
        those of the best epoch, or of the last with `trainer.test_checkpoint=last`. Raises
        CheckpointError if the run was completed earlier and its checkpoint is missing.
        """
        return self.load()

    @classmethod
    def of(
        cls, recorded: Mapping[str, Any], directory: Path, load: Callable[[], nn.Module]
    ) -> "Result":
        """From the content of result.json, and metrics.csv."""
        history = {}
        # Without a history if metrics.csv is damaged.
        with contextlib.suppress(OSError, ValueError, IndexError):
            with (directory / "metrics.csv").open(newline="", encoding="utf-8") as lines:
                rows = list(csv.DictReader(lines))
            types = {"epoch": int, "step": int}
            history = {
                name: np.array([row[name] or "nan" for row in rows]).astype(types.get(name, float))
                for name in rows[0]
                if any(row[name] for row in rows)
            }
        timings = recorded["timings"]
        return cls(recorded["metrics"], directory, **timings, history=history, load=load)

    def __fspath__(self) -> str:
        return str(self.directory)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"Result({str(self.directory)!r}: {shown}; {self.seconds:.0f} s)"

    def _repr_html_(self) -> str:
        table = table_html([*self.metrics], [[f"{value:.4f}" for value in self.metrics.values()]])
        return f"{table}{png_html(self.plot()._repr_png_())}"

    def plot(self) -> Figure:
        """The learning curves: loss in nats and accuracy over epochs."""
        curves = Figure(figsize=(9, 3.5), layout="constrained")
        labels = {"loss": "loss (nats)", "acc": "accuracy"}
        for axes, (name, label) in zip(curves.subplots(1, 2), labels.items(), strict=True):
            for stage, colour in (("train", "#4477AA"), ("val", "#CC6677")):
                if (values := self.history.get(f"{stage}/{name}")) is not None:
                    axes.plot(self.history["epoch"], values, ".-", color=colour, label=stage)
            if f"test/{name}" in self.metrics:
                tested = self.metrics[f"test/{name}"]
                axes.axhline(tested, color="#555555", linestyle=":", label="test")
            axes.set(xlabel="epoch", ylabel=label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend()
        return curves

    def text(self) -> str:
        """The last lines that a run prints."""
        return (
            f"\ntest accuracy   {self.metrics['test/acc']:.2%}   (loss "
            f"{self.metrics['test/loss']:.4f}, {self.seconds:.0f} s in all)\n"
            f"run directory   {self.directory}\n"
            f"TensorBoard     tensorboard --logdir {shlex.quote(str(self.directory))}"
        )


@contextlib.contextmanager
def logged(directory: Path, record: bool) -> Iterator[None]:
    """Print log lines to stdout and, with `record`, append them to train.log, as commands do.

    They are not printed where a handler of the caller's prints already. A level that the caller has
    set on the logger `cnntrain` is kept.
    """
    logger = logging.getLogger("cnntrain")
    level, added = logger.level, list[logging.Handler]()
    if level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if record:
        added.append(logging.FileHandler(directory / "train.log", encoding="utf-8", delay=True))
        added[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    standard = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    for handler in [*logger.handlers, *logging.getLogger().handlers]:
        if isinstance(handler, RichHandler) or getattr(handler, "stream", None) in standard:
            break  # it writes to the terminal or the notebook
    else:
        added.append(TerminalHandler(sys.stdout))
    for handler in added:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in added:
            logger.removeHandler(handler)
            handler.close()
