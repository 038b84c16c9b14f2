"""Matrices side by side on one page, all in cells of the same size."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from cnntrain.lab.lessons.lesson import INK, plain

CELL = 0.36  # inches
MARK = "#E69F00"
GREY = (0.8, 0.8, 0.8)


@dataclass(frozen=True)
class Block:
    """A matrix, or a sign between two."""

    rows: list[list[float]]
    title: str
    marked: Collection[tuple[int, int]]  # (row, column) of cells with a frame
    inside: Collection[tuple[int, int]] | None  # None: no cell is grey

    @property
    def size(self) -> tuple[float, float]:
        """(height, width) in cells, title included; one is as wide as its letters."""
        return len(self.rows) + 1.4, max(len(self.rows[0]), 0.21 * len(self.title))


@dataclass
class Sheet:
    """Blocks from left to right, as many in a line as `across` cells have room for."""

    across: float
    lines: list[list[Block | str]] = field(default_factory=lambda: [[]])

    def put(
        self,
        values: Tensor,
        title: str,
        marked: Collection[tuple[int, int]] = (),
        inside: Collection[tuple[int, int]] | None = None,
    ) -> None:
        """A matrix (H, W), red above zero and blue below; what is not `inside` is grey."""
        block = Block(values.tolist(), title, marked, inside)
        if self.lines[-1] and _width(self.lines[-1]) + block.size[1] > self.across:
            self.line()
        self.lines[-1].append(block)

    def say(self, sign: str) -> None:
        """A sign between what is put before and after it."""
        self.lines[-1].append(sign)

    def line(self) -> None:
        """What comes next stands below."""
        if self.lines[-1]:
            self.lines.append([])

    def figure(self, title: str) -> Figure:
        tall = [
            max(block.size[0] for block in line if isinstance(block, Block)) for line in self.lines
        ]
        head = 0.7 * (title.count("\n") + 1) + 0.6
        width, height = max(map(_width, self.lines)), head + sum(tall) + 0.3
        figure = Figure(figsize=(width * CELL, height * CELL))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_axis_off()
        axes.text(0.5, 0.3, title, va="top", fontsize=10, color=INK)
        top = head
        for line, room in zip(self.lines, tall, strict=True):
            left = 0.5
            for block in line:
                middle = top + room / 2
                if isinstance(block, str):
                    axes.text(left + 0.1, middle, block, va="center", ha="center", fontsize=15)
                    left += 1.0
                    continue
                y = middle - block.size[0] / 2
                axes.text(left, y + 0.9, block.title, fontsize=9, color=INK)
                self._cells(axes, block, left, y + 1.2)
                left += block.size[1] + 1.0
            top += room
        return figure

    def _cells(self, axes: Any, block: Block, left: float, top: float) -> None:
        largest = max((abs(v) for row in block.rows for v in row), default=0) or 1
        colours = colormaps["RdBu_r"]
        for y, row in enumerate(block.rows):
            for x, value in enumerate(row):
                outside = block.inside is not None and (y, x) not in block.inside
                colour = GREY if outside else colours(0.5 + 0.3 * value / largest)
                place = (left + x, top + y)
                axes.add_patch(Rectangle(place, 1, 1, facecolor=colour, edgecolor="white"))
                text, size = plain(value), 9 if len(plain(value)) < 4 else 7
                middle = (place[0] + 0.5, place[1] + 0.5)
                axes.text(*middle, text, ha="center", va="center", fontsize=size, color=INK)
        for y, x in block.marked:
            place = (left + x + 0.04, top + y + 0.04)
            frame = Rectangle(place, 0.92, 0.92, fill=False, edgecolor=MARK, linewidth=2.2)
            axes.add_patch(frame)


def _width(line: list[Block | str]) -> float:
    return 0.5 + sum(1.0 if isinstance(block, str) else block.size[1] + 1.0 for block in line)
