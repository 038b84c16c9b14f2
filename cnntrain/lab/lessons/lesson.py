"""What a lesson leaves: text, and a picture."""

import html
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cnntrain.notebook import png_html

INK, SOFT = "#333333", "#bbbbbb"


@dataclass(frozen=True)
class Lesson:
    """`text` is for the terminal; `draw` makes the picture that belongs to it.

    A notebook shows both.
    """

    text: str
    draw: Callable[[], Figure]

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        file = io.BytesIO()
        self.draw().savefig(file, format="png", dpi=110)
        return f"<pre>{html.escape(self.text)}</pre>{png_html(file.getvalue())}"

    def write(self, file: str | os.PathLike[str]) -> None:
        """The picture, as PNG."""
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        self.draw().savefig(file, dpi=110)


def matrix(rows: Sequence[Sequence[float]], width: int | None = None) -> list[str]:
    """Numbers in columns, a line a row; `width` is that of a column, by default what it takes."""
    cells = [[plain(number) for number in row] for row in rows]
    width = width or max((len(cell) for row in cells for cell in row), default=1)
    return [" ".join(cell.rjust(width) for cell in row) for row in cells]


def side_by_side(blocks: Sequence[list[str]], signs: Sequence[str]) -> list[str]:
    """Blocks of lines from left to right, each in the middle of the tallest one's height; between
    two of them a sign on its middle line."""
    tall = max(map(len, blocks))
    whole = []
    for block in blocks:
        empty, above = [" " * len(block[0])], (tall - len(block)) // 2
        whole.append(empty * above + block + empty * (tall - len(block) - above))
    lines = []
    for i, row in enumerate(zip(*whole, strict=True)):
        line = row[0]
        for sign, part in zip(signs, row[1:], strict=True):
            line += (sign if i == tall // 2 else " " * len(sign)) + part
        lines.append(line.rstrip())
    return lines


def plain(number: float) -> str:
    """3 and not 3.0; else two decimals."""
    return str(int(number)) if number == int(number) else f"{number:.2f}"


def show_matrix(
    axes: Axes,
    values: Sequence[Sequence[float]],
    title: str,
    *,
    colours: str = "RdBu_r",
    largest: float | None = None,
    texts: bool = True,
    size: float = 9,
) -> None:
    """A matrix as coloured cells, red above zero and blue below, with its numbers in them."""
    biggest = largest or max((abs(v) for row in values for v in row), default=0) or 1
    axes.imshow(values, cmap=colours, vmin=-1.6 * biggest, vmax=1.6 * biggest)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if texts:
                axes.text(x, y, plain(value), ha="center", va="center", fontsize=size, color=INK)
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xticks([x - 0.5 for x in range(len(values[0]) + 1)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(len(values) + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    for side in axes.spines.values():
        side.set_visible(False)
