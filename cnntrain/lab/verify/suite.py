"""Verification of a backend: all checks in order, and the report."""

from __future__ import annotations

import contextlib
import json as jsons
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from pydantic import PositiveInt
from torch import nn

import cnntrain
from cnntrain.config import ConfigError
from cnntrain.config.errors import format_value
from cnntrain.lab.verify import interface, numerics, rounding, side_effects, state, uses
from cnntrain.lab.verify.check import Candidate, Check, CheckResult

MODULES = (numerics, rounding, state, side_effects, interface, uses)
CHECKS: list[Check] = [c for m in MODULES for c in vars(m).values() if isinstance(c, Check)]
CHECKS.sort(key=lambda c: c is not side_effects.global_state)  # first: others may change settings


@dataclass(frozen=True)
class VerificationReport:
    """Results of a verification, a line for each check."""

    backend: str  # dotted name of the class
    options: dict[str, Any]  # those of `verify`, with defaults filled in
    lines: list[CheckResult]
    seconds: float  # wall-clock time
    total: int  # number of checks, including those that `only` left out

    @property
    def passed(self) -> bool:
        return all(line.passed for line in self.lines)

    def summary(self) -> str:
        """One line: the options, and how many checks failed."""
        run, failed = len(self.lines), sum(not line.passed for line in self.lines)
        part = f"the {run} check{'s' * (run > 1)} run, of {self.total}"
        if run == self.total:
            part = f"{run} checks" if failed else f"all {run} checks"
        kept = {"only": "", "short": False, "cases": 200 if self.options["short"] else 1000}
        given = {k: self.options[k] for k, default in kept.items() if self.options[k] != default}
        how = [f"{k}={format_value(value)}" for k, value in given.items()]
        verdict = f"fails {failed} of {part}" if failed else f"passes {part}"
        return f"{self.backend} {verdict} ({', '.join([*how, f'{self.seconds:.0f} s'])})"

    def json(self) -> str:
        """The whole report. Infinite errors are null."""
        lines = [{**asdict(line), "passed": line.passed} for line in self.lines]
        for line in lines:
            line["error"] = line["error"] if math.isfinite(line["error"]) else None
        versions = {m.__name__: m.__version__ for m in (cnntrain, torch, np, scipy)}
        versions["python"] = platform.python_version()
        report = {"passed": self.passed, **vars(self), "lines": lines, "versions": versions}
        return jsons.dumps(report, indent=2)


def verify(
    backend: Callable[..., nn.Conv2d],
    *,
    cases: PositiveInt | None = None,
    seed: int = 0,
    short: bool = False,
    only: str = "",
    device: str = "cpu",
    json: str | os.PathLike[str] | None = None,
    report: Callable | None = None,
) -> VerificationReport:
    """Check that a convolution behaves as ``nn.Conv2d`` does.

    Args:
        backend: called with ``nn.Conv2d``'s arguments; a class, or a ``functools.partial`` of one
            with its options. Attributes of the class declare limits of its algorithm, as
            ``rounding_budget`` (docs/convolutions.md).
        cases: number of random layers; default 1000, in the short form 200.
        seed: of the random layers and of all numbers.
        short: a small part of the grid and of the large layers, without checkpointing, which
            imports PyTorch's compiler.
        only: run only the checks whose name contains this.
        device: 'cpu', 'cuda', 'cuda:1', ...: device of the layers. Oracles run on the CPU.
        json: path that the report is written to.
        report: called with each `CheckResult` once it is known.

    Returns:
        The report. An exception that the backend raises is a failed check.

    Raises:
        ConfigError: an option is invalid.
    """
    if cases is not None and cases < 1:
        raise ConfigError([f"cases={cases}: must be 1 or more"])
    chosen = [c for c in CHECKS if any(only.lower() in line.lower() for line in c.lines)]
    if not chosen:
        names = "; ".join(line for check in CHECKS for line in check.lines)
        raise ConfigError([f"only={only}: no check has this in its name; there is {names}"])
    if json:
        try:
            Path(json).open("a").close()
        except OSError as error:
            raise ConfigError([f"json={json}: cannot be written: {error.strerror}"]) from None
    candidate = Candidate(backend, cases or (200 if short else 1000), seed, short, _device(device))
    start, lines = time.perf_counter(), []
    with settings_restored():
        for check in chosen:
            for line in check.run(candidate):
                if only.lower() in line.name.lower():
                    lines.append(line)
                    if report:
                        report(line)
    seconds = time.perf_counter() - start
    options = {"cases": candidate.cases, "seed": seed, "short": short, "only": only}
    options["device"] = device
    if isinstance(backend, partial):
        options["backend"] = dict(backend.keywords)
    name = f"{candidate.kind.__module__}.{candidate.name}"
    found = VerificationReport(name, options, lines, seconds, sum(len(c.lines) for c in CHECKS))
    if json:
        Path(json).write_text(found.json() + "\n", encoding="utf-8")
    return found


def rerun(backend: Callable[..., nn.Conv2d], line: str, *case: Any, seed: int = 0) -> None:
    """Repeat one case of the report: prints the errors, and raises what the backend raises."""
    check = next(c for c in CHECKS if line in c.lines)
    candidate = Candidate(backend, 1, seed, False, torch.device("cpu"))
    for measured in check.measure(candidate, *case):
        if check.line.format(measured.part) == line and measured.error > check.budget(candidate):
            print(measured.text)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError([f"device={name}: must be cpu, cuda, or one GPU of several, as cuda:1"])
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError([f"device={name}: PyTorch finds {count} GPUs here; take device=cpu"])
    return device


@contextlib.contextmanager
def settings_restored() -> Iterator[None]:
    """Settings of the verification; afterwards, all settings as they were before."""
    settings: list[tuple[Callable[[Any], Any], Callable[[], Any]]] = [
        (torch.set_default_dtype, torch.get_default_dtype),
        (torch.set_num_threads, torch.get_num_threads),
        (torch.set_grad_enabled, torch.is_grad_enabled),
        (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision),
        (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled),
        (torch.autograd.set_detect_anomaly, torch.is_anomaly_enabled),
        (partial(setattr, mkldnn := torch.backends.mkldnn, "enabled"), lambda: mkldnn.enabled),
    ]
    before = [get() for _, get in settings]
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
            torch.enable_grad(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_flush_denormal(False)
        for (restore, get), value in zip(settings, before, strict=True):
            if get() != value:  # some setters are slow
                restore(value)
