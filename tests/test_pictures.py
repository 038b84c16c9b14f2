"""Pictures: which pixel has which colour."""

import io

import numpy as np
import torch
from PIL import Image

from cnntrain import pictures


def test_numbers_become_colours() -> None:
    colours = pictures.signed(torch.tensor([[-2.0, 0.0], [1.0, 2.0]]))
    assert colours.shape == (3, 2, 2)
    assert colours.dtype == torch.uint8
    assert tuple(colours[:, 0, 0].tolist()) == pictures.NEGATIVE
    assert colours[:, 0, 1].tolist() == [255, 255, 255]
    assert tuple(colours[:, 1, 1].tolist()) == pictures.POSITIVE
    half = [(255 + end) / 2 for end in pictures.POSITIVE]
    assert np.abs(np.array(colours[:, 1, 0].tolist()) - half).max() <= 2


def test_nothing_but_zeros_is_white() -> None:
    assert (pictures.signed(torch.zeros(4, 3, 3)) == 255).all()


def test_a_grid_has_its_tiles_in_reading_order() -> None:
    tiles = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 2, 2)
    picture = pictures.grid(tiles, columns=3, size=4)
    cell = 4 + pictures.GAP
    assert picture.shape == (2 * cell, 3 * cell, 3)
    for i in range(5):
        y, x = i // 3 * cell, i % 3 * cell
        assert (picture[y : y + 4, x : x + 4] == i).all()
    assert (picture[cell:, 2 * cell :] == 255).all()  # where there is none


def test_images_are_seen_as_they_were() -> None:
    raw = torch.randint(0, 256, (4, 1, 5, 5), generator=torch.Generator().manual_seed(0))
    normalised = (raw / 255 - 0.3) / 0.7
    seen = pictures.pixels(normalised, [0.3], [0.7])
    assert (seen == raw).all()
    assert seen.shape == (4, 3, 5, 5)


def test_captions_stand_below_their_tiles() -> None:
    tiles = torch.full((3, 3, 28, 28), 100, dtype=torch.uint8)
    blank = pictures.captioned(tiles, ["", "", ""], columns=2)
    words = pictures.captioned(tiles, ["", "two\nlines", ""], columns=2)
    assert (words == 100).all(-1).sum() == 3 * 84 * 84
    cell_w = words.shape[1] // 2
    ink = (words.max(-1) < 90).nonzero()
    assert (ink[1] >= cell_w).all()  # of the second tile
    assert (ink[0] < words.shape[0] // 2).all()
    assert not (blank.max(-1) < 90).any()


def test_confusion_is_darkest_where_it_is_most() -> None:
    counts = torch.tensor([[8, 2], [0, 10]])
    picture = pictures.confusion(counts, ["a", "b"])
    cell = 46
    left = picture.shape[1] - 2 * cell - 4

    def corner(row: int, column: int) -> list[int]:  # beside the number
        return picture[row * cell + 4, left + column * cell + 4].tolist()

    assert corner(1, 1) == list(pictures.RIGHT)
    assert corner(1, 0) == list(pictures.PAPER)
    assert corner(0, 1)[0] > corner(0, 1)[1]  # reddish
    assert sum(corner(0, 0)) < sum(corner(0, 1))


def test_many_classes_have_room() -> None:
    counts = torch.eye(1000, dtype=torch.long)
    counts[7, 3], counts[8] = 1, 0
    picture = pictures.confusion(counts, [str(i) for i in range(1000)])
    assert max(picture.shape) < 1100
    cells = picture[:1000, 20:1020]  # a pixel each
    assert tuple(cells[5, 5]) == pictures.RIGHT
    assert cells[7, 3, 0] > cells[7, 3, 1]  # reddish
    assert (cells[8] == 255).all()  # a class without an image
    assert (cells == 255).all(-1).sum() == 1000 * 1000 - 1000


def test_png_is_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(pictures.png(picture)))) == picture).all()
