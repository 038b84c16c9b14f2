"""Result of a lesson (text and picture), and layout of matrices as text and as pictures."""

import html
import io
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from cnntrain.terminal import png_html

INK, LIGHT, GREY, MARK = "#333333", "#bbbbbb", "#cccccc", "#E69F00"
CELL = 0.36  # inches
Cells = Collection[tuple[int, int]]  # (row, column)


@dataclass(frozen=True)
class Lesson:
    """Text for the terminal, and a function that draws the picture; a notebook shows both."""

    text: str
    draw: Callable[[], Figure]

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        file = io.BytesIO()
        self.draw().savefig(file, format="png", dpi=110)
        return f"<pre>{html.escape(self.text)}</pre>{png_html(file.getvalue())}"

    def write(self, file: str | os.PathLike[str]) -> None:
        """Write the picture as PNG."""
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        self.draw().savefig(file, dpi=110)


def matrix_lines(
    rows: Sequence[Sequence[float]], marked: Cells | None = None, width: int = 0
) -> list[str]:
    """A matrix as lines of text, in columns of at least `width` characters.

    With `marked`, these cells are in brackets and all others leave room for them.
    """
    cells = [[short_number(number) for number in row] for row in rows]
    width = max(width, *(len(cell) for row in cells for cell in row))
    if marked is None:
        return [" ".join(cell.rjust(width) for cell in row) for row in cells]
    return [
        "".join(f"[{c:>{width}}]" if (y, x) in marked else f" {c:>{width}} "
                for x, c in enumerate(row))
        for y, row in enumerate(cells)
    ]  # fmt: skip


def side_by_side(blocks: Sequence[list[str]], signs: Sequence[str]) -> list[str]:
    """Blocks of lines from left to right, centred vertically, with a sign between each two."""
    height = max(map(len, blocks))
    padded = []
    for block in blocks:
        empty, above = [" " * len(block[0])], (height - len(block)) // 2
        padded.append(empty * above + block + empty * (height - len(block) - above))
    lines = []
    for i, row in enumerate(zip(*padded, strict=True)):
        line = row[0]
        for sign, part in zip(signs, row[1:], strict=True):
            line += (sign if i == height // 2 else " " * len(sign)) + part
        lines.append(line.rstrip())
    return lines


def short_number(number: float) -> str:
    """3 instead of 3.0; else two decimals."""
    return str(int(number)) if number == int(number) else f"{number:.2f}"


def plot_matrix(
    axes: Axes, values: Sequence[Sequence[float]], title: str, largest: float = 0
) -> None:
    """A matrix as coloured cells with its numbers, red above zero and blue below.

    `largest` is the value of the darkest colour; 0: the largest absolute value.
    """
    largest = largest or max(abs(v) for row in values for v in row) or 1
    axes.imshow(values, cmap="RdBu_r", vmin=-1.6 * largest, vmax=1.6 * largest)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            text = short_number(value)
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xticks([x - 0.5 for x in range(len(values[0]) + 1)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(len(values) + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    axes.spines[:].set_visible(False)


@dataclass(frozen=True)
class Block:
    """A matrix on a sheet."""

    rows: list[list[float]]
    title: str
    marked: Cells  # with a frame
    inside: Cells | None  # all others are grey; None: no cell is

    @property
    def size(self) -> tuple[float, float]:
        """(height, width) in cells, with the title."""
        return len(self.rows) + 1.4, max(len(self.rows[0]), 0.21 * len(self.title))


@dataclass
class Sheet:
    """Matrices in cells of one size, in lines of at most `max_width` cells."""

    max_width: float
    lines: list[list[Block | str]] = field(default_factory=lambda: [[]])

    def add(
        self, values: Tensor, title: str, marked: Cells = (), inside: Cells | None = None
    ) -> None:
        """A matrix (H, W), red above zero and blue below; cells that are not `inside` are grey."""
        block = Block(values.tolist(), title, marked, inside)
        if self.lines[-1] and _width(self.lines[-1]) + block.size[1] > self.max_width:
            self.new_line()
        self.lines[-1].append(block)

    def add_sign(self, sign: str) -> None:
        self.lines[-1].append(sign)

    def new_line(self) -> None:
        if self.lines[-1]:
            self.lines.append([])

    def figure(self, title: str) -> Figure:
        heights = [max(b.size[0] for b in line if isinstance(b, Block)) for line in self.lines]
        top = 0.7 * (title.count("\n") + 1) + 0.6
        width, height = max(map(_width, self.lines)), top + sum(heights) + 0.3
        figure = Figure(figsize=(width * CELL, height * CELL))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_axis_off()
        axes.text(0.5, 0.3, title, va="top", fontsize=10, color=INK)
        for line, line_height in zip(self.lines, heights, strict=True):
            left, middle = 0.5, top + line_height / 2
            for block in line:
                if isinstance(block, str):
                    axes.text(left + 0.1, middle, block, va="center", ha="center", fontsize=15)
                    left += 1.0
                    continue
                y = middle - block.size[0] / 2
                axes.text(left, y + 0.9, block.title, fontsize=9, color=INK)
                _draw_cells(axes, block, left, y + 1.2)
                left += block.size[1] + 1.0
            top += line_height
        return figure


def _draw_cells(axes: Axes, block: Block, left: float, top: float) -> None:
    largest = max(abs(v) for row in block.rows for v in row) or 1
    for y, row in enumerate(block.rows):
        for x, value in enumerate(row):
            outside = block.inside is not None and (y, x) not in block.inside
            colour = GREY if outside else colormaps["RdBu_r"](0.5 + 0.3 * value / largest)
            corner = (left + x, top + y)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white"))
            text = short_number(value)
            axes.text(corner[0] + 0.5, corner[1] + 0.5, text, ha="center", va="center",
                      fontsize=9 if len(text) < 4 else 7, color=INK)  # fmt: skip
    for y, x in block.marked:
        axes.add_patch(Rectangle((left + x + 0.04, top + y + 0.04), 0.92, 0.92, fill=False,
                                 edgecolor=MARK, linewidth=2.2))  # fmt: skip


def _width(line: list[Block | str]) -> float:
    return 0.5 + sum(1.0 if isinstance(block, str) else block.size[1] + 1.0 for block in line)
