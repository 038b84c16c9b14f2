"""How long a convolution takes, forward and backward apart, and contenders who take turns.

Not torch.utils.benchmark.Timer: its statement is one span of time, so a backward on a fresh graph
cannot be told from the forward that made the graph, and it waits for a GPU instead of using the
device's own events.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOST_PASSES = 10_000  # in a turn


@dataclass(frozen=True)
class Subject:
    """A convolution on its input x (N, C, H, W), and g (N, O, OH, OW), a gradient of its output.

    Where g is None only the forward is of interest: it builds no graph.
    """

    conv: nn.Conv2d
    x: Tensor
    g: Tensor | None

    def forward(self) -> Tensor:
        with torch.set_grad_enabled(self.g is not None):
            return self.conv(self.x)

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """The gradients of input, weight and bias, of the graph that y is the end of."""
        conv = self.conv
        leaves = [self.x, conv.weight, *([] if conv.bias is None else [conv.bias])]
        return torch.autograd.grad(y, leaves, self.g)


@dataclass(frozen=True)
class Times:
    """Seconds that a pass took. `backward` is None where there was none."""

    forward: float
    backward: float | None

    @property
    def total(self) -> float:
        return self.forward + (self.backward or 0.0)


class HostClock:
    """Marks in the time of the CPU."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next."""
        return [after - before for before, after in itertools.pairwise(self.marks)]


class CudaClock:
    """Marks in the time of the GPU: events in the stream, so nothing waits between them."""

    def __init__(self) -> None:
        self.marks: list[Any] = []
        torch.cuda.synchronize()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        pairs = itertools.pairwise(self.marks)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def turn(subject: Subject, passes: int) -> Times:
    """The mean of some passes, one after the other. What is freed between them is not timed."""
    clock = CudaClock() if subject.x.is_cuda else HostClock()
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(passes):
            clock.mark()
            y = subject.forward()
            clock.mark()
            gradients = None if subject.g is None else subject.backward(y)
            clock.mark()
            del y, gradients
    finally:
        if collects:
            gc.enable()
    seconds = clock.seconds()
    backward = None if subject.g is None else sum(seconds[1::3]) / passes
    return Times(sum(seconds[0::3]) / passes, backward)


def passes_needed(subject: Subject, least: float) -> int:
    """How many passes a turn needs to take `least` seconds or more."""
    passes = 1
    while (spent := turn(subject, passes).total * passes) < least and passes < MOST_PASSES:
        # A first pass is slow, so what it says is only a lower bound: come nearer step by step.
        enough = math.ceil(1.2 * passes * least / max(spent, 1e-9))
        passes = min(MOST_PASSES, enough, 10 * passes)
    return passes


def take_turns(
    subjects: Mapping[str, Subject],
    passes: Mapping[str, int],
    rounds: int,
    order: random.Random,
    tick: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[Times]], dict[str, Exception]]:
    """Every subject has a turn in every round, in an order that is drawn anew for each round.

    So whatever the machine does meanwhile meets all of them alike, and nobody always finds the
    caches as the same other one has left them. Returns each one's time in each round, and who
    raised what: it has no times.
    """
    times: dict[str, list[Times]] = {name: [] for name in subjects}
    raised: dict[str, Exception] = {}
    for _ in range(rounds):
        names = list(times)
        order.shuffle(names)
        for name in names:
            try:
                times[name].append(turn(subjects[name], passes[name]))
            except Exception as error:
                raised[name] = error
                del times[name]
        tick()
    return times, raised
