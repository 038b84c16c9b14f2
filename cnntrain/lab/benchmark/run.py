"""Benchmark of convolutions: time, memory and rounding error of implementations, in turns."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import ConfigDict, NonNegativeFloat, PositiveInt, validate_call
from torch import Tensor, nn
from tqdm import tqdm

from cnntrain.config import ConfigError
from cnntrain.config.errors import first_line
from cnntrain.lab.benchmark.implementations import MakeConv, implementations
from cnntrain.lab.benchmark.layers import LayerSet, layer_sets
from cnntrain.lab.benchmark.measure import (
    TimedConv,
    extra_memory,
    passes_per_turn,
    time_in_turns,
)
from cnntrain.lab.benchmark.report import (
    BenchmarkCase,
    BenchmarkReport,
    Measurement,
    Row,
    describe_machine,
)

BATCH_SIZES = (128,)  # of a set that has none of its own
SLICE = 16  # images at a time in the float64 reference, which unrolls all that it gets
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DType = Literal["float32", "float64", "bfloat16", "float16"]


@dataclass(frozen=True)
class Settings:
    """Options of `benchmark` that are the same for all cases."""

    device: str
    memory_format: str
    backward: bool
    rounds: int
    min_turn_ms: float
    seed: int


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
        BenchmarkCase(group.name, layer, batch_size, dtype)
        for group in sets
        for dtype in dtypes or ["float32"]
        for batch_size in batch_sizes or group.batch_sizes or BATCH_SIZES
        for layer in group.layers
    ]
    settings = Settings(device, memory_format, backward, rounds, min_turn_ms, seed)
    baseline = "native" if "native" in makers else next(iter(makers))
    order = random.Random(seed)
    rows = []
    with _global_state(threads, device):
        meta = describe_machine(device) | {**vars(settings), "baseline": baseline}
        with tqdm(total=len(cases) * rounds, unit="round", leave=False, disable=None) as bar:
            for case in cases:
                bar.set_description(f"{case.set}, batch {case.batch_size}, {case.dtype}")
                results = measure(case, makers, settings, order, bar.update)
                totals = results[baseline].totals
                rows += [Row(case, name, result, totals) for name, result in results.items()]
    return BenchmarkReport(meta, rows)


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
    sets, makers = [], {}
    try:
        sets = layer_sets(layers, in_shape)
    except ConfigError as error:
        problems += error.problems
    try:
        makers = implementations(backends)
    except ConfigError as error:
        problems += error.problems
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


def measure(
    case: BenchmarkCase,
    makers: Mapping[str, MakeConv],
    settings: Settings,
    order: random.Random,
    on_round: Callable[[], Any],
) -> dict[str, Measurement]:
    """Check each implementation once, then time in turns those that did not raise."""
    torch.default_generator.manual_seed(settings.seed)
    kind: dict[str, Any] = {"device": settings.device, "dtype": getattr(torch, case.dtype)}
    memory_format = FORMATS[settings.memory_format]
    reference = nn.Conv2d(**dict(case.layer.options)).to(**kind)
    x, g = (torch.randn(case.batch_size, *shape).to(**kind, memory_format=memory_format)
            for shape in (case.layer.in_shape, case.layer.out_shape))  # fmt: skip
    gradient = g if settings.backward else None
    expected = _expected(reference, x, gradient)
    x.requires_grad_(settings.backward)
    results: dict[str, Measurement] = {}
    timed: dict[str, TimedConv] = {}
    for name, make in makers.items():
        try:
            conv = make(**dict(case.layer.options)).to(**kind)
            conv.load_state_dict(reference.state_dict())
            conv.to(memory_format=memory_format)
            timed[name], results[name] = _first_pass(
                TimedConv(conv, x, gradient), expected, settings.min_turn_ms / 1000
            )
        except Exception as error:
            results[name] = _failure(error)
    passes = {name: results[name].passes or 1 for name in timed}
    times, raised = time_in_turns(timed, passes, settings.rounds, order, on_round)
    for name in times:
        complete = (timed[name].g is not None) == settings.backward
        totals = [t.total for t in times[name]] if complete else []
        results[name] = replace(results[name], times=times[name], totals=totals)
    results |= {name: _failure(error) for name, error in raised.items()}
    return {name: results[name] for name in makers}


def _first_pass(
    timed: TimedConv, expected: list[Tensor], min_seconds: float
) -> tuple[TimedConv, Measurement]:
    """Errors, memory and passes per turn; also the warm-up."""
    y = timed.forward()
    if y.shape != expected[0].shape:
        raise RuntimeError(f"its output is {list(y.shape)}, not {list(expected[0].shape)}")
    output_error, gradient_error, problem = _error([y], expected[:1]), None, ""
    if timed.g is not None and not y.requires_grad:
        timed, problem = replace(timed, g=None), "forward only: its output has no gradient"
    if timed.g is not None:
        gradient_error = _error(timed.backward(y), expected[1:])
    del y
    memory, passes = extra_memory(timed), passes_per_turn(timed, min_seconds)
    return timed, Measurement((), (), passes, memory, output_error, gradient_error, problem)


def _expected(conv: nn.Conv2d, x: Tensor, g: Tensor | None) -> list[Tensor]:
    """Output, and with g the gradients of input, weight and bias, of ``nn.Conv2d`` in float64."""
    conv = copy.deepcopy(conv).double()
    slices = []
    for part, x_part in enumerate(x.double().split(SLICE)):
        g_part = None if g is None else g.double().split(SLICE)[part]
        timed = TimedConv(conv, x_part.requires_grad_(g is not None), g_part)
        y = timed.forward()
        slices.append([y.detach(), *(() if g is None else timed.backward(y))])
    joined = list(zip(*slices, strict=True))
    return [*map(torch.cat, joined[:2]), *(sum(parts[1:], parts[0]) for parts in joined[2:])]


def _error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest max|a - b| / max|b|; RuntimeError if a result is not finite."""
    pairs = zip(results, expected, strict=True)
    errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    if not all(map(math.isfinite, errors)):
        raise RuntimeError("its results are not finite")
    return max(errors)


def _failure(error: Exception) -> Measurement:
    return Measurement(problem=f"{type(error).__name__}: {first_line(error)}")
