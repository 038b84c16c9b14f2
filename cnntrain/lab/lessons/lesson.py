"""Result of a lesson (text and picture), and layout of matrices as text and as pictures."""

import html
import io
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cnntrain.terminal import png_html

INK, GREY, MARK = "#333333", "#cccccc", "#E69F00"
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


def matrix_lines(matrix: Any, marked: Cells | None = None) -> list[str]:
    """A matrix as lines of text.

    With `marked`, these cells are in brackets and all others leave room for them.
    """
    cells = [[short_number(number) for number in row] for row in np.asarray(matrix)]
    width = max(len(cell) for row in cells for cell in row)
    if marked is None:
        return [" ".join(cell.rjust(width) for cell in row) for row in cells]
    return [
        "".join(f"[{c:>{width}}]" if (y, x) in marked else f" {c:>{width}} "
                for x, c in enumerate(row))
        for y, row in enumerate(cells)
    ]  # fmt: skip


def side_by_side(*blocks: list[str]) -> list[str]:
    """Blocks of lines from left to right, centred vertically."""
    height = max(map(len, blocks))
    padded = []
    for block in blocks:
        empty, above = [" " * len(block[0])], (height - len(block)) // 2
        padded.append(empty * above + block + empty * (height - len(block) - above))
    return ["".join(row).rstrip() for row in zip(*padded, strict=True)]


def short_number(number: float) -> str:
    """3 instead of 3.0; else two decimals."""
    return str(int(number)) if number == int(number) else f"{number:.2f}"


@dataclass(frozen=True)
class Panel:
    """A matrix of a picture: its marked cells have a frame, its grey ones no colour."""

    values: Any  # (rows, columns), a tensor or an array
    title: str
    marked: Cells = ()
    grey: Cells = ()

    @property
    def width(self) -> float:
        """In cells, with room for the title."""
        return max(self.values.shape[1], 0.21 * len(self.title))

    def draw(self, axes: Axes, largest: float = 0) -> None:
        """Coloured cells with their numbers, red above zero and blue below.

        `largest` is the value of the darkest colour; 0: the largest absolute value.
        """
        values = np.asarray(self.values, float)
        shown: Any = np.ma.array(values)
        for cell in self.grey:
            shown[cell] = np.ma.masked
        limit = 1.6 * (largest or abs(values).max() or 1)
        colours = colormaps["RdBu_r"].with_extremes(bad=GREY)
        axes.imshow(shown, cmap=colours, vmin=-limit, vmax=limit)
        for (y, x), value in np.ndenumerate(values):
            text = short_number(value)
            size = 9 if len(text) < 4 else 7
            axes.text(x, y, text, ha="center", va="center", fontsize=size, color=INK)
        for y, x in self.marked:
            corner = (x - 0.46, y - 0.46)
            frame = Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=MARK, linewidth=2.2)
            axes.add_patch(frame)
        axes.set_title(self.title, loc="left", fontsize=9, color=INK)
        axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(values) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
        axes.spines[:].set_visible(False)


def draw_panels(lines: Sequence[Sequence[Panel | str]], title: str) -> Figure:
    """Panels in cells of one size, in lines from left to right, with signs between them."""
    heights = [max(len(p.values) for p in line if isinstance(p, Panel)) + 1.6 for line in lines]
    widths = [sum(p.width if isinstance(p, Panel) else 0 for p in line) + len(line)
              for line in lines]  # fmt: skip
    top = 0.8 * (title.count("\n") + 1) + 1.2
    width, height = max(widths) + 1, top + sum(heights)
    figure = Figure(figsize=(width * CELL, height * CELL))
    figure.text(0.5 / width, 1 - 0.3 / height, title, va="top", fontsize=10, color=INK)
    for line, line_height in zip(lines, heights, strict=True):
        left, middle = 0.5, top + (line_height - 1.6) / 2
        for panel in line:
            if isinstance(panel, str):
                figure.text((left + 0.1) / width, 1 - middle / height, panel, fontsize=15,
                            ha="center", va="center")  # fmt: skip
                left += 1
                continue
            rows, columns = panel.values.shape
            bottom = 1 - (middle + rows / 2) / height
            panel.draw(figure.add_axes((left / width, bottom, columns / width, rows / height)))
            left += panel.width + 1
        top += line_height
    return figure
