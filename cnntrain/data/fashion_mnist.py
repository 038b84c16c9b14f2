"""FashionMNIST (Xiao, Rasul, Vollgraf 2017, https://arxiv.org/abs/1708.07747), whole and small."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt

from cnntrain.data.cache import obtain
from cnntrain.data.idx import DataError, IdxFile, parse_idx
from cnntrain.data.images import ImageData

# Images and labels of each set, decompressed.
FILES = {
    "train": (
        IdxFile(
            "train-images-idx3-ubyte",
            47_040_016,
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        IdxFile(
            "train-labels-idx1-ubyte",
            60_008,
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
    ),
    "test": (
        IdxFile(
            "t10k-images-idx3-ubyte",
            7_840_016,
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        IdxFile(
            "t10k-labels-idx1-ubyte",
            10_008,
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
}

# Made by scripts/make_fashion_mnist_mini.py.
MINI_FOLDER = Path(__file__).parent / "fashion_mnist_mini"
MINI_FILES = {
    "train": (
        IdxFile(
            "train-images-idx3-ubyte",
            3_920_016,
            "39ec3d4cf0329486de1715ac60961add0175c9fd1d7fcccb4a5fdfc165ae7afb",
        ),
        IdxFile(
            "train-labels-idx1-ubyte",
            5_008,
            "f29017232782847b2a9ccd77f17e05c81960c9911c9b49be6dc4f601355a7fa1",
        ),
    ),
    "test": (
        IdxFile(
            "t10k-images-idx3-ubyte",
            784_016,
            "d80a67e53cb3b517101bca833cb8ed596b1b0fe4c7a3322c2a8c2f0a4efd55b3",
        ),
        IdxFile(
            "t10k-labels-idx1-ubyte",
            1_008,
            "634ffa6c8b922879b3e66937af19eab2df16a7d6ea6b605955fe8f6c1df3cb10",
        ),
    ),
}


class FashionMNIST(ImageData):
    """70,000 grey pictures of clothes, 28 x 28, ten classes: 60,000 to train, 10,000 to test.

    Args:
        root: Cache folder for the four idx files (55 MB), fetched at the first use; a leading ~
            is the home folder.

    The other options are those of `ImageData`.
    """

    shape = (1, 28, 28)
    classes = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    mean = (0.2860,)
    std = (0.3530,)
    train_size = 60_000

    def __init__(self, *, root: str = "~/.cache/cnntrain/fashion_mnist", **options: Any) -> None:
        super().__init__(**options)
        if not root or "\0" in root:
            raise ValueError(f"data.root={root!r}: name a folder")
        try:
            self.root = Path(root).expanduser().absolute()
        except RuntimeError as error:  # ~ of an unknown user, or of one without a home
            raise ValueError(f"data.root={root}: {error}; write the whole path") from error

    def read(self, split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
        files = [file for pair in FILES.values() for file in pair]
        images, labels = obtain(self.root, files, FILES[split])
        return _arrays(images, labels, self.file_names(split))

    def file_names(self, split: Literal["train", "test"]) -> tuple[str, str]:
        images, labels = FILES[split]
        return str(self.root / images.name), str(self.root / labels.name)


class FashionMNISTMini(ImageData):
    """A tenth of FashionMNIST that comes with cnntrain: 5,000 images to train and 1,000 to test,
    as many of each class, drawn from the real sets. The options are those of `ImageData`."""

    shape = FashionMNIST.shape
    classes = FashionMNIST.classes
    mean = FashionMNIST.mean
    std = FashionMNIST.std
    train_size = 5_000

    def __init__(self, *, val_size: PositiveInt = 500, **options: Any) -> None:
        super().__init__(val_size=val_size, **options)

    def read(self, split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
        names = self.file_names(split)
        contents = []
        for file, name in zip(MINI_FILES[split], names, strict=True):
            try:
                contents.append(file.read(Path(name)))
            except OSError as error:
                problem = f"{name}: {error.strerror}"
                raise DataError(f"FashionMNISTMini: {problem}; install cnntrain again") from error
        return _arrays(contents[0], contents[1], names)

    def file_names(self, split: Literal["train", "test"]) -> tuple[str, str]:
        images, labels = MINI_FILES[split]
        return str(MINI_FOLDER / f"{images.name}.gz"), str(MINI_FOLDER / f"{labels.name}.gz")


def _arrays(images: bytes, labels: bytes, names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, 1, H, W) and (N,)."""
    pixels = parse_idx(images, names[0])  # (N, H, W)
    return pixels[:, None], parse_idx(labels, names[1])
