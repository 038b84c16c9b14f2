"""FashionMNIST with four tiny files in the real ones' place, and sources to get them from."""

import gzip
import hashlib
import os
import socket
from pathlib import Path

import numpy as np
from idx_files import idx_bytes

from cnntrain.data import FashionMNIST, cache, fashion_mnist
from cnntrain.data.idx import IdxFile
from cnntrain.data.sources import Source, SourceError

TRAIN, TEST = 30, 10
NAMES = [file.name for pair in fashion_mnist.FILES.values() for file in pair]


def tiny() -> dict[str, bytes]:
    """Name -> content, shaped like the real files but for the number of images."""
    random = np.random.default_rng(0)
    contents = []
    for count in (TRAIN, TEST):
        contents.append(idx_bytes(random.integers(0, 256, (count, 28, 28), dtype=np.uint8)))
        contents.append(idx_bytes((np.arange(count) % 10).astype(np.uint8)))
    return dict(zip(NAMES, contents, strict=True))


REAL = tiny()


def use_tiny(patch, contents: dict[str, bytes] = REAL) -> None:
    """Makes these the known files, whatever they hold."""
    files = [IdxFile(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in contents.items()]
    table = {"train": tuple(files[:2]), "test": tuple(files[2:])}
    patch.setattr(fashion_mnist, "FILES", table)
    patch.setattr(FashionMNIST, "train_size", TRAIN)


def write(folder: Path, contents: dict[str, bytes] = REAL, packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(data) if packed else data)
    return folder


class Calls:
    """Sources that count their openings: each a folder, or the reason why there is none."""

    def __init__(self, patch, **given: Path | str) -> None:
        self.opened: list[str] = []
        patch.setattr(cache, "SOURCES", [self.source(*item) for item in given.items()])

    def source(self, name: str, given: Path | str) -> Source:
        def get(scratch: Path) -> Path:
            assert list(scratch.iterdir()) == []
            self.opened.append(name)
            if isinstance(given, str):
                raise SourceError(given)
            return given

        return Source(name, get)


def data(root: Path) -> FashionMNIST:
    return FashionMNIST(root=str(root), val_size=5)


def is_complete(root: Path) -> bool:
    return {name: (root / name).read_bytes() for name in NAMES} == REAL


def a_folder(path: Path) -> None:
    (path / "with a file").mkdir(parents=True)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def a_huge_file(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**42)  # 4 TiB, none of them on the disk


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)
