"""The whole contract that a backend has to keep, and the report on one that was verified."""

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
from cnntrain.lab.verify import behaviour, errors, module, numerics, probes, rounding
from cnntrain.lab.verify.check import Line, Subject

CHECKS = [
    behaviour.settings,  # before any other has changed them
    numerics.seven_loops,
    numerics.scipy_signal,
    numerics.random_layers,
    rounding.integers,
    rounding.block_sizes,
    rounding.wide_integers,
    rounding.magnitudes,
    rounding.float32,
    rounding.bfloat16,
    rounding.float16,
    rounding.reach,
    numerics.higher_derivatives,
    behaviour.modes,
    behaviour.changed_parameters,
    behaviour.history,
    behaviour.repeated,
    behaviour.asked,
    behaviour.strides,
    behaviour.in_place,
    behaviour.shared,
    behaviour.released,
    behaviour.threads,
    module.empty,
    module.constructor,
    module.copies,
    errors.errors,
    probes.uses,
]


@dataclass(frozen=True)
class Report:
    """What was found out about a backend.

    Attributes:
        backend: the class's dotted name.
        options: those of `verify`, as they were used.
        lines: one for each check.
        seconds: what it took.
        total: how many checks there are, those that `only` left out included.
    """

    backend: str
    options: dict[str, Any]
    lines: list[Line]
    seconds: float
    total: int

    @property
    def passed(self) -> bool:
        return all(line.passed for line in self.lines)

    def summary(self) -> str:
        """One line: what was run, and how many checks failed."""
        run, failed = len(self.lines), sum(not line.passed for line in self.lines)
        part = f"the {run} checks run, of {self.total}"
        if run == self.total:
            part = f"{run} checks" if failed else f"all {run} checks"
        kept = {"only": "", "short": False, "cases": 200 if self.options["short"] else 1000}
        given = {k: self.options[k] for k, default in kept.items() if self.options[k] != default}
        how = [f"{k}={'true' if value is True else value}" for k, value in given.items()]
        verdict = f"fails {failed} of {part}" if failed else f"passes {part}"
        return f"{self.backend} {verdict} ({', '.join([*how, f'{self.seconds:.0f} s'])})"

    def json(self) -> str:
        """All of it. An infinite error is null."""
        lines = [{**asdict(line), "passed": line.passed} for line in self.lines]
        for line in lines:
            line["error"] = line["error"] if math.isfinite(line["error"]) else None
        versions = {m.__name__: m.__version__ for m in (cnntrain, torch, np, scipy)}
        versions["python"] = platform.python_version()
        return jsons.dumps(
            {
                "passed": self.passed,
                **vars(self),
                "lines": lines,
                "versions": versions,
            },
            indent=2,
        )


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
) -> Report:
    """Check everything that a backend has to do as ``nn.Conv2d`` does it.

    ``backend`` is called with ``nn.Conv2d``'s arguments, all of them; a class with options of its
    own is given as a ``functools.partial``. Five attributes of the class declare what its
    algorithm cannot help:

        rounding_budget = 4.0: the largest error of a sum in float32, in units of sqrt(K) u S, where
            K is the number of products in the sum, u = 2^-24 and S = sum |x| |w|. Adding K products
            one by one is off by at most about K u S (N. Higham, "Accuracy and Stability of
            Numerical Algorithms", 2002, section 3.1), and by its square root as a rule, since
            roundings cancel. Winograd's and Fourier's transforms need more. Results in bfloat16
            and float16 are such a sum rounded once, by at most 2^-8 or 2^-11 of it; the output
            may be rounded before the bias is added, too. A class that calls torch.conv2d may be
            off by as much as nn.Conv2d is, whose kernels for some CPUs add in the half type.
        half_roundings = 1: by how many roundings a result in bfloat16 or float16 may be off, as
            multiples of 2^-8 or 2^-11 of S; more for sums that are kept in the half type in parts,
            as torch.nn.functional.fold keeps them.
        exact_on_integers = True: whether sums of small whole numbers have no error at all. False
            for an algorithm that divides: its results are right when rounded, or off by no more
            than in float32.
        third_derivatives = True: whether second derivatives can be differentiated again.
        spreads_non_finite = False: whether a NaN or Inf may reach results of the same image that
            it is no factor of, as with Winograd's and Fourier's transforms.

    Args:
        cases: random layers; by default 1000, in the short form 200.
        seed: of the random layers and of all numbers.
        short: a small part of the grid and of the large layers, without checkpointing, which
            imports PyTorch's compiler; for CI.
        only: just the checks whose name contains this.
        device: 'cpu', 'cuda', 'cuda:1', ...: where the layers are. Oracles stay on the CPU.
        json: a file to write the report into.
        report: called with each `Line` of the report as soon as it is known.

    Raises:
        ConfigError: an option that makes no sense. Never for anything that the backend does: an
            exception of its own is a failed check.
    """
    if cases is not None and cases < 1:
        raise ConfigError([f"cases={cases}: must be 1 or more"])
    chosen = [c for c in CHECKS if any(only.lower() in line.lower() for line in c.lines)]
    if not chosen:
        names = "; ".join(line for check in CHECKS for line in check.lines)
        raise ConfigError([f"only={only}: no check has this in its name; there is {names}"])
    if json and (problem := _unwritable(Path(json))):
        raise ConfigError([f"json={json}: {problem}"])
    subject = Subject(backend, cases or (200 if short else 1000), seed, short, _device(device))
    start, lines = time.perf_counter(), []
    with _undisturbed():
        for check in chosen:
            for line in check.run(subject):
                if only.lower() in line.name.lower():
                    lines.append(line)
                    if report:
                        report(line)
    options = {"cases": subject.cases, "seed": seed, "short": short, "only": only, "device": device}
    if isinstance(backend, partial):
        options["backend"] = dict(backend.keywords)
    name = f"{subject.kind.__module__}.{subject.name}"
    total = sum(len(check.lines) for check in CHECKS)
    found = Report(name, options, lines, time.perf_counter() - start, total)
    if json:
        Path(json).write_text(found.json() + "\n", encoding="utf-8")
    return found


def rerun(backend: Callable[..., nn.Conv2d], line: str, *case: Any, seed: int = 0) -> None:
    """Check one case again, as the report gives it: prints what is wrong, and raises what the
    backend raises."""
    check = next(c for c in CHECKS if line in c.lines)
    subject = Subject(backend, 1, seed, False, torch.device("cpu"))
    for finding in check.measure(subject, *case):
        if (finding.line or line) == line and finding.error > check.budget(subject):
            print(finding.text)


def _unwritable(path: Path) -> str | None:
    if path.is_dir():
        return "is a folder; name a file in it"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return "cannot be written"
    return None


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
def _undisturbed() -> Iterator[None]:
    """Float32 as such on GPUs too, no warnings, and all as it was afterwards."""
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
            if get() != value:  # some restore slowly
                restore(value)
