"""Convolutions timed side by side, with what they cost in memory and in accuracy."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from pydantic import ConfigDict, NonNegativeFloat, PositiveInt, validate_call
from torch import nn
from tqdm import tqdm

from cnntrain.config import ConfigError
from cnntrain.lab.benchmark.contenders import MakeConv, contenders
from cnntrain.lab.benchmark.layers import LayerSet, layer_sets
from cnntrain.lab.benchmark.measure import Case, How, measure
from cnntrain.lab.benchmark.report import Report, Row, describe_machine

T = TypeVar("T")

BATCH_SIZES = (128,)  # of a set that has none of its own

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
) -> Report:
    """Time every backend on every layer, batch size and dtype, in turns.

    A pass is a forward and the gradients of input, weight and bias; a turn some passes in a row.
    In each round every backend has one turn, in an order drawn anew. Ratios are taken within a
    round, to `native` if it is there, else to the first. Errors are max|a - b| / max|b|, where b is
    ``nn.Conv2d`` in float64. A backend that raises has a row that says why; the others go on.
    Inputs, weights and gradients of the output are drawn from `seed`. Denormals are flushed to
    zero meanwhile. Threads, denormals and random generators are afterwards as they were.

    Args:
        layers: what to time, by name: see `layer_sets`.
        backends: what to compare: see `contenders`.
        in_shape: (C, H, W) of the image that a network is shown, to find its layers.
        batch_sizes: None: each set's own, or else 128.
        dtypes: of input, weight and bias; None: float32.
        memory_format: of input, weight and the gradient of the output.
        backward: False: the forward alone, which then builds no graph.
        device: where; on a GPU, times are the device's own events.
        threads: of PyTorch on the CPU; None: as they are.
        rounds: how many turns each backend has.
        min_turn_ms: passes are repeated until a turn takes this long, in ms; 0: one pass.
        seed: of everything random, the order of the turns included.

    Raises:
        ConfigError: something cannot be timed as asked; nothing has been timed then.
    """
    sets, makers = prepared(
        layers,
        backends,
        in_shape=in_shape,
        batch_sizes=batch_sizes,
        dtypes=dtypes,
        device=device,
    )
    cases = [
        Case(group.name, layer, batch_size, dtype)
        for group in sets
        for dtype in dtypes or ["float32"]
        for batch_size in batch_sizes or group.batch_sizes or BATCH_SIZES
        for layer in group.layers
    ]
    how = How(device, memory_format, backward, rounds, min_turn_ms, seed)
    baseline = "native" if "native" in makers else next(iter(makers))
    order = random.Random(seed)
    rows = []
    with _settings(threads, device):
        meta = describe_machine(device) | {**vars(how), "baseline": baseline}
        with tqdm(total=len(cases) * rounds, unit="round", leave=False, disable=None) as bar:
            for case in cases:
                bar.set_description(f"{case.set}, batch {case.batch_size}, {case.dtype}")
                found = measure(case, makers, how, order, bar.update)
                to = found[baseline].totals
                rows += [Row(case, name, measured, to) for name, measured in found.items()]
    return Report(meta, rows)


def prepared(
    layers: Mapping[str, Any],
    backends: Sequence[Any],
    *,
    in_shape: tuple[int, int, int],
    batch_sizes: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    device: str = "cpu",
    **_: Any,
) -> tuple[list[LayerSet], dict[str, MakeConv]]:
    """What `benchmark` would time, and who. Raises ConfigError as it does, and times nothing."""
    problems: list[str] = []
    if device == "cuda" and not torch.cuda.is_available():
        problems.append(
            "device=cuda: this machine has no GPU that PyTorch can use; take device=cpu"
        )
    for option, given in [("batch_sizes", batch_sizes), ("dtypes", dtypes)]:
        if given is not None and (not given or len(set(given)) < len(given)):
            problems.append(f"{option}={given}: must be one value or more, none of them twice")
    sets = _collected(problems, lambda: layer_sets(layers, in_shape))
    makers = _collected(problems, lambda: contenders(backends))
    if problems or sets is None or makers is None:
        raise ConfigError(problems)
    return sets, makers


def _collected(problems: list[str], call: Callable[[], T]) -> T | None:
    try:
        return call()
    except ConfigError as error:
        problems += error.problems
        return None


@contextmanager
def _settings(threads: int | None, device: str) -> Iterator[None]:
    """Threads and denormals as they are to be, and afterwards all as it was, generators too."""
    threads_before, flushed_before = torch.get_num_threads(), _flushes_denormals()
    gpus = [torch.cuda.current_device()] if device == "cuda" else []
    try:
        with torch.random.fork_rng(gpus):
            torch.set_num_threads(threads or threads_before)
            torch.set_flush_denormal(True)  # numbers near zero would be hundreds of times slower
            yield
    finally:
        torch.set_num_threads(threads_before)
        torch.set_flush_denormal(flushed_before)


def _flushes_denormals() -> bool:
    """PyTorch has no way to ask, so: whether half of the smallest normal number is zero."""
    return torch.full((), torch.finfo(torch.float32).tiny).div(2).item() == 0
