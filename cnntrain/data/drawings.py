"""Drawings small enough to follow every number of a network by hand."""

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import PositiveInt

from cnntrain.data.images import ImageData


class Drawings(ImageData):
    """A few drawings, `#` white and `.` black, that are trained on, validated and tested alike.

    They show how a network learns, not how it generalises. Pixels come as 0 and 1, not shifted.
    The options are those of `ImageData`, but for what chooses the images to validate with.
    """

    mean = (0.0,)
    std = (1.0,)
    drawings: ClassVar[tuple[tuple[int, str], ...]]  # of each its label, and its rows

    def __init__(self, *, batch_size: PositiveInt = 1, **options: Any) -> None:
        own = {"val_size": len(self.drawings), "split_seed": 0}  # given once more, they are refused
        super().__init__(batch_size=batch_size, **own, **options)

    def read(self, split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
        images = np.stack([_pixels(rows) for _, rows in self.drawings])  # (N, 1, H, W)
        labels = np.array([label for label, _ in self.drawings])
        if split == "train":  # once to train on, once to validate with
            images, labels = np.concatenate([images, images]), np.concatenate([labels, labels])
        return images, labels

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
    """The digit one as four vertical bars, each in another place, and a two, 10x10."""

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


def _pixels(rows: str) -> np.ndarray:
    """uint8 (1, H, W)."""
    return np.array([[[255 * (pixel == "#") for pixel in row] for row in rows.split()]], np.uint8)
