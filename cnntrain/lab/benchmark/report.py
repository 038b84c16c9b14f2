"""Report of a benchmark: rows, sums over the layers of a set, and speedups between backends."""

from __future__ import annotations

import csv
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnntrain.atomic import write_json
from cnntrain.lab.benchmark.layers import ConvLayer
from cnntrain.lab.benchmark.measure import ExtraMemory, PassTime
from cnntrain.training.run_directory import environment


@dataclass(frozen=True)
class BenchmarkCase:
    """A layer of a set with the batch size and dtype that it is timed with."""

    set: str
    layer: ConvLayer
    batch_size: int
    dtype: str


@dataclass(frozen=True)
class Measurement:
    """What an implementation took for a case; only `problem` if it raised."""

    times: Sequence[PassTime] = ()  # of a pass, for each round
    totals: Sequence[float] = ()  # seconds, for each round; none if the backward is missing
    passes: int | None = None  # in a turn
    memory: ExtraMemory | None = None
    output_error: float | None = None
    gradient_error: float | None = None  # the largest of input, weight and bias
    problem: str = ""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles over the rounds."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Iterable[float | None], factor: float = 1) -> Quartiles | None:
        """Of the values times `factor`; None without values."""
        known = [factor * value for value in values if value is not None]
        if not known:
            return None
        q1, median, q3 = np.percentile(known, [25, 50, 75]).tolist()
        return cls(median, q1, q3)

    @classmethod
    def ratio(cls, values: Sequence[float], others: Sequence[float]) -> Quartiles | None:
        """Of the ratios within a round; None without one of the two."""
        if not values or not others:
            return None
        return cls.of(value / other for value, other in zip(values, others, strict=True))


@dataclass(frozen=True)
class Row:
    """An implementation on one layer; `baseline` are the baseline's seconds of each round."""

    case: BenchmarkCase
    backend: str
    measured: Measurement
    baseline: Sequence[float]

    @property
    def forward(self) -> Quartiles | None:
        """In ms, as `backward` and `total`."""
        return Quartiles.of((times.forward for times in self.measured.times), 1000)

    @property
    def backward(self) -> Quartiles | None:
        return Quartiles.of((times.backward for times in self.measured.times), 1000)

    @property
    def total(self) -> Quartiles | None:
        """Forward and backward, or the forward in a run without backward."""
        return Quartiles.of(self.measured.totals, 1000)

    @property
    def ratio(self) -> Quartiles | None:
        """Of the totals to the baseline's."""
        return Quartiles.ratio(self.measured.totals, self.baseline)

    def gflops(self, time: Quartiles | None, products: int) -> float | None:
        """GFLOP/s at the median time, for `products` times the MACs of the forward."""
        flop = products * 2 * self.case.layer.macs * self.case.batch_size
        return None if time is None else flop / time.median / 1e6

    def flat(self) -> dict[str, Any]:
        """A row of results.csv. Times in ms, memory in bytes; None where there is no value."""
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
class SetTotal:
    """An implementation on all layers of a set, each multiplied by its count.

    `totals` and `baseline` are seconds of each round; empty if a layer has none.
    """

    set: str
    batch_size: int
    dtype: str
    backend: str
    totals: Sequence[float]
    baseline: Sequence[float]

    @property
    def total(self) -> Quartiles | None:
        """In ms."""
        return Quartiles.of(self.totals, 1000)

    @property
    def ratio(self) -> Quartiles | None:
        return Quartiles.ratio(self.totals, self.baseline)

    def flat(self) -> dict[str, Any]:
        names = {"set": self.set, "batch_size": self.batch_size, "dtype": self.dtype}
        columns = _columns("total_ms", self.total) | _columns("ratio", self.ratio)
        return {**names, "backend": self.backend, **columns}


@dataclass(frozen=True)
class Speedup:
    """How many times as fast `backend` is as `other`, over the sums that both have.

    Geometric mean, lowest and highest of the medians over the rounds.
    """

    dtype: str
    backend: str
    other: str
    geometric_mean: float
    lowest: float
    highest: float
    sums: int


@dataclass(frozen=True)
class BenchmarkReport:
    """Results of a benchmark; `meta` has its options, the machine and the versions."""

    meta: dict[str, Any]
    rows: list[Row]

    @property
    def backends(self) -> list[str]:
        return list(dict.fromkeys(row.backend for row in self.rows))

    @property
    def sums(self) -> list[SetTotal]:
        """For each set, batch size and dtype, in the order of the rows."""
        sums = []
        for key, group in groupby(
            self.rows, lambda r: (r.case.set, r.case.batch_size, r.case.dtype)
        ):
            rows = list(group)
            totals = {b: _summed([r for r in rows if r.backend == b]) for b in self.backends}
            baseline = totals[self.meta["baseline"]]
            sums += [SetTotal(*key, b, totals[b], baseline) for b in self.backends]
        return sums

    @property
    def speedups(self) -> list[Speedup]:
        """Of each ordered pair of implementations, for each dtype."""
        speedups, sums = [], self.sums
        for dtype in dict.fromkeys(row.case.dtype for row in self.rows):
            own = {b: [s for s in sums if (s.dtype, s.backend) == (dtype, b)]
                   for b in self.backends}  # fmt: skip
            for one, other in permutations(self.backends, 2):
                pairs = zip(own[one], own[other], strict=True)
                ratios = [Quartiles.ratio(b.totals, a.totals) for a, b in pairs]
                medians = [ratio.median for ratio in ratios if ratio is not None]
                if medians:
                    mean = statistics.geometric_mean(medians)
                    extremes = min(medians), max(medians)
                    speedups.append(Speedup(dtype, one, other, mean, *extremes, len(medians)))
        return speedups

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Write results.csv with the rows, and results.json with everything."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        rows = [row.flat() for row in self.rows]
        with (directory / "results.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        sums, speedups = [s.flat() for s in self.sums], [asdict(s) for s in self.speedups]
        content = {"meta": self.meta, "rows": rows, "sums": sums, "speedups": speedups}
        write_json(directory / "results.json", content)


def describe_machine(device: str) -> dict[str, Any]:
    """Machine, versions and global settings of PyTorch."""
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
    """The CPU's name; on Linux from /proc, as `platform` does not know it there."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _columns(name: str, values: Quartiles | None) -> dict[str, float | None]:
    columns = (values.median, values.q1, values.q3) if values else (None, None, None)
    return dict(zip([name, f"{name}_q1", f"{name}_q3"], columns, strict=True))


def _summed(rows: Sequence[Row]) -> list[float]:
    """Seconds of all layers in each round; empty if a layer has none."""
    if not all(row.measured.totals for row in rows):
        return []
    rounds = zip(*(row.measured.totals for row in rows), strict=True)
    counts = [row.case.layer.count for row in rows]
    return [sum(n * s for n, s in zip(counts, seconds, strict=True)) for seconds in rounds]
