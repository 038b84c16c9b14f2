"""Report of a benchmark: rows, and sums over the layers of a set."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnntrain.atomic import write_json
from cnntrain.lab.benchmark.layers import ConvLayer
from cnntrain.lab.benchmark.measure import ExtraMemory, PassTime
from cnntrain.training.run_directory import environment

Table = list[dict[str, Any]]
MEMORY = "forward_extra", "total_extra", "kept"  # in the order of ExtraMemory


@dataclass(frozen=True)
class Measurement:
    """What an implementation took for a layer; only `problem` if it raised."""

    set: str
    layer: ConvLayer
    batch_size: int
    dtype: str
    backend: str
    times: Sequence[PassTime] = ()  # of a pass, for each round
    totals: Sequence[float] = ()  # seconds, for each round; none if the backward is missing
    passes: int | None = None  # in a turn
    memory: ExtraMemory | None = None
    output_error: float | None = None
    gradient_error: float | None = None  # the largest of input, weight and bias
    problem: str = ""

    @property
    def group(self) -> tuple[str, int, str]:
        """What the layers of a sum have in common."""
        return self.set, self.batch_size, self.dtype


@dataclass(frozen=True)
class BenchmarkReport:
    """Results of a benchmark; `meta` has its options, the machine and the versions."""

    meta: dict[str, Any]
    measurements: list[Measurement]

    @property
    def backends(self) -> list[str]:
        return list(dict.fromkeys(found.backend for found in self.measurements))

    @cached_property
    def rows(self) -> Table:
        """A row for each implementation on each layer, as in results.csv.

        Times in ms, memory in bytes; medians over the rounds with the quartiles, and None where
        there is no value.
        """
        rows = []
        for _, group in groupby(self.measurements, lambda m: (*m.group, id(m.layer))):
            by_backend = {m.backend: m for m in group}
            baseline = by_backend[self.meta["baseline"]].totals
            rows += [_row(m, baseline) for m in by_backend.values()]
        return rows

    @cached_property
    def sums(self) -> Table:
        """For each set, batch size and dtype the sum over the layers, each times its count."""
        sums = []
        for (name, batch_size, dtype), group in groupby(self.measurements, lambda m: m.group):
            measured = list(group)
            totals = {b: _summed([m for m in measured if m.backend == b]) for b in self.backends}
            baseline = totals[self.meta["baseline"]]
            for backend, seconds in totals.items():
                row = {"set": name, "batch_size": batch_size, "dtype": dtype, "backend": backend}
                sums.append(row | _quartiles("total_ms", seconds, 1000) | _ratio(seconds, baseline))
        return sums

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Write results.csv with the rows, and results.json with everything."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        content = {"meta": self.meta, "rows": self.rows, "sums": self.sums}
        write_json(directory / "results.json", content)


def _row(found: Measurement, baseline: Sequence[float]) -> dict[str, Any]:
    layer, memory = found.layer, found.memory or ExtraMemory()
    row: dict[str, Any] = {"set": found.set, "layer": layer.name, "shape": layer.shape}
    row |= {"count": layer.count, "batch_size": found.batch_size, "dtype": found.dtype}
    row |= {"backend": found.backend, "macs_per_image": layer.macs}
    row |= {"rounds": len(found.times), "passes": found.passes}
    row |= _quartiles("forward_ms", (time.forward for time in found.times), 1000)
    row |= _quartiles("backward_ms", (time.backward for time in found.times), 1000)
    row |= _quartiles("total_ms", found.totals, 1000)
    mflop = 2 * layer.macs * found.batch_size / 1e6
    products = 1 if row["backward_ms"] is None else 3
    row["forward_gflops"] = (time := row["forward_ms"]) and mflop / time
    row["total_gflops"] = (time := row["total_ms"]) and products * mflop / time
    row |= _ratio(found.totals, baseline)
    row |= {f"{part}_bytes": size for part, size in zip(MEMORY, memory, strict=True)}
    row |= {"output_error": found.output_error, "gradient_error": found.gradient_error}
    return row | {"problem": found.problem}


def _quartiles(
    name: str, values: Iterable[float | None], factor: float = 1
) -> dict[str, float | None]:
    """Median and quartiles of the values times `factor`; None without values."""
    known = [factor * value for value in values if value is not None]
    found = np.percentile(known, [50, 25, 75]).tolist() if known else [None] * 3
    return dict(zip([name, f"{name}_q1", f"{name}_q3"], found, strict=True))


def _ratio(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, float | None]:
    """Of the ratios within a round; None without one of the two."""
    return _quartiles("ratio", [a / b for a, b in zip(seconds, baseline, strict=False)])


def _summed(measured: Sequence[Measurement]) -> list[float]:
    """Seconds of all layers in each round; empty if a layer has none."""
    if not all(m.totals for m in measured):
        return []
    seconds = [[m.layer.count * total for total in m.totals] for m in measured]
    return [sum(of_round) for of_round in zip(*seconds, strict=True)]


def describe_machine(device: str) -> dict[str, Any]:
    """Machine, versions and global settings of PyTorch."""
    known = environment()
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "processor": processor(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32 if gpu else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **{key: known[key] for key in ("machine", "versions", "command")},
        "git_revision": known["git"]["revision"],
    }


def processor() -> str:
    """The CPU's name; on Linux from /proc, as `platform` does not know it there."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
