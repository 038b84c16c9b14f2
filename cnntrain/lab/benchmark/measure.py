"""One layer, at one batch size, in one dtype: what every contender takes and how wrong it is."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cnntrain.config.errors import first_line
from cnntrain.lab.benchmark.contenders import MakeConv
from cnntrain.lab.benchmark.layers import Layer
from cnntrain.lab.benchmark.memory import Memory, measure_memory
from cnntrain.lab.benchmark.timing import Subject, Times, passes_needed, take_turns

SLICE = 16  # images of which the float64 reference has the columns at a time


@dataclass(frozen=True)
class Case:
    """A layer of a set, with the batch and the dtype that it is timed with."""

    set: str
    layer: Layer
    batch_size: int
    dtype: str


@dataclass(frozen=True)
class How:
    """What is the same for all cases of a run; as in `benchmark`."""

    device: str
    memory_format: str
    backward: bool
    rounds: int
    min_turn_ms: float
    seed: int


@dataclass(frozen=True)
class Measured:
    """What a contender took for a case: nothing but `problem` if it raised."""

    times: Sequence[Times] = ()  # of a pass, for each round
    totals: Sequence[float] = ()  # seconds, for each round; none if the backward is missing
    passes: int | None = None  # in a turn
    memory: Memory | None = None
    output_error: float | None = None
    gradient_error: float | None = None  # the largest of the input's, the weight's and the bias's
    problem: str = ""


def measure(
    case: Case,
    makers: Mapping[str, MakeConv],
    how: How,
    order: random.Random,
    tick: Callable[[], None],
) -> dict[str, Measured]:
    """Try every contender once, then have those that did not raise take turns."""
    torch.default_generator.manual_seed(how.seed)
    to = {"device": how.device, "dtype": getattr(torch, case.dtype)}
    conv = nn.Conv2d(**dict(case.layer.options)).to(**to)
    x = _to(torch.randn(case.batch_size, *case.layer.in_shape), how, to)
    g = _to(torch.randn(case.batch_size, *case.layer.out_shape), how, to) if how.backward else None
    expected = _expected(conv, x, g)
    x.requires_grad_(how.backward)

    found: dict[str, Measured] = {}
    subjects: dict[str, Subject] = {}
    for name, make in makers.items():
        try:
            mine = make(**dict(case.layer.options)).to(**to)
            mine.load_state_dict(conv.state_dict())
            mine.to(memory_format=_format(how))
            subjects[name], found[name] = _tried(Subject(mine, x, g), expected, how)
        except Exception as error:
            found[name] = Measured(problem=_reason(error))
    passes = {name: found[name].passes or 1 for name in subjects}
    times, raised = take_turns(subjects, passes, how.rounds, order, tick)
    for name in times:
        whole = (subjects[name].g is not None) == how.backward
        totals = [t.total for t in times[name]] if whole else []
        found[name] = replace(found[name], times=times[name], totals=totals)
    found |= {name: Measured(problem=_reason(error)) for name, error in raised.items()}
    return {name: found[name] for name in makers}


def _tried(subject: Subject, expected: list[Tensor], how: How) -> tuple[Subject, Measured]:
    """What is known of a contender before it takes its turns: also its warm-up."""
    y = subject.forward()
    if y.shape != expected[0].shape:
        raise RuntimeError(f"its output is {list(y.shape)}, not {list(expected[0].shape)}")
    output_error, gradient_error, problem = _error([y], expected[:1]), None, ""
    if subject.g is not None and not y.requires_grad:
        subject, problem = replace(subject, g=None), "forward only: its output has no gradient"
    if subject.g is not None:
        gradient_error = _error(subject.backward(y), expected[1:])
    del y
    memory = measure_memory(subject)
    passes = passes_needed(subject, how.min_turn_ms / 1000)
    return subject, Measured((), (), passes, memory, output_error, gradient_error, problem)


def _expected(conv: nn.Conv2d, x: Tensor, g: Tensor | None) -> list[Tensor]:
    """Output, and gradients of input, weight and bias if g is given, of nn.Conv2d in float64.

    PyTorch's float64 convolution is itself im2col on a CPU: a reference for rounding, no oracle.
    A batch is passed in slices, since there it unrolls all that it is given at once.
    """
    conv = copy.deepcopy(conv).double()
    slices = []
    for part, x_part in enumerate(x.double().split(SLICE)):
        g_part = None if g is None else g.double().split(SLICE)[part]
        subject = Subject(conv, x_part.requires_grad_(g is not None), g_part)
        y = subject.forward()
        slices.append([y.detach(), *(() if g is None else subject.backward(y))])
    joined = list(zip(*slices, strict=True))
    return [*map(torch.cat, joined[:2]), *(sum(parts[1:], parts[0]) for parts in joined[2:])]


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest max|a - b| / max|b|. RuntimeError if a result is not finite."""
    pairs = zip(found, expected, strict=True)
    errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    if not all(map(math.isfinite, errors)):
        raise RuntimeError("its results are not finite")
    return max(errors)


def _to(t: Tensor, how: How, to: dict) -> Tensor:
    return t.to(**to, memory_format=_format(how))


def _format(how: How) -> torch.memory_format:
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return formats[how.memory_format]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
