"""Subset of FashionMNIST in cnntrain/data/fashion_mnist_mini, drawn from the original files.

    python scripts/make_fashion_mnist_mini.py FOLDER

FOLDER has the four original files, data.root of an earlier run. The first 500 (test: 100) images of
each class in a seeded order, stored in the original order.
"""

import argparse
import gzip
from pathlib import Path
from typing import Literal

import numpy as np

from cnntrain.data import FashionMNIST
from cnntrain.data.fashion_mnist import MINI_FOLDER, NAMES

SEED = 0
PER_CLASS = {"train": 500, "test": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder with the four original files")
    parser.add_argument("--out", type=Path, default=MINI_FOLDER, help="folder to write")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = FashionMNIST(root=options.folder)
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    for split in splits:
        images, labels = data.read(split)
        chosen = draw(labels, PER_CLASS[split])
        for name, values in zip(NAMES[split], (images[chosen, 0], labels[chosen]), strict=True):
            # Without a time and a name in the header, the bytes are reproducible.
            with (
                (options.out / f"{name}.gz").open("wb") as stream,
                gzip.GzipFile("", "wb", 9, stream, mtime=0) as file,
            ):
                file.write(idx(values))


def draw(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Indices of `per_class` samples of each class, ascending."""
    # Raw numbers: NumPy guarantees them for all versions, but not its shuffles.
    order = np.argsort(np.random.PCG64(SEED).random_raw(len(labels)), kind="stable")
    parts = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(parts))


def idx(values: np.ndarray) -> bytes:
    """Content of an IDX file with uint8 values."""
    sizes = np.array(values.shape, ">u4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


if __name__ == "__main__":
    main()
