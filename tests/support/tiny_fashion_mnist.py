"""FashionMNIST with four tiny files instead of the original ones, and their sources."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
from idx_files import idx_bytes

from cnntrain.data import DataError, FashionMNIST, fashion_mnist

TRAIN, TEST = 30, 10
NAMES = list(fashion_mnist.SHA256)


def tiny_files() -> dict[str, bytes]:
    """Name -> content, like the original files but for the number of images."""
    random = np.random.default_rng(0)
    contents = []
    for count in (TRAIN, TEST):
        contents.append(idx_bytes(random.integers(0, 256, (count, 28, 28), dtype=np.uint8)))
        contents.append(idx_bytes((np.arange(count) % 10).astype(np.uint8)))
    return dict(zip(NAMES, contents, strict=True))


CONTENTS = tiny_files()


def use_tiny(patch, contents: dict[str, bytes] = CONTENTS) -> None:
    """Make these the known files, whatever their content."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    patch.setattr(fashion_mnist, "SHA256", sums)
    patch.setattr(fashion_mnist, "SIZES", {name: len(data) for name, data in contents.items()})
    patch.setattr(FashionMNIST, "train_size", TRAIN)


def write(folder: Path, contents: dict[str, bytes] = CONTENTS, gzipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        path = folder / (f"{name}.gz" if gzipped else name)
        path.write_bytes(gzip.compress(data) if gzipped else data)
    return folder


class Sources:
    """Replaces the sources, each by a folder or by an error message, and counts their calls."""

    def __init__(self, patch, **sources: Path | str) -> None:
        self.calls: list[str] = []
        table = {name: self._source(name, given) for name, given in sources.items()}
        patch.setattr(fashion_mnist, "SOURCES", table)

    def _source(self, name: str, given: Path | str) -> fashion_mnist.Source:
        def find(file: str, scratch: Path) -> Path:
            self.calls.append(name)
            if isinstance(given, str):
                raise DataError(given)
            return given / file if (given / file).exists() else given / f"{file}.gz"

        return find


def data(root: Path) -> FashionMNIST:
    return FashionMNIST(root=str(root), val_size=5)


def is_complete(root: Path) -> bool:
    return {name: (root / name).read_bytes() for name in NAMES} == CONTENTS
