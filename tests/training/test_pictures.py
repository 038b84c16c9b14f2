"""Pictures: which pixel has which colour."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from cnntrain import pictures


def test_signed_values_become_colours() -> None:
    colours = pictures.signed(torch.tensor([[-2.0, 0.0], [1.0, 2.0]]))
    assert colours.shape == (3, 2, 2)
    assert colours.dtype == torch.uint8
    assert tuple(colours[:, 0, 0].tolist()) == pictures.NEGATIVE
    assert colours[:, 0, 1].tolist() == [255, 255, 255]
    assert tuple(colours[:, 1, 1].tolist()) == pictures.POSITIVE
    half = [(255 + end) / 2 for end in pictures.POSITIVE]
    assert np.abs(np.array(colours[:, 1, 0].tolist()) - half).max() <= 2


def test_zeros_are_white() -> None:
    assert (pictures.signed(torch.zeros(4, 3, 3)) == 255).all()


def test_normalisation_is_inverted() -> None:
    raw = torch.randint(0, 256, (4, 1, 5, 5), generator=torch.Generator().manual_seed(0))
    normalised = (raw / 255 - 0.3) / 0.7
    seen = pictures.pixels(normalised, [0.3], [0.7])
    assert (seen == raw).all()
    assert seen.shape == (4, 3, 5, 5)


def test_captions_are_below_their_tiles() -> None:
    tiles = torch.full((3, 3, 28, 28), 100, dtype=torch.uint8)
    blank = pictures.captioned(tiles, ["", "", ""], columns=2)
    words = pictures.captioned(tiles, ["", "two\nlines", ""], columns=2)
    assert (words == 100).all(-1).sum() == 3 * 84 * 84
    cell_w = words.shape[1] // 2
    ink = (words.max(-1) < 90).nonzero()
    assert (ink[1] >= cell_w).all()  # of the second tile
    assert (ink[0] < words.shape[0] // 2).all()
    assert not (blank.max(-1) < 90).any()


LONG = "".join(map(str, range(70, 170))) + ".png"  # 234 characters, as long as names may be


@pytest.mark.parametrize(
    "name", ["IMG_20240101_123456_edited_copy.jpeg", LONG, "a photo of my boots.png"], ids=len
)
def test_long_captions_are_wrapped(name: str, written: list[str]) -> None:
    tile = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    picture = pictures.captioned(tile, [f"{name}\nBag 5%"])
    assert "".join(written[:-1]).replace(" ", "") == name.replace(" ", "")
    assert written[-1] == "Bag 5%"
    assert picture.shape[1] < 300
    ink = (picture.max(-1) < 90).nonzero()
    assert 0 < ink[1].min() < ink[1].max() < picture.shape[1] - 1  # clear of both edges
    lines = len(written) * pictures.LINE
    assert picture.shape[0] == 84 + lines + 3 * pictures.GAP


def test_heading_wider_than_the_tiles(written: list[str]) -> None:
    heading = "Red is positive, blue negative, white 0; full colour is ±1.5, the same for all."
    for count in (1, 8):
        written.clear()
        tiles = torch.zeros(count, 3, 28, 28, dtype=torch.uint8)
        picture = pictures.captioned(tiles, ["0"] * count, heading=heading)
        assert heading in " ".join(written)
        ink = (picture[:18].max(-1) < 90).nonzero()
        assert 0 < ink[1].min() < ink[1].max() < picture.shape[1] - 1


def test_legend_has_a_constant_length() -> None:
    """So the height of a picture stays the same from epoch to epoch."""
    numbers = [pictures.legend(torch.tensor([-value])) for value in (0.65, 0.646, 0.6)]
    assert len({len(text) for text in numbers}) == 1
    assert "±0.650, " in numbers[0]
    assert "±250, " in pictures.legend(torch.tensor([250.0]))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written into pictures, line by line."""
    lines: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def text(self: Any, place: Any, words: str, *args: Any, **options: Any) -> None:
        lines.append(words)
        draw(self, place, words, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return lines


# What protanopes, deuteranopes and tritanopes see (Machado et al. 2009, severity 1; linear RGB).
BLINDNESS = {
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lightness(colours: np.ndarray, blindness: str) -> np.ndarray:
    """CIE L* of sRGB colours (N, 3), 0 to 255, as such an eye sees them."""
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(BLINDNESS[blindness]).T, 0, 1)
    luminance = seen @ [0.2126, 0.7152, 0.0722]
    low = luminance <= 216 / 24389
    return np.where(low, luminance * 24389 / 27, 116 * np.cbrt(luminance) - 16)


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_of_the_confusion_matrix_for_colour_blind_readers(blindness: str) -> None:
    """Equal steps of the scale are steps of the same sign in lightness, and nearly equal."""
    shares = (np.linspace(0, 1, 11) ** 2).astype(np.float32)
    seen = lightness(pictures._shaded(torch.from_numpy(shares)).numpy().astype(float), blindness)
    steps = -np.diff(seen)
    assert (steps > 3).all()
    assert seen[0] - seen[-1] > 80


def test_confusion_is_darkest_where_it_is_most() -> None:
    counts = torch.tensor([[8, 2], [0, 10]])
    picture = pictures.confusion(counts.nonzero(), counts[counts > 0], ["a", "b"], "test")
    shares = [1, 0, 0.8, 0.2]
    one, none, most, some = pictures._shaded(torch.tensor(shares)).numpy()
    left, top, cell = int(np.argmax((picture[30] == most).all(-1))), 28, 46
    corners = picture[top + 4 :: cell, left + 4 :: cell][:2, :2]  # beside the numbers
    assert (corners == np.array([[most, some], [none, one]])).all()


@pytest.mark.parametrize("classes", [1, 2, 10, 20, 21])
def test_confusion_has_title_scale_and_unit(classes: int, written: list[str]) -> None:
    counts = 3 * torch.eye(classes, dtype=torch.long)
    names = [f"class {i} has a name that is as long as a sentence" for i in range(classes)]
    picture = pictures.confusion(counts.nonzero(), counts[counts > 0], names, "val")
    assert f"Confusion matrix of {3 * classes} validation images" in written
    assert {"true class", "predicted class", "share of the true class"} <= set(written)
    assert {"0 %", "10 %", "100 %"} <= set(written)
    shortened = written.count(f"{names[0][:23]}…")
    assert shortened == (2 if classes <= 20 else 0)
    ink = (picture.max(-1) < 90).nonzero()
    for place, size in zip(ink, picture.shape, strict=False):
        assert 0 < place.min() < place.max() < size - 1  # nothing is cut
    black = (picture == pictures._shaded(torch.tensor([1.0])).numpy()[0]).all(-1)
    assert black.sum() > 20 * classes  # the diagonal is there, of a single class, too


def test_many_classes_have_room() -> None:
    counts = torch.eye(1000, dtype=torch.long)
    counts[7, 3], counts[8] = 1, 0
    picture = pictures.confusion(
        counts.nonzero(), counts[counts > 0], [str(i) for i in range(1000)], "test"
    )
    assert max(picture.shape) < 1150
    cells = picture[28:1028, 24:1024]  # a pixel each
    full, half, none = pictures._shaded(torch.tensor([1.0, 0.5, 0.0])).numpy()
    assert (cells[5, 5] == full).all()
    assert (cells[7, 3] == half).all()
    assert (cells[8] == none).all()  # a class without an image
    assert (cells == none).all(-1).sum() == 1000 * 1000 - 1000


def test_png_is_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(pictures.png(picture)))) == picture).all()
