"""FashionMNIST and its download: cache folder, system folder, torchvision's mirror, Debian package.

Source: Xiao, Rasul and Vollgraf 2017, https://arxiv.org/abs/1708.07747.
"""

import contextlib
import hashlib
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import pooch
from filelock import FileLock
from pydantic import PositiveInt

from cnntrain.atomic import replacing
from cnntrain.data.dataset import DataError, ImageData
from cnntrain.data.idx import parse_idx, read_bytes, read_idx

log = logging.getLogger(__name__)

# Maps a file name and a folder for temporary files to a path, plain or gzipped.
Source = Callable[[str, Path], Path]

LOCK = ".lock"
MINI_FOLDER = Path(__file__).parent / "fashion_mnist_mini"  # scripts/make_fashion_mnist_mini.py
PACKAGE = "dataset-fashion-mnist"  # of Debian
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where that package installs
HTTP_TIMEOUT = 20  # seconds without an answer
PROGRAM_TIMEOUT = 600  # seconds

NAMES = {  # images and labels of each split
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SHA256 = {  # of the decompressed files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SIZES = dict(zip(SHA256, (47_040_016, 60_008, 7_840_016, 10_008), strict=True))  # in bytes


class FashionMNIST(ImageData):
    """70,000 grey images of clothes, 28x28, ten classes: 60,000 to train, 10,000 to test.

    Args:
        root: Cache folder of the four IDX files (55 MB), downloaded at first use; a leading ~ is
            the home folder. Several processes may use it at once; complete, it may be read-only.
        options: See `ImageData`.
    """

    shape = (1, 28, 28)
    classes = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
    mean = (0.2860,)
    std = (0.3530,)
    train_size = 60_000

    def __init__(
        self,
        *,
        root: str = "~/.cache/cnntrain/fashion_mnist",
        val_size: PositiveInt = 5000,
        **options: Any,
    ) -> None:
        super().__init__(val_size=val_size, **options)
        if not root:
            raise ValueError("data.root='': name a folder")
        self.root = Path(os.path.expanduser(root)).absolute()

    def read(self, split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
        log.info("FashionMNIST: cache folder %s", self.root)
        try:
            images, labels = _read_cache(self.root, NAMES[split])
        except DataError as error:
            _download(self.root, error)
            images, labels = _read_cache(self.root, NAMES[split])
        return images[:, None], labels


class FashionMNISTMini(ImageData):
    """A tenth of FashionMNIST, part of the package: 5,000 images to train, 1,000 to test.

    The images are drawn from the original sets, the same number of each class. Options: see
    `ImageData`.
    """

    shape = FashionMNIST.shape
    classes = FashionMNIST.classes
    mean = FashionMNIST.mean
    std = FashionMNIST.std
    train_size = 5_000

    def __init__(self, *, val_size: PositiveInt = 500, **options: Any) -> None:
        super().__init__(val_size=val_size, **options)

    def read(self, split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
        try:
            images, labels = (read_idx(MINI_FOLDER / f"{name}.gz") for name in NAMES[split])
        except DataError as error:
            raise DataError(f"FashionMNISTMini: {error}; reinstall cnntrain") from error
        return images[:, None], labels


def _read_cache(root: Path, names: tuple[str, ...]) -> list[np.ndarray]:
    """Arrays in the cached files `names`; DataError if one is damaged, or any file is missing.

    Of the other files only the size is checked: the test set is not opened before the test.
    """
    for path, size in [(root / name, size) for name, size in SIZES.items()]:
        if not os.path.isfile(path):  # unlike path.is_file(), False where the name is too long
            raise DataError(f"{path}: is missing")
        if (found := path.stat().st_size) != size:
            raise DataError(f"{path}: {found} bytes instead of {size}")
    return [parse_idx(_read_checked(root / name, name), root / name) for name in names]


def _read_checked(path: Path, name: str) -> bytes:
    """Decompressed content of a file; DataError if it is not that of the original file `name`."""
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise DataError(f"{path}: wrong SHA-256 sum")
    return data


def _download(root: Path, reason: DataError) -> None:
    """Fill the cache folder under a lock; processes that waited for the lock find the files."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(prefix="cnntrain-", ignore_cleanup_errors=True)
        with temporary as scratch, FileLock(root / LOCK):
            _fill(root, Path(scratch))
    except OSError as error:
        problem = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise DataError(
            f"FashionMNIST: cannot write the cache folder {root} ({problem or error}), "
            f"but {reason}: choose another folder with data.root=<folder>, or train on "
            "data=fashion_mnist_mini"
        ) from error


def _fill(root: Path, scratch: Path) -> None:
    """Fetch missing and damaged files; DataError names every source that was tried."""
    missing, tried = [], []
    for name in SHA256:
        try:
            _read_checked(root / name, name)
        except DataError as error:
            missing.append(name)
            tried.append(str(error))
    pooch.get_logger().setLevel(logging.WARNING)
    sources = {f"gzipped files in {root}": lambda name, _: root / f"{name}.gz", **SOURCES}
    for source, find in sources.items():
        if not missing:
            break
        log.info("FashionMNIST: trying %s", source)
        for name in missing.copy():
            try:
                data = _read_checked(find(name, scratch), name)
            except (DataError, OSError, ValueError) as error:  # also of requests and of pooch
                tried.append(f"{source}: {shorten(str(error), 200, placeholder=' ...')}")
                break
            path, bad = root / name, root / f"{name}.bad"
            if path.exists():  # kept, as it may belong to another data set
                log.warning("FashionMNIST: %s is not the original; renamed to %s", path, bad.name)
            with replacing(path, keep=bad) as file:
                file.write(data)
            missing.remove(name)
    if missing:
        raise DataError(
            f"FashionMNIST: could not be fetched: put the four files of Debian's package {PACKAGE} "
            f"into data.root=<folder>, or train on data=fashion_mnist_mini ({'; '.join(tried)})"
        )
    log.info("FashionMNIST: %s is complete", root)


def _in_folder(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_file() else folder / f"{name}.gz"


def torchvision_mirror(name: str, scratch: Path) -> Path:
    """File downloaded from the address that torchvision uses."""
    from torchvision.datasets import FashionMNIST as Original

    files = {file: f"md5:{md5}" for file, md5 in Original.resources}
    mirror = pooch.create(scratch, Original.mirrors[0], registry=files, retry_if_failed=1)
    downloader = pooch.HTTPDownloader(timeout=HTTP_TIMEOUT)
    return Path(mirror.fetch(f"{name}.gz", downloader=downloader))


def debian_package(name: str, scratch: Path) -> Path:
    """File of Debian's package, downloaded by apt-get without root rights and unpacked."""
    unpacked = scratch / "unpacked"
    if not unpacked.exists():
        for folder in ("lists/partial", "cache/archives/partial"):
            (scratch / folder).mkdir(parents=True)
        options = (
            *(f"Dir::State::Lists={scratch}/lists", f"Dir::Cache={scratch}/cache"),
            *(f"Acquire::{scheme}::Timeout={HTTP_TIMEOUT}" for scheme in ("http", "https")),
            *("Acquire::Languages=none", "Acquire::Retries=1"),
            "APT::Sandbox::User=root",  # root's apt-get downloads as a user without access here
        )
        apt = ["apt-get", *(part for option in options for part in ("-o", option))]
        with contextlib.suppress(DataError):  # if any repository is unreachable
            _run(scratch, *apt, "update")
        _run(scratch, *apt, "download", PACKAGE)
        package = next(scratch.glob(f"{PACKAGE}*.deb"), PACKAGE)
        _run(scratch, "dpkg-deb", "-x", str(package), str(unpacked))
    return _in_folder(unpacked / SYSTEM_FOLDER.relative_to("/"), name)


def _run(folder: Path, *command: str) -> None:
    """Run a program in `folder`; DataError with its last line if it fails."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    options |= {"stdin": subprocess.DEVNULL, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, cwd=folder, timeout=PROGRAM_TIMEOUT, **options)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{command[0]}: timed out after {PROGRAM_TIMEOUT} s") from error
    if done.returncode:
        last_line = done.stdout.strip().rpartition("\n")[2]
        raise DataError(f"{command[0]}: {last_line or f'exit code {done.returncode}'}")


SOURCES: dict[str, Source] = {
    f"system folder {SYSTEM_FOLDER}": lambda name, _: _in_folder(SYSTEM_FOLDER, name),
    "torchvision's mirror": torchvision_mirror,
    f"apt-get download {PACKAGE}": debian_package,
}
