"""Synthetic drawings, small enough to compute every activation of a network by hand."""

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import PositiveInt

from cnntrain.data.dataset import ImageData


class Drawings(ImageData):
    """A few drawings, `#` white and `.` black: the training, validation and test set at once.

    They show how a network learns, not how it generalises. Pixels are normalised to 0 and 1.
    Options: see `ImageData`, without `val_size` and `split_seed`.
    """

    mean = (0.0,)
    std = (1.0,)
    drawings: ClassVar[tuple[tuple[int, str], ...]]  # label and rows of each

    def __init__(self, *, batch_size: PositiveInt = 1, **options: Any) -> None:
        # A TypeError if given again.
        fixed: dict[str, Any] = {"val_size": len(self.drawings), "split_seed": 0}
        super().__init__(batch_size=batch_size, **fixed, **options)

    def read(self, split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
        labels, rows = zip(*self.drawings, strict=True)
        pixels = [[[255 * (p == "#") for p in row] for row in text.split()] for text in rows]
        images = np.array(pixels, np.uint8)[:, None]  # (N, 1, H, W)
        times = 2 if split == "train" else 1  # once to train on, once to validate with
        return np.concatenate([images] * times), np.array(labels * times)

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        count = len(self.drawings)
        return np.arange(count), np.arange(count, 2 * count)


class TwoSigns(Drawings):
    """A rising line and a ring, 6x6."""

    shape = (1, 6, 6)
    classes = ("line", "ring")
    train_size = 4
    drawings = (
        (0, ".....# ....#. ...#.. ..#... .#.... #....."),
        (1, "...... .####. .#..#. .#..#. .####. ......"),
    )


class Strokes(Drawings):
    """The digit one as a vertical bar at four positions, and a two, 10x10."""

    shape = (1, 10, 10)
    classes = tuple("0123456789")
    train_size = 10
    drawings = (
        *((1, " ".join(["." * column + "#" + "." * (9 - column)] * 10)) for column in (2, 4, 5, 7)),
        (
            2,
            ".......... ..######.. .......#.. .......#.. ..######.. ..#....... ..#....... "
            "..######.. .......... ..........",
        ),
    )
