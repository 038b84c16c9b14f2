"""What a benchmark found: rows, sums over the layers of a set, and how contenders compare."""

from __future__ import annotations

import csv
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnntrain.atomic import write_json
from cnntrain.lab.benchmark.measure import Case, Measured
from cnntrain.training.run_directory import environment


@dataclass(frozen=True)
class Spread:
    """The median over the rounds, and the quartiles around it."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None if there are no values."""
        known = list(values)
        if not known:
            return None
        q1, median, q3 = np.percentile(known, [25, 50, 75]).tolist()
        return cls(median, q1, q3)

    @classmethod
    def ratio(cls, values: Sequence[float], others: Sequence[float]) -> Spread | None:
        """Of values that were taken in the same round. None where one of the two is missing."""
        if not values or not others:
            return None
        return cls.of(value / other for value, other in zip(values, others, strict=True))


@dataclass(frozen=True)
class Row:
    """A contender on one layer. `baseline`: the seconds that it is compared to, of each round."""

    case: Case
    backend: str
    measured: Measured
    baseline: Sequence[float]

    @property
    def forward(self) -> Spread | None:
        """In ms, as the next two."""
        return Spread.of(1000 * times.forward for times in self.measured.times)

    @property
    def backward(self) -> Spread | None:
        backwards = [times.backward for times in self.measured.times]
        return Spread.of(1000 * seconds for seconds in backwards if seconds is not None)

    @property
    def total(self) -> Spread | None:
        """Forward and backward, or the forward alone in a run without backward."""
        return Spread.of(1000 * seconds for seconds in self.measured.totals)

    @property
    def ratio(self) -> Spread | None:
        """Of the totals to the baseline's."""
        return Spread.ratio(self.measured.totals, self.baseline)

    def gflops(self, what: Spread | None, products: int) -> float | None:
        """GFLOP/s at the median time: a product of all is 2 MACs for each of the images."""
        flop = products * 2 * self.case.layer.macs * self.case.batch_size
        return None if what is None else flop / what.median / 1e6

    def flat(self) -> dict[str, Any]:
        """A row of results.csv. Times in ms, memory in bytes; None for what is not there."""
        case, measured, memory = self.case, self.measured, self.measured.memory
        return {
            "set": case.set,
            "layer": case.layer.name,
            "shape": case.layer.shape,
            "count": case.layer.count,
            "batch_size": case.batch_size,
            "dtype": case.dtype,
            "backend": self.backend,
            "macs_per_image": case.layer.macs,
            "rounds": len(measured.times),
            "passes": measured.passes,
            **_columns("forward_ms", self.forward),
            **_columns("backward_ms", self.backward),
            **_columns("total_ms", self.total),
            "forward_gflops": self.gflops(self.forward, 1),
            "total_gflops": self.gflops(self.total, 3 if self.backward else 1),
            **_columns("ratio", self.ratio),
            "forward_extra_bytes": memory and memory.forward,
            "total_extra_bytes": memory and memory.total,
            "kept_bytes": memory and memory.kept,
            "output_error": measured.output_error,
            "gradient_error": measured.gradient_error,
            "problem": measured.problem,
        }


@dataclass(frozen=True)
class Sum:
    """A contender on all layers of a set, each as often as the set has it.

    `totals`, `baseline`: seconds of each round; empty if one of the layers has none.
    """

    set: str
    batch_size: int
    dtype: str
    backend: str
    totals: Sequence[float]
    baseline: Sequence[float]

    @property
    def total(self) -> Spread | None:
        """In ms."""
        return Spread.of(1000 * seconds for seconds in self.totals)

    @property
    def ratio(self) -> Spread | None:
        return Spread.ratio(self.totals, self.baseline)

    def flat(self) -> dict[str, Any]:
        names = {"set": self.set, "batch_size": self.batch_size, "dtype": self.dtype}
        spreads = _columns("total_ms", self.total) | _columns("ratio", self.ratio)
        return {**names, "backend": self.backend, **spreads}


@dataclass(frozen=True)
class Speedup:
    """How many times as fast one contender is as another, over the sums that both have.

    Of each sum the median over the rounds; of these the geometric mean, lowest and highest.
    """

    dtype: str
    backend: str
    other: str
    geometric_mean: float
    lowest: float
    highest: float
    sums: int


@dataclass(frozen=True)
class Report:
    """All that a benchmark found. `meta`: what the numbers depend on."""

    meta: dict[str, Any]
    rows: list[Row]

    @property
    def backends(self) -> list[str]:
        return list(dict.fromkeys(row.backend for row in self.rows))

    @property
    def sums(self) -> list[Sum]:
        """Of each set, batch size and dtype, in the order of the rows."""
        found = []
        for (name, batch_size, dtype), group in groupby(self.rows, _sum_key):
            rows = list(group)
            totals = {b: _summed([r for r in rows if r.backend == b]) for b in self.backends}
            baseline = totals[self.meta["baseline"]]
            found += [Sum(name, batch_size, dtype, b, totals[b], baseline) for b in self.backends]
        return found

    @property
    def speedups(self) -> list[Speedup]:
        """Of each pair of contenders, both ways round, for each dtype."""
        found = []
        for dtype in dict.fromkeys(row.case.dtype for row in self.rows):
            sums = {b: [s for s in self.sums if (s.dtype, s.backend) == (dtype, b)]
                    for b in self.backends}  # fmt: skip
            for one, other in permutations(self.backends, 2):
                pairs = zip(sums[one], sums[other], strict=True)
                ratios = [Spread.ratio(b.totals, a.totals) for a, b in pairs]
                times = [ratio.median for ratio in ratios if ratio is not None]
                if times:
                    mean = math.exp(sum(map(math.log, times)) / len(times))
                    found.append(
                        Speedup(dtype, one, other, mean, min(times), max(times), len(times))
                    )
        return found

    def write(self, directory: str | os.PathLike[str]) -> None:
        """results.csv, a row a line; results.json, with `meta`, `rows`, `sums` and `speedups`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        rows = [row.flat() for row in self.rows]
        with (directory / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        content = {
            "meta": self.meta,
            "rows": rows,
            "sums": [found.flat() for found in self.sums],
            "speedups": [asdict(speedup) for speedup in self.speedups],
        }
        write_json(directory / "results.json", content)


def describe_machine(device: str) -> dict[str, Any]:
    """What times depend on and the options do not say."""
    known = environment()
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "processor": processor(),
        "gpu": gpu,
        "cpus": known["machine"]["cpus"],
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32 if gpu else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "platform": known["machine"]["platform"],
        "versions": known["versions"],
        "git_revision": known["git"]["revision"],
        "command": known["command"],
    }


def processor() -> str:
    """The CPU's name: on Linux the kernel's, since `platform` doesn't know it there."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _columns(name: str, spread: Spread | None) -> dict[str, float | None]:
    values = (spread.median, spread.q1, spread.q3) if spread else (None, None, None)
    return dict(zip([name, f"{name}_q1", f"{name}_q3"], values, strict=True))


def _sum_key(row: Row) -> tuple[str, int, str]:
    return row.case.set, row.case.batch_size, row.case.dtype


def _summed(rows: Sequence[Row]) -> list[float]:
    """Seconds for all layers, round by round; empty if one is missing."""
    if not all(row.measured.totals for row in rows):
        return []
    rounds = zip(*(row.measured.totals for row in rows), strict=True)
    counts = [row.case.layer.count for row in rows]
    return [sum(n * s for n, s in zip(counts, seconds, strict=True)) for seconds in rounds]
