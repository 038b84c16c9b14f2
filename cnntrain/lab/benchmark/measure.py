"""Time, memory and rounding error of a convolution, measured."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

MAX_PASSES = 10_000  # in a turn
SLICE = 16  # images at a time in the float64 reference, which unrolls all that it gets


@dataclass(frozen=True)
class TimedConv:
    """A layer, its input x (N, C, H, W), and the gradient g (N, O, OH, OW) of its output.

    Without g only the forward is measured, and it builds no graph.
    """

    conv: nn.Conv2d
    x: Tensor
    g: Tensor | None

    def forward(self) -> Tensor:
        with torch.set_grad_enabled(self.g is not None):
            return self.conv(self.x)

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """The gradients of input, weight and bias."""
        return torch.autograd.grad(y, [self.x, *self.conv.parameters()], self.g)


class PassTime(NamedTuple):
    """Seconds of a pass; `backward` is None where there was none."""

    forward: float
    backward: float | None

    @property
    def total(self) -> float:
        return self.forward + (self.backward or 0.0)


class ExtraMemory(NamedTuple):
    """Bytes beyond input, weight, bias and the results, which are output and gradients."""

    forward: int | None = None  # peak during the forward
    total: int | None = None  # peak during forward and backward; None without backward
    kept: int | None = None  # allocated between the two; None without backward


def time_passes(timed: TimedConv, passes: int) -> PassTime:
    """Mean time of consecutive passes, without the deallocation between them.

    On a GPU by events in the stream, so that nothing synchronises between them.
    """
    marks: list[Any] = []

    def mark() -> None:
        if timed.x.is_cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    if timed.x.is_cuda:
        torch.cuda.synchronize()
    gc_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(passes):
            mark()
            y = timed.forward()
            mark()
            gradients = None if timed.g is None else timed.backward(y)
            mark()
            del y, gradients
    finally:
        if gc_enabled:
            gc.enable()
    if timed.x.is_cuda:
        torch.cuda.synchronize()
        marks = [marks[0].elapsed_time(mark) / 1000 for mark in marks]
    seconds = [end - start for start, end in itertools.pairwise(marks)]
    backward = None if timed.g is None else sum(seconds[1::3]) / passes
    return PassTime(sum(seconds[0::3]) / passes, backward)


def passes_per_turn(timed: TimedConv, min_seconds: float) -> int:
    """The number of passes that take at least `min_seconds`."""
    passes, spent = 1, time_passes(timed, 1).total
    while spent < min_seconds and passes < MAX_PASSES:
        # The first pass is slow, so its time is an upper bound: increase step by step.
        enough = math.ceil(1.2 * passes * min_seconds / max(spent, 1e-9))
        passes = min(MAX_PASSES, enough, 10 * passes)
        spent = time_passes(timed, passes).total * passes
    return passes


def time_in_turns(
    timed: Mapping[str, TimedConv],
    passes: Mapping[str, int],
    rounds: int,
    order: random.Random,
    on_round: Callable[[], Any] = lambda: None,
) -> tuple[dict[str, list[PassTime]], dict[str, Exception]]:
    """Time each implementation once a round, in random order, as a machine's speed changes.

    Returns the times by round, and the exceptions of those that raised, which have no times.
    """
    times: dict[str, list[PassTime]] = {name: [] for name in timed}
    raised: dict[str, Exception] = {}
    for _ in range(rounds):
        names = list(times)
        order.shuffle(names)
        for name in names:
            try:
                times[name].append(time_passes(timed[name], passes[name]))
            except Exception as error:
                raised[name] = error
                del times[name]
        on_round()
    return times, raised


def expected_results(conv: nn.Conv2d, x: Tensor, g: Tensor | None) -> list[Tensor]:
    """Output, and with g the gradients of input, weight and bias, of ``nn.Conv2d`` in float64."""
    conv, outputs = copy.deepcopy(conv).double(), []
    x = x.detach().double().requires_grad_(g is not None)
    for part, x_part in enumerate(x.split(SLICE)):
        y = conv(x_part)
        outputs.append(y.detach())
        if g is not None:
            y.backward(g.double().split(SLICE)[part])
    gradients = [] if g is None else [t.grad for t in (x, *conv.parameters()) if t.grad is not None]
    return [torch.cat(outputs), *gradients]


def largest_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest max|a - b| / max|b|; RuntimeError if a result is not finite."""
    pairs = zip(results, expected, strict=True)
    errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    if not all(map(math.isfinite, errors)):
        raise RuntimeError("its results are not finite")
    return max(errors)


def extra_memory(timed: TimedConv) -> ExtraMemory:
    """Memory of a forward and its backward, measured.

    On a CPU by PyTorch's profiler, which records each block of PyTorch's allocator, oneDNN's
    scratch memory included; on a GPU by the statistics of the caching allocator.
    """
    track = _track_cuda if timed.x.is_cuda else _track_cpu
    (y,), forward, kept = track(lambda: [timed.forward()])
    if timed.g is None:
        return ExtraMemory(forward)
    _, backward, _ = track(lambda: timed.backward(y))
    return ExtraMemory(forward, max(forward, kept + backward), kept)


def _track_cpu(call: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], int, int]:
    """Results of a call, and the peak and final growth of memory in bytes without them."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        results = call()
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    blocks = sorted(_blocks(tree))  # by time
    # Addresses are used again: the last block at the address of a result is the result.
    last = {address: i for i, (_, address, size) in enumerate(blocks) if size > 0}
    own = {last.get(result.untyped_storage().data_ptr()) for result in results}
    in_use = [*itertools.accumulate(size for i, (_, _, size) in enumerate(blocks) if i not in own)]
    return results, max(in_use, default=0), in_use[-1] if in_use else 0


def _blocks(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of each allocation, and with negative bytes of each deallocation."""
    for event in events:
        if event.name == "[memory]":
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size
        yield from _blocks(event.children)


def _track_cuda(call: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], int, int]:
    """As `_track_cpu`, with the results counted as allocated from the start."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}
    before += sum(own.values())
    peak, end = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    return results, max(peak, 0), max(end, 0)
