"""Benchmark of convolutions: layers, implementations, measurement, report, display."""

from cnntrain.lab.benchmark.display import plot, print_report
from cnntrain.lab.benchmark.report import BenchmarkReport
from cnntrain.lab.benchmark.run import benchmark

__all__ = ["BenchmarkReport", "benchmark", "plot", "print_report"]
