"""Benchmark of convolutions: time, memory and rounding error of implementations, in turns."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import ConfigDict, NonNegativeFloat, PositiveInt, validate_call
from torch import nn
from tqdm import tqdm

from cnntrain.config import ConfigError
from cnntrain.config.errors import collect, first_line
from cnntrain.lab.benchmark import measure
from cnntrain.lab.benchmark.implementations import MakeConv, implementations
from cnntrain.lab.benchmark.layers import ConvLayer, LayerSet, layer_sets
from cnntrain.lab.benchmark.report import BenchmarkReport, Measurement, describe_machine

BATCH_SIZES = [128]  # of a set that has none of its own
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DType = Literal["float32", "float64", "bfloat16", "float16"]


@validate_call(config=ConfigDict(arbitrary_types_allowed=True))
def benchmark(
    layers: Mapping[str, Any],
    backends: list[str | dict[str, Any] | Callable[..., nn.Conv2d]],
    *,
    in_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 28, 28),
    batch_sizes: list[PositiveInt] | None = None,
    dtypes: list[DType] | None = None,
    memory_format: Literal["contiguous", "channels_last"] = "contiguous",
    backward: bool = True,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: PositiveInt | None = None,
    rounds: PositiveInt = 20,
    min_turn_ms: NonNegativeFloat = 5.0,
    seed: int = 0,
) -> BenchmarkReport:
    """Time every backend on every layer, batch size and dtype, in turns.

    A pass is a forward and the gradients of input, weight and bias; a turn is several passes. Each
    round has one turn of every backend, in random order; ratios are taken within a round, to
    `native` or else to the first. Errors are max|a - b| / max|b|, with b from ``nn.Conv2d`` in
    float64. A backend that raises has a row with the reason. Denormals are flushed to zero.

    Args:
        layers: the layer sets, by name: see `layer_sets`.
        backends: the implementations: see `implementations`.
        in_shape: (C, H, W) of the image that is passed through networks to find their layers.
        batch_sizes: None: those of each set, or else 128.
        dtypes: of input, weight and bias; None: float32.
        memory_format: of input, weight and the gradient of the output.
        backward: False: only the forward, which then builds no graph.
        device: on a GPU, times are those of CUDA events.
        threads: of PyTorch on the CPU; None: unchanged.
        rounds: turns of each backend.
        min_turn_ms: passes are repeated until a turn takes this long, in ms; 0: one pass.
        seed: of inputs, weights, gradients and the order of turns.

    Raises:
        ConfigError: an option cannot be used; raised before anything is timed.
    """
    sets, makers = prepare(layers, backends, in_shape, batch_sizes, dtypes, device)
    cases = [
        (group.name, layer, batch_size, dtype)
        for group in sets
        for dtype in dtypes or ["float32"]
        for batch_size in batch_sizes or group.batch_sizes or BATCH_SIZES
        for layer in group.layers
    ]
    options: dict[str, Any] = {"device": device, "memory_format": memory_format}
    options |= {"backward": backward, "rounds": rounds, "min_turn_ms": min_turn_ms, "seed": seed}
    baseline = "native" if "native" in makers else next(iter(makers))
    order = random.Random(seed)
    measurements: list[Measurement] = []
    with _global_state(threads, device):
        meta = describe_machine(device) | options | {"baseline": baseline}
        with tqdm(total=len(cases) * rounds, unit="round", leave=False, disable=None) as bar:
            for name, layer, batch_size, dtype in cases:
                bar.set_description(f"{name}, batch {batch_size}, {dtype}")
                found = _measure(layer, batch_size, dtype, makers, meta, order, bar.update)
                measurements += [Measurement(name, layer, batch_size, dtype, backend, **results)
                                 for backend, results in found.items()]  # fmt: skip
    return BenchmarkReport(meta, measurements)


def prepare(
    layers: Mapping[str, Any],
    backends: Sequence[Any],
    in_shape: tuple[int, int, int],
    batch_sizes: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    device: str = "cpu",
    **_: Any,
) -> tuple[list[LayerSet], dict[str, MakeConv]]:
    """The layers and implementations of `benchmark`; raises its ConfigError."""
    problems: list[str] = []
    if device == "cuda" and not torch.cuda.is_available():
        problems.append("device=cuda: this machine has no GPU that PyTorch can use; "
                        "take device=cpu")  # fmt: skip
    for option, given in [("batch_sizes", batch_sizes), ("dtypes", dtypes)]:
        if given is not None and (not given or len(set(given)) < len(given)):
            problems.append(f"{option}={given}: must be one value or more, none of them twice")
    with collect(problems):
        sets = layer_sets(layers, in_shape)
    with collect(problems):
        makers = implementations(backends)
    if problems:
        raise ConfigError(problems)
    return sets, makers


@contextmanager
def _global_state(threads: int | None, device: str) -> Iterator[None]:
    """Set threads and flush denormals; restore them and the random generators afterwards."""
    threads_before = torch.get_num_threads()
    # PyTorch has no getter: denormals are flushed if half of the smallest normal number is 0.
    flushed_before = torch.full((), torch.finfo(torch.float32).tiny).div(2).item() == 0
    gpus = [torch.cuda.current_device()] if device == "cuda" else []
    try:
        with torch.random.fork_rng(gpus):
            torch.set_num_threads(threads or threads_before)
            torch.set_flush_denormal(True)  # arithmetic on denormals is much slower
            yield
    finally:
        torch.set_num_threads(threads_before)
        torch.set_flush_denormal(flushed_before)


def _measure(
    layer: ConvLayer,
    batch_size: int,
    dtype: str,
    makers: Mapping[str, MakeConv],
    options: Mapping[str, Any],
    order: random.Random,
    on_round: Callable[[], Any],
) -> dict[str, dict[str, Any]]:
    """Check each implementation once, then time in turns those that did not raise.

    Returns the results of each as arguments of `Measurement`.
    """
    torch.default_generator.manual_seed(options["seed"])
    kind: dict[str, Any] = {"device": options["device"], "dtype": getattr(torch, dtype)}
    memory_format = FORMATS[options["memory_format"]]
    reference = layer.make(nn.Conv2d).to(**kind)
    x, g = (torch.randn(batch_size, *shape).to(**kind, memory_format=memory_format)
            for shape in (layer.in_shape, layer.out_shape))  # fmt: skip
    gradient = g if options["backward"] else None
    expected = measure.expected_results(reference, x, gradient)
    x.requires_grad_(options["backward"])
    results: dict[str, dict[str, Any]] = {}
    timed: dict[str, measure.TimedConv] = {}
    for name, make in makers.items():
        try:
            conv = layer.make(make).to(**kind)
            conv.load_state_dict(reference.state_dict())
            conv.to(memory_format=memory_format)
            subject = measure.TimedConv(conv, x, gradient)
            y = subject.forward()  # also the warm-up
            if y.shape != expected[0].shape:
                raise RuntimeError(f"its output is {[*y.shape]}, not {[*expected[0].shape]}")
            found: dict[str, Any] = {"output_error": measure.largest_error([y], expected[:1])}
            if gradient is not None and not y.requires_grad:
                subject = replace(subject, g=None)
                found["problem"] = "forward only: its output has no gradient"
            elif gradient is not None:
                found["gradient_error"] = measure.largest_error(subject.backward(y), expected[1:])
            del y
            found["memory"] = measure.extra_memory(subject)
            found["passes"] = measure.passes_per_turn(subject, options["min_turn_ms"] / 1000)
            timed[name], results[name] = subject, found
        except Exception as error:
            results[name] = _failure(error)
    passes = {name: results[name]["passes"] for name in timed}
    times, raised = measure.time_in_turns(timed, passes, options["rounds"], order, on_round)
    for name in times:
        complete = (timed[name].g is not None) == options["backward"]
        totals = [time.total for time in times[name]] if complete else []
        results[name] |= {"times": times[name], "totals": totals}
    return results | {name: _failure(error) for name, error in raised.items()}


def _failure(error: Exception) -> dict[str, Any]:
    return {"problem": f"{type(error).__name__}: {first_line(error)}"}
