"""Test cases for convolutions: layer options and input sizes, and the numbers put into them.

Output sizes and padding are computed here, not by ``cnntrain.conv``, which is under test.
"""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Pair = tuple[int, int]  # (height, width)
OneOrTwo = int | Pair
Expected = dict[str, np.ndarray]  # quantity -> expected values; BIAS only for layers with a bias

QUANTITIES = ("output", "input gradient", "weight gradient", "bias gradient")
OUTPUT, INPUT, WEIGHT, BIAS = QUANTITIES


@dataclass(frozen=True, repr=False)
class Case:
    """Constructor arguments of an ``nn.Conv2d``, and the size of its input."""

    in_channels: int
    out_channels: int
    kernel_size: OneOrTwo
    size: tuple[int, ...]  # (N, H, W), or (H, W) for an input without a batch
    stride: OneOrTwo = 1
    padding: OneOrTwo | str = 0
    dilation: OneOrTwo = 1
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"

    def options(self) -> dict:
        """The keyword arguments that differ from nn.Conv2d's defaults."""
        own = {f: getattr(self, f.name) for f in fields(self)[4:]}
        return {f.name: value for f, value in own.items() if value != f.default}

    def __repr__(self) -> str:
        positional = [repr(getattr(self, f.name)) for f in fields(self)[:4]]
        return f"Case({', '.join(positional)}{self._keywords()})"

    def call(self, name: str) -> str:
        """The layer and its input, for the report."""
        positional = f"{self.in_channels}, {self.out_channels}, {self.kernel_size}"
        return f"{name}({positional}{self._keywords()}) on {self.input_shape}"

    def _keywords(self) -> str:
        return "".join(f", {key}={value!r}" for key, value in self.options().items())

    @property
    def elements(self) -> int:
        """Numbers in input and weight."""
        return math.prod(self.input_shape) + math.prod(self.weight_shape)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return *self.size[:-2], self.in_channels, *self.size[-2:]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return *self.size[:-2], self.out_channels, *self.output_size

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *pair(self.kernel_size)

    @property
    def steps(self) -> tuple[Pair, Pair]:
        """Stride and dilation, each (down, right)."""
        return pair(self.stride), pair(self.dilation)

    @property
    def window(self) -> Pair:
        """Height and width of the dilated kernel."""
        (kh, kw), (dh, dw) = pair(self.kernel_size), pair(self.dilation)
        return dh * (kh - 1) + 1, dw * (kw - 1) + 1

    @property
    def pads(self) -> tuple[Pair, Pair]:
        """Pixels added (above, below), (left, right). 'same' has the odd one below and right."""
        if self.padding == "same":
            down, right = (length - 1 for length in self.window)
            return (down // 2, (down + 1) // 2), (right // 2, (right + 1) // 2)
        vertical, horizontal = (0, 0) if isinstance(self.padding, str) else pair(self.padding)
        return (vertical, vertical), (horizontal, horizontal)

    @property
    def output_size(self) -> Pair:
        axes = zip(self.size[-2:], self.pads, self.window, pair(self.stride), strict=True)
        down, right = (len(range(0, n + sum(pads) - k + 1, step)) for n, pads, k, step in axes)
        return down, right

    @property
    def valid(self) -> bool:
        """Whether nn.Conv2d accepts it: a window fits, and each padding mode has enough pixels."""
        if self.padding == "same" and pair(self.stride) != (1, 1):
            return False
        most = {"reflect": -1, "circular": 0}.get(self.padding_mode, math.inf)
        (above, below), (left, right) = self.pads
        room = self.size[-2] - max(above, below), self.size[-1] - max(left, right)
        return min(room) + most >= 0 and min(self.output_size) > 0


def pair(value: OneOrTwo) -> Pair:
    return (value, value) if isinstance(value, int) else value


STRIDES: list[OneOrTwo] = [1, 2, (2, 1), (1, 3)]
PADDINGS: list[OneOrTwo | str] = [0, 1, (2, 1), (0, 1), "valid", "same"]
DILATIONS: list[OneOrTwo] = [1, 2, (2, 1), (1, 3)]
MODES = ["zeros", "reflect", "replicate", "circular"]
CHANNELS = [(1, 3, 2), (2, 4, 6), (4, 4, 4), (2, 2, 6)]  # groups, in, out: the last two depthwise
KERNELS: list[OneOrTwo] = [3, (2, 3), (3, 2), 1, (1, 3), 2, (3, 1)]
LISTED = yaml.safe_load(Path(__file__).with_name("layers.yaml").read_text(encoding="utf-8"))
SHORT_GRIDS = 0, 26  # first cases of two short grids that together have all pairs of values


def grid(short_from: int | None = None) -> list[Case]:
    """stride x padding x mode x dilation x groups x bias x unbatched, with kernels and sizes in
    turn. A short grid is every 43rd case, since 43 has no factor in common with an axis's length.
    """
    lists = STRIDES, PADDINGS, MODES, DILATIONS, CHANNELS, [True, False], [(), (2,)]
    kernels, sizes = itertools.cycle(KERNELS), itertools.cycle([(7, 8), (8, 7), (7, 7)])
    cases = []
    for values, kernel, size in zip(itertools.product(*lists), kernels, sizes, strict=False):
        stride, padding, mode, dilation, (groups, c, o), bias, batch = values
        case = Case(c, o, kernel, (*batch, *size), stride, padding, dilation, groups, bias, mode)
        if case.valid:
            cases.append(case)
    return cases if short_from is None else cases[short_from::43]


def listed(group: str) -> list[Case]:
    """The cases of a group of layers.yaml."""
    cases = []
    for *arguments, options in ([*entry, {}][:5] for entry in LISTED[group]):
        given = {key: _as_tuple(value) for key, value in options.items()}
        cases.append(Case(*map(_as_tuple, arguments), **given))
    return cases


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def corners() -> list[Case]:
    """Limits of the options, and combinations of them."""
    cases = listed("corners")
    even: list[Any] = [(2, 1), (4, 1), ((2, 3), (3, 1)), ((3, 4), (1, 3)), ((4, 2), 1)]
    for kernel, dilation in even:
        cases += [Case(2, 3, kernel, (2, 6, 7), 1, "same", dilation, 1, True, m) for m in MODES]
    for mode, pixels in [("reflect", (4, 5)), ("circular", (5, 6)), ("replicate", (8, 9))]:
        cases += [Case(2, 3, (3, 2), (2, 5, 6), (2, 1), pixels, 1, 1, True, mode)]
    return cases


def grids(part: int, short: bool) -> list[Case]:
    """Corners and grid, divided among two oracles."""
    if short:
        return [*corners()[part::2], *grid(SHORT_GRIDS[part])]
    return [*corners(), *grid()[part::2]]


def random_cases(seed: int, count: int) -> Iterator[Case]:
    """All options at random, height and width independent."""
    draw = random.Random(seed)

    def two(values: list[int]) -> Pair:
        return draw.choice(values), draw.choice(values)

    found = 0
    while found < count:
        groups = draw.choice([1, 1, 1, 2, 3, 4, 5])
        depthwise = draw.random() < 0.2
        c = groups * (1 if depthwise else draw.randint(1, 12 // groups))
        batch = draw.choice([(), *((images,) for images in range(1, 10))])
        paddings: list[OneOrTwo | str] = ["same", "valid", 0, 1, *(two([*range(6)]) for _ in "abc")]
        case = Case(
            in_channels=c,
            out_channels=groups * draw.randint(1, 12 // groups),
            kernel_size=two([1, 2, 3, 3, 4, 5, 7]),
            size=(*batch, draw.randint(1, 16), draw.randint(1, 16)),
            stride=two([1, 1, 2, 3, 4]),
            padding=draw.choice(paddings),
            dilation=two([1, 1, 1, 2, 3, 4]),
            groups=groups,
            bias=draw.random() < 0.7,
            padding_mode=draw.choice(["zeros", "zeros", *MODES]),
        )
        if case.valid:
            found += 1
            yield case


@dataclass(frozen=True, eq=False)  # compared by identity
class Problem:
    """A case with numbers: x, w, b (None: no bias), and g, the gradient of the output."""

    case: Case
    x: np.ndarray
    w: np.ndarray
    b: np.ndarray | None
    g: np.ndarray

    @classmethod
    def normal(cls, case: Case, seed: int) -> Problem:
        """Normally distributed numbers, a function of case and seed."""
        return cls._filled(case, _generator(case, seed).standard_normal)

    @classmethod
    def positive(cls, case: Case, seed: int) -> Problem:
        """Uniform in [0, 1): rounding errors do not cancel."""
        return cls._filled(case, _generator(case, seed).random)

    @classmethod
    def integers(cls, case: Case, seed: int, most: int = 21) -> Problem:
        """Integers from -most to most."""
        draw = _generator(case, seed).integers
        return cls._filled(case, lambda size: draw(-most, most + 1, size).astype(float))

    @classmethod
    @lru_cache(10_000)
    def small(cls, case: Case, seed: int, weights: int) -> Problem:
        """Integers from -2 to 2: no dtype rounds sums of some hundred products. Weight and bias
        depend on their shapes and `weights`, the other numbers on the case and `seed`."""
        draw = np.random.default_rng([weights, *case.weight_shape]).integers
        w, b = (draw(-2, 3, size).astype(float) for size in (case.weight_shape, case.out_channels))
        return replace(cls.integers(case, seed, 2), w=w, b=b if case.bias else None)

    @classmethod
    def wide(cls, case: Case, seed: int, factor: str) -> Problem:
        """Integers from -1 to 1; those of one factor, "x", "w" or "g", from -4095 to 4095."""
        values = getattr(cls.integers(case, seed, 4095), factor)
        return replace(cls.integers(case, seed, 1), **{factor: values})

    @classmethod
    def _filled(cls, case: Case, draw: Callable[[Any], np.ndarray]) -> Problem:
        shapes = (case.input_shape, case.weight_shape, (case.out_channels,), case.output_shape)
        x, w, b, g = map(draw, shapes)
        return cls(case, x, w, b if case.bias else None, g)

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Problem:
        """With a function applied to all numbers."""
        b = None if self.b is None else function(self.b)
        return Problem(self.case, function(self.x), function(self.w), b, function(self.g))


def _generator(case: Case, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(repr(case).encode())])
