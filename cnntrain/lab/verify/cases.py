"""Layers to check a convolution on: a grid, corners, random ones, large ones."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields

Pair = tuple[int, int]  # (height, width)
OneOrTwo = int | Pair


@dataclass(frozen=True, repr=False)
class Case:
    """A layer as ``nn.Conv2d`` is constructed, and the size of the input that it is given.

    What follows from the options (padding at each side, output size) is worked out here and not
    taken from ``cnntrain.conv``: that is part of what is checked.
    """

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
        own = {f.name: getattr(self, f.name) for f in fields(self)[4:]}
        return {f.name: own[f.name] for f in fields(self)[4:] if own[f.name] != f.default}

    def __repr__(self) -> str:
        positions = (*(getattr(self, f.name) for f in fields(self)[:4]),)
        options = [f"{key}={value!r}" for key, value in self.options().items()]
        return f"Case({', '.join([*map(repr, positions), *options])})"

    @property
    def elements(self) -> int:
        """Numbers in input and weight."""
        return math.prod(self.input_shape) + math.prod(self.weight_shape)

    def call(self, name: str) -> str:
        """The layer and its input, as one would type them to see it oneself."""
        options = "".join(f", {key}={value!r}" for key, value in self.options().items())
        layer = f"{name}({self.in_channels}, {self.out_channels}, {self.kernel_size}{options})"
        return f"{layer} on {self.input_shape}"

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
    def reach(self) -> Pair:
        """Height and width of the window, the gaps of the dilation included."""
        (kh, kw), (dh, dw) = pair(self.kernel_size), pair(self.dilation)
        return dh * (kh - 1) + 1, dw * (kw - 1) + 1

    @property
    def pads(self) -> tuple[Pair, Pair]:
        """Pixels added (above, below), (left, right). 'same' has the odd one below and right."""
        if self.padding == "same":
            down, right = (reach - 1 for reach in self.reach)
            return (down // 2, (down + 1) // 2), (right // 2, (right + 1) // 2)
        vertical, horizontal = (0, 0) if isinstance(self.padding, str) else pair(self.padding)
        return (vertical, vertical), (horizontal, horizontal)

    @property
    def output_size(self) -> Pair:
        """How many windows fit one below, and one beside the other."""
        down, right = (
            len(range(0, size + sum(pads) - reach + 1, step))
            for size, pads, reach, step in zip(
                self.size[-2:], self.pads, self.reach, pair(self.stride), strict=True
            )
        )
        return down, right

    @property
    def valid(self) -> bool:
        """Whether nn.Conv2d takes it: a window fits, and each padding mode has enough pixels."""
        if self.padding == "same" and pair(self.stride) != (1, 1):
            return False
        most = {"reflect": -1, "circular": 0}.get(self.padding_mode)
        within = most is None or all(
            max(pads) <= size + most for size, pads in zip(self.size[-2:], self.pads, strict=True)
        )
        return within and min(self.output_size) > 0


def pair(value: OneOrTwo) -> Pair:
    return (value, value) if isinstance(value, int) else value


STRIDES: list[OneOrTwo] = [1, 2, (2, 1), (1, 3)]
PADDINGS: list[OneOrTwo | str] = [0, 1, (2, 1), (0, 1), "valid", "same"]
DILATIONS: list[OneOrTwo] = [1, 2, (2, 1), (1, 3)]
MODES = ["zeros", "reflect", "replicate", "circular"]
CHANNELS = [(1, 3, 2), (2, 4, 6), (4, 4, 4), (2, 2, 6)]  # groups, in, out: the last two depthwise
KERNELS: list[OneOrTwo] = [3, (2, 3), (3, 2), 1, (1, 3), 2, (3, 1)]


SHORT_GRIDS = 0, 26  # where two short grids begin that together have all pairs of values


def grid(short_from: int | None = None) -> list[Case]:
    """stride x padding x mode x dilation x groups x bias x unbatched; kernel and size go round.

    A short grid is every 43rd, from some case on. 43 has no factor in common with an axis's length:
    with one, a short grid would see some values only together, or not at all.
    """
    product = itertools.product(
        STRIDES, PADDINGS, MODES, DILATIONS, CHANNELS, [True, False], [True, False]
    )
    kernels, sizes = itertools.cycle(KERNELS), itertools.cycle([(7, 8), (8, 7), (7, 7)])
    cases = []
    for (stride, padding, mode, dilation, channels, bias, unbatched), kernel, size in zip(
        product, kernels, sizes, strict=False
    ):
        groups, c, o = channels
        case = Case(
            c, o, kernel, size if unbatched else (2, *size),
            stride, padding, dilation, groups, bias, mode,
        )  # fmt: skip
        if case.valid:
            cases.append(case)
    return cases if short_from is None else cases[short_from::43]


def corners() -> list[Case]:
    """Where one option meets another's limit."""
    cases = [
        Case(1, 1, 1, (1, 1, 1)),
        Case(3, 4, 1, (2, 5, 6)),
        Case(3, 4, 1, (2, 5, 6), stride=2),
        Case(4, 6, 1, (3, 5, 6), stride=(3, 2), groups=2),
        Case(3, 4, 1, (2, 5, 6), padding=(1, 2), dilation=3),
        Case(3, 2, (4, 5), (2, 4, 5)),  # the kernel is as large as the input
        Case(3, 2, (4, 5), (4, 5), bias=False),
        Case(3, 2, (5, 7), (2, 3, 4), padding=(1, 2)),  # larger, and fits by the padding
        Case(2, 3, 3, (2, 1, 1), padding=1),
        Case(2, 3, 3, (2, 2, 1), padding=(2, 3), stride=2),
        Case(2, 3, (1, 3), (2, 1, 9)),
        Case(2, 3, (3, 1), (2, 9, 1)),
        Case(2, 3, 2, (2, 8, 8), stride=3),  # rows and columns that no window covers
        Case(2, 3, 2, (2, 9, 10), stride=(4, 5)),
        Case(2, 3, 3, (2, 8, 9), stride=2),
        Case(2, 3, 3, (2, 7, 10), stride=(4, 3), padding=1),
        Case(2, 3, 3, (2, 4, 4), stride=9),
        Case(2, 3, 3, (2, 3, 1), padding=(3, 4)),  # windows that see nothing but padding
        Case(2, 3, 3, (1, 6, 6), padding=1),
        Case(1, 5, 3, (3, 6, 6), padding=1),
        Case(5, 1, 3, (3, 6, 6), padding=1),
        Case(2, 2, (7, 6), (2, 5, 6), padding=3),
        Case(1, 2, 11, (1, 6, 7), padding=5, bias=False),
        Case(2, 3, (2, 3), (2, 9, 14), dilation=(7, 6)),
        Case(2, 3, 5, (2, 6, 7), padding=2),
        Case(6, 6, 3, (2, 6, 7), groups=3, padding=1),
        Case(5, 15, 3, (2, 6, 7), groups=5, padding=1, stride=2),
        Case(6, 4, (2, 3), (3, 6, 7), groups=2, dilation=(2, 1)),
        Case(9, 3, (3, 2), (1, 6, 7), groups=3, stride=(1, 2)),
        Case(7, 5, 3, (5, 6, 5)),
    ]
    even: list[tuple[OneOrTwo, OneOrTwo]] = [
        (2, 1), (4, 1), ((2, 3), (3, 1)), ((3, 4), (1, 3)), ((4, 2), 1),
    ]  # fmt: skip
    for kernel, dilation in even:
        cases += [Case(2, 3, kernel, (2, 6, 7), 1, "same", dilation, 1, True, m) for m in MODES]
    for mode, pixels in [("reflect", (4, 5)), ("circular", (5, 6)), ("replicate", (8, 9))]:
        cases += [Case(2, 3, (3, 2), (2, 5, 6), (2, 1), pixels, 1, 1, True, mode)]
    return cases


def random_cases(seed: int, count: int) -> Iterator[Case]:
    """Everything at random, the two directions apart, batches and channels that no 2 divides."""
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


def sizes(short: bool) -> list[Case]:
    """Sizes at which implementations take another path, mostly one at a time: powers of two, those
    next to them, many groups, large kernels, more columns than 64 MiB. Of the short form, the
    commonest of each."""
    step = 1 if not short else 3
    batches = [n + i for n in (16, 32, 64, 128) for i in (0, -1, 1)]
    sides = [n + i for n in (128, 64, 129, 256, 32) for i in (0, -1, 1)]
    channels = [n + i for n in (64, 128, 256, 32) for i in (0, -1, 1)]
    cases = [
        *(Case(2, 3, 3, (n, 5, 6), padding=1) for n in batches),
        *(Case(3, 4, 1, (n, 3, 4)) for n in batches[::step]),
        *(Case(4, 4, 3, (n, 5, 4), groups=4) for n in batches[::step]),
        *(Case(4, 6, (2, 3), (n, 5, 4), stride=2, groups=2) for n in batches[::step]),
        *(Case(1, 2, 3, (1, n, n + 1), padding=1) for n in sides[::step]),
        *(Case(2, 2, 3, (1, 5, n), stride=2) for n in sides),
        *(Case(2, 2, (3, 2), (1, n, 5), dilation=2) for n in sides),
        *(Case(2, 2, 3, (1, n, 6), padding=1, groups=2) for n in sides[::step]),
        *(Case(n, 3, 3, (2, 4, 5), padding=1) for n in channels),
        *(Case(3, n, 3, (2, 4, 5), stride=2) for n in channels),
        *(Case(n, n, 1, (2, 4, 4)) for n in channels[::step]),
        *(Case(n, n, 3, (1, 4, 4), padding=1) for n in channels[::step]),
        *(Case(n, n, 3, (2, 4, 4), padding=1, groups=n) for n in channels[::step]),
        *(Case(2, 3, k, (2, k + 4, k + 5)) for k in range(6, 17)),
        *(Case(1, 2, (k, 18 - k), (2, 20, 23), 2, k // 2) for k in range(7, 17, 1 + short)),
        *(Case(2 * n, 4 * n, 3, (2, 5, 5), padding=1, groups=n) for n in (6, 8, 12, 16)),
        *(Case(3 * n, 2 * n, (2, 3), (2, 5, 5), stride=2, groups=n) for n in (5, 7, 9, 16)),
        *(Case(n, m * n, 3, (3, 5, 6), padding=1, groups=n) for n in (3, 8, 32) for m in (2, 3)),
        Case(2, 2, 11, (3, 166, 165)),
        Case(40, 36, 3, (2, 5, 6), padding=1),
        Case(131, 130, 3, (1, 4, 4), padding=1),
        Case(131, 66, 1, (2, 4, 5), stride=2),
        Case(130, 130, 3, (2, 5, 4), groups=130, padding=1),
        Case(66, 132, 3, (2, 5, 4), groups=66, stride=2),
        Case(6, 6, 3, (70, 6, 7), groups=2, stride=2),
        Case(3, 4, 3, (131, 6, 5), padding=1),
        Case(2, 3, 3, (1, 300, 3), padding=1),
        Case(2, 3, 3, (1, 3, 300), padding=1),
        Case(70, 3, (3, 2), (2, 5, 6), stride=(1, 2)),
        Case(3, 70, (2, 3), (2, 5, 6), stride=(2, 1)),
        Case(300, 4, 3, (2, 4, 5), padding=1),
        Case(4, 300, 3, (2, 4, 5), padding=1),
        Case(72, 48, 3, (2, 5, 5), groups=4, dilation=2, padding=2),
        Case(8, 8, 3, (66, 16, 16), padding=1),
        Case(2, 3, (3, 2), (300, 4, 5)),
        Case(2, 3, 3, (1, 5, 301), stride=(1, 2), dilation=2, padding=2),
        Case(1, 2, 5, (2, 67, 66), padding=2, stride=2),
        Case(1, 2, 3, (1, 40, 41), padding="same", padding_mode="circular"),
        Case(2, 2, 3, (1, 70, 9), padding=1, padding_mode="reflect"),
        Case(2, 2, (9, 31), (2, 40, 34)),
    ]
    if not short:
        cases += [
            Case(16, 2, 3, (8, 124, 128)),
            Case(3, 8, 7, (2, 224, 225), stride=2, padding=3),
            Case(64, 64, 3, (3, 33, 31), padding=1),
            Case(16, 24, 3, (260, 15, 16), padding=1, groups=4),
            Case(2, 2, 3, (1, 225, 223), padding="same"),
            Case(1025, 9, 3, (2, 5, 5), padding=1),
            Case(9, 1025, 3, (2, 5, 5), padding=1),
            Case(513, 513, 3, (2, 5, 4), groups=513, padding=1),
            Case(3, 6, 5, (1025, 9, 8), stride=2, padding=1),
            Case(1, 2, 3, (1, 1030, 6), padding=(1, 0)),
            Case(1, 2, 3, (1, 6, 1030), dilation=(1, 3)),
            Case(256, 64, 1, (5, 16, 16)),
            Case(256, 256, 3, (2, 7, 7), padding=1),
            Case(64, 64, 3, (32, 14, 14), padding=1),
            Case(3, 4, 7, (16, 112, 113), stride=2, padding=3),
            Case(8, 6, 5, (64, 40, 41), groups=2, padding=2),
            Case(16, 16, 3, (128, 16, 16), padding=1, groups=16),
        ]
    return cases


def layers(short: bool) -> list[Case]:
    """Layers for rounding errors: as in known networks, and with sums so long that adding them in a
    half type shows. Every pixel lies under some window."""
    cases = [
        Case(1, 6, 5, (16, 28, 28), padding=2),  # lenet5
        Case(6, 16, 5, (8, 14, 14)),
        Case(16, 32, 3, (4, 9, 9), padding=1, bias=False),
        Case(64, 64, 3, (2, 6, 6), padding=1),
        Case(16, 12, 1, (1, 64, 64), bias=False),
        Case(8, 8, 3, (24, 14, 14), padding=1, groups=8),
        Case(32, 64, 3, (2, 9, 9), stride=2, padding=1, bias=False),
        Case(256, 6, 3, (2, 6, 6), padding=1, bias=False),
        Case(6, 256, 3, (2, 6, 6), padding=2, dilation=2, bias=False),
        Case(96, 128, 3, (2, 6, 6), padding=1, groups=2, bias=False),
        Case(3, 3, (12, 15), (2, 20, 24), padding=(0, 4), groups=3, bias=False),
    ]
    if not short:
        cases += [
            Case(1, 6, 5, (128, 28, 28), padding=2, bias=False),
            Case(3, 64, 7, (2, 63, 63), stride=2, padding=3),
            Case(32, 32, 3, (4, 32, 32), padding=1),
            Case(512, 64, 3, (1, 7, 7), padding=1),
            Case(16, 16, 3, (32, 28, 28), padding=1, groups=16, bias=False),
            Case(48, 96, 7, (2, 14, 14), padding=3, groups=48),
            Case(96, 192, 2, (2, 14, 14), stride=2),
        ]
    return cases
