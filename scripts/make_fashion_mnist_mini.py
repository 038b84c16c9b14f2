"""Makes the small set in cnntrain/data/fashion_mnist_mini from the real FashionMNIST.

    python scripts/make_fashion_mnist_mini.py FOLDER

FOLDER holds the four real files, plain or gzipped: data.root of an earlier run, or what Debian's
package dataset-fashion-mnist installs. The first 500 (test: 100) images of each class in a seeded
order, kept in the real set's order. Prints the lines of MINI_FILES in
cnntrain/data/fashion_mnist.py.
"""

import argparse
import gzip
import hashlib
from pathlib import Path

import numpy as np

from cnntrain.data.fashion_mnist import FILES, MINI_FOLDER
from cnntrain.data.idx import IdxFile, parse_idx, read_bytes

SEED = 0
PER_CLASS = {"train": 500, "test": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the four real files")
    parser.add_argument("--out", type=Path, default=MINI_FOLDER, help="folder to write")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split, per_class in PER_CLASS.items():
        images, labels = (parse_idx(real(options.folder, file), file.name) for file in FILES[split])
        chosen = draw(labels, per_class)
        print(f'    "{split}": (')
        for file, values in zip(FILES[split], (images[chosen], labels[chosen]), strict=True):
            data = idx(values)
            # No time and no name inside: the same bytes whenever and wherever it is made.
            with (
                (options.out / f"{file.name}.gz").open("wb") as stream,
                gzip.GzipFile("", "wb", 9, stream, mtime=0) as packed,
            ):
                packed.write(data)
            digest = hashlib.sha256(data).hexdigest()
            print(f'        IdxFile("{file.name}", {len(data):_}, "{digest}"),')
        print("    ),")


def real(folder: Path, file: IdxFile) -> bytes:
    """A real file's content, checked."""
    plain = folder / file.name
    path = plain if plain.exists() else folder / f"{file.name}.gz"
    data = read_bytes(path)
    if problem := file.difference(data):
        raise SystemExit(f"{path}: {problem}")
    return data


def draw(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Indices of `per_class` samples of each class, ascending."""
    # Raw numbers because NumPy promises them for good, as it does not its shuffles.
    order = np.argsort(np.random.PCG64(SEED).random_raw(len(labels)), kind="stable")
    parts = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(parts))


def idx(values: np.ndarray) -> bytes:
    """uint8 values as an idx file."""
    sizes = np.array(values.shape, ">u4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


if __name__ == "__main__":
    main()
