"""What a data set's `read` returns is checked against what its class says, wherever it is from."""

import gzip
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import idx_bytes
from tiny_fashion_mnist import NAMES, REAL, data, use_tiny, write

from cnntrain.data import DataError, FashionMNISTMini, ImageData, fashion_mnist
from cnntrain.data.fashion_mnist import MINI_FILES, MINI_FOLDER
from cnntrain.data.idx import read_idx

N, TEST = 12, 5
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 2, 4, 3), dtype=np.uint8)
LABELS = np.arange(N) % 3


class Mine(ImageData):
    """A user's own set, out of arrays."""

    shape = (2, 4, 3)
    classes = ("a", "b", "c")
    mean = std = (0.5, 0.5)
    train_size = N

    def __init__(self, images=IMAGES, labels=LABELS) -> None:
        super().__init__(val_size=3)
        self.given = {"train": (images, labels), "test": (images[:TEST], labels[:TEST])}

    def read(self, split):
        return self.given[split]


def label(index: int, value: float, dtype: type = np.int64) -> np.ndarray:
    labels = LABELS.astype(dtype)
    labels[index] = value
    return labels


def message(set_: ImageData, split: str) -> str:
    with pytest.raises(DataError) as error:
        set_.prepare() if split == "train" else set_.test_loader()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int8, np.uint64, ">i2"])
def test_what_is_right_passes(dtype):
    mine = Mine(labels=LABELS.astype(dtype))
    train, val = mine.split()
    assert mine.train_loader().labels.tolist() == LABELS[train].tolist()
    assert torch.equal(mine.val_loader().stored(), torch.from_numpy(IMAGES[val]))
    assert mine.test_loader().labels.tolist() == LABELS[:TEST].tolist()


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (label(4, 3), "label 3 at index 4 is not one of 3 classes, 0 to 2 (1 of 12 labels are"),
        (label(0, -1), "label -1 at index 0 is not one of 3 classes"),
        (label(11, 255, np.uint8), "label 255 at index 11 is not one of 3 classes"),
        (label(1, 2**63, np.uint64), f"label {2**63} at index 1 is not one of 3 classes"),
        (LABELS + 1, "label 3 at index 2 is not one of 3 classes, 0 to 2 (4 of 12 labels are"),
        (LABELS.astype(float), "labels are float64 (12,) instead of integers (N,)"),
        (LABELS > 1, "labels are bool (12,) instead of integers (N,)"),
        (np.eye(3, dtype=int)[LABELS], "labels are int64 (12, 3) instead of integers (N,)"),
        (LABELS.astype(object), "labels are object (12,) instead of integers (N,)"),
        (LABELS.astype(str), "labels are <U21 (12,) instead of integers (N,)"),
        (LABELS[1:], "11 labels for 12 images"),
        (LABELS[:0], "0 labels for 12 images"),
        (LABELS.tolist(), "a list instead of an array, integers (N,)"),
        (torch.from_numpy(LABELS), "a Tensor instead of an array, integers (N,)"),
    ],
)
def test_wrong_labels(labels, said):
    assert message(Mine(labels=labels), "train").startswith(f"Mine: train labels: {said}")


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (IMAGES[:, :1], "images are uint8 (12, 1, 4, 3) instead of uint8 (N, 2, 4, 3)"),
        (IMAGES[:, :, :3], "images are uint8 (12, 2, 3, 3) instead of uint8 (N, 2, 4, 3)"),
        (IMAGES.swapaxes(2, 3), "images are uint8 (12, 2, 3, 4) instead of uint8 (N, 2, 4, 3)"),
        (IMAGES.reshape(N, -1), "images are uint8 (12, 24) instead of uint8 (N, 2, 4, 3)"),
        (IMAGES / 255, "images are float64 (12, 2, 4, 3) instead of uint8 (N, 2, 4, 3)"),
        (IMAGES.astype(np.int8), "images are int8 (12, 2, 4, 3) instead of uint8"),
        (IMAGES[1:], "11 images instead of 12"),
        (np.concatenate([IMAGES, IMAGES]), "24 images instead of 12"),
        (IMAGES[:0], "0 images instead of 12"),
        (torch.from_numpy(IMAGES), "a Tensor instead of an array, uint8 (N, 2, 4, 3)"),
    ],
)
def test_wrong_images(images, said):
    assert message(Mine(images), "train").startswith(f"Mine: train images: {said}")


def test_the_test_set_is_checked_when_it_is_read():
    mine = Mine()
    mine.given["test"] = (IMAGES, label(7, 5))
    mine.prepare()
    assert message(mine, "test").startswith("Mine: test labels: label 5 at index 7")
    mine.given["test"] = (IMAGES[:, :, :3], LABELS)
    assert message(mine, "test").startswith("Mine: test images: images are uint8 (12, 2, 3, 3)")
    mine.given["test"] = (IMAGES[:0], LABELS[:0])
    assert message(mine, "test") == "Mine: test images: 0 images instead of at least one"


def test_a_set_of_idx_files_names_the_wrong_one(tmp_path):
    class OfFiles(Mine):
        def file_names(self, split):
            return str(tmp_path / f"{split}-images"), str(tmp_path / f"{split}-labels")

        def read(self, split):
            images, labels = map(read_idx, map(Path, self.file_names(split)))
            return images, labels

    for split in ("train", "test"):
        (tmp_path / f"{split}-images").write_bytes(idx_bytes(IMAGES))
        (tmp_path / f"{split}-labels").write_bytes(idx_bytes(LABELS.astype(np.uint8)))
    OfFiles().prepare()
    assert len(OfFiles().test_loader().labels) == N
    for split in ("train", "test"):
        (tmp_path / f"{split}-labels").write_bytes(idx_bytes(label(9, 3, np.uint8)))
        assert message(OfFiles(), split) == (
            f"OfFiles: {tmp_path}/{split}-labels: label 3 at index 9 is not one of 3 classes, "
            "0 to 2 (1 of 12 labels are not)"
        )
        (tmp_path / f"{split}-images").write_bytes(idx_bytes(IMAGES[:, :, :3]))
        assert message(OfFiles(), split) == (
            f"OfFiles: {tmp_path}/{split}-images: images are uint8 (12, 2, 3, 3) "
            "instead of uint8 (N, 2, 4, 3)"
        )


@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_names_its_files(tmp_path, monkeypatch, split):
    images, labels = NAMES[:2] if split == "train" else NAMES[2:]
    n = len(REAL[labels]) - 8
    given = [
        (labels, idx_bytes(np.arange(n, dtype=np.uint8) % 11), "label 10 at index 10 is not"),
        (labels, idx_bytes(np.zeros((n - 1,), np.uint8)), f"{n - 1} labels for {n} images"),
        (images, idx_bytes(np.zeros((n, 28, 27), np.uint8)), f"images are uint8 ({n}, 1, 28, 27)"),
    ]
    if split == "test":
        given[0] = (labels, idx_bytes(np.full(n, 10, np.uint8)), "label 10 at index 0 is not")
    for name, content, said in given:
        use_tiny(monkeypatch, {**REAL, name: content})
        root = write(tmp_path / "cache", {**REAL, name: content})
        assert message(data(root), split).startswith(f"FashionMNIST: {root / name}: {said}")


def test_arrays_that_torch_cannot_share():
    mine = Mine(IMAGES[::-1], LABELS[::-1])
    mine.given["test"] = (IMAGES[::-1], LABELS)
    assert torch.equal(mine.test_loader().images, torch.from_numpy(IMAGES[::-1].copy()))
    frozen = IMAGES.copy()
    frozen.flags.writeable = False
    mine.given["test"] = (frozen, LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(mine.test_loader().images, torch.from_numpy(IMAGES))


def longer(path: Path) -> bytes:
    return gzip.compress(gzip.decompress(path.read_bytes()) + b"x", 1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: path.write_bytes(b""), "0 bytes instead of {size}"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
        (lambda path: path.write_bytes(gzip.compress(bytes(9))), "9 bytes instead of {size}"),
        (lambda path: path.write_bytes(longer(path)), "more than {size} bytes"),
    ],
    ids=["missing", "empty", "fifo", "folder", "other", "longer"],
)
@pytest.mark.parametrize("number", [0, 1])
def test_damaged_mini_set(tmp_path, monkeypatch, number, damage, said):
    shutil.copytree(MINI_FOLDER, tmp_path / "mini")
    monkeypatch.setattr(fashion_mnist, "MINI_FOLDER", tmp_path / "mini")
    for split, ask in [("train", "prepare"), ("test", "test_loader")]:
        file = MINI_FILES[split][number]
        path = tmp_path / "mini" / f"{file.name}.gz"
        damage(path)
        with pytest.raises(DataError) as error:
            getattr(FashionMNISTMini(), ask)()
        problem = said.format(size=file.size)
        assert str(error.value) == f"FashionMNISTMini: {path}: {problem}; install cnntrain again"


MEMORY = """
import os, resource
import numpy as np, torch
from cnntrain.data import ImageData

torch.set_num_threads(1)
N, HALF = 16_000, 8000

class Mine(ImageData):
    shape, classes, mean, std, train_size = (3, 64, 64), ("a", "b"), (0.5,), (0.5,), N

    def read(self, split):
        count = N if split == "train" else 1
        images = np.full((count, 64, 64, 3), 7, np.uint8)
        if layout == "transposed":
            images = images.transpose(0, 3, 1, 2)
        else:
            images = images.reshape(count, 3, 64, 64)
        images.flags.writeable = layout != "read-only"
        return images, np.zeros(count, np.int64)

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for layout in ("contiguous", "read-only", "transposed"):
    if (child := os.fork()) == 0:
        before = peak()
        data = Mine(val_size=HALF, batch_size=32, eval_batch_size=32)
        for loader in (data.train_loader(), data.val_loader()):
            assert all(images.is_contiguous() for images, _ in loader)
        print(layout, (peak() - before) / (N * 3 * 64 * 64), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_memory_is_that_of_the_images():
    """Peak of a process, beyond the imports, in bytes of the images: 1 for the images, and some for
    batches; training and validation images, half each, are no copies."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert times.keys() == {"contiguous", "read-only", "transposed"}
    assert max(times.values()) < 1.3, times
