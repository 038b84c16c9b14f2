"""Base class of data sets: checks of the arrays, split, memory; the set in the package."""

import gzip
import inspect
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from cnntrain.config.options import defaults
from cnntrain.data import (
    Augment,
    DataError,
    FashionMNIST,
    FashionMNISTMini,
    ImageData,
    fashion_mnist,
)
from cnntrain.data.fashion_mnist import MINI_FOLDER, NAMES
from cnntrain.data.idx import read_idx

N, TEST = 12, 5
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 2, 4, 3), dtype=np.uint8)
LABELS = np.arange(N) % 3


class Mine(ImageData):
    """A data set made of arrays."""

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


def test_class_counts_are_of_the_images_to_train_on():
    mine = Mine(labels=np.where(LABELS == 1, 0, LABELS))  # none of class 1
    expected = np.bincount(mine.given["train"][1][mine.split()[0]], minlength=3)
    counts = mine.class_counts()
    assert (counts.tolist(), counts.dtype) == (expected.tolist(), torch.int64)
    assert counts[1] == 0
    assert counts.sum() == N - 3


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int8, np.uint64, ">i2"])
def test_valid_arrays(dtype):
    mine = Mine(labels=LABELS.astype(dtype))
    train, val = mine.split()
    assert mine.train_loader().labels.tolist() == LABELS[train].tolist()
    assert torch.equal(mine.val_loader().stored(), torch.from_numpy(IMAGES[val]))
    assert mine.test_loader().labels.tolist() == LABELS[:TEST].tolist()


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (label(4, 3), "label 3 at index 4 is not one of 3 classes, 0 to 2 (1 of 12 labels are"),
        (label(0, -1), "label -1 at index 0 is not one of 3 classes"),
        (label(11, 255, np.uint8), "label 255 at index 11 is not one of 3 classes"),
        (label(1, 2**63, np.uint64), f"label {2**63} at index 1 is not one of 3 classes"),
        (LABELS + 1, "label 3 at index 2 is not one of 3 classes, 0 to 2 (4 of 12 labels are"),
        (LABELS.astype(float), "labels are float64 (12,) instead of integers (12,)"),
        (LABELS > 1, "labels are bool (12,) instead of integers (12,)"),
        (np.eye(3, dtype=int)[LABELS], "labels are int64 (12, 3) instead of integers (12,)"),
        (LABELS.astype(object), "labels are object (12,) instead of integers (12,)"),
        (LABELS.astype(str), "labels are <U21 (12,) instead of integers (12,)"),
        (LABELS[1:], "labels are int64 (11,) instead of integers (12,)"),
        (LABELS[:0], "labels are int64 (0,) instead of integers (12,)"),
    ],
)
def test_wrong_labels(labels, problem):
    assert message(Mine(labels=labels), "train").startswith(f"Mine: train set: {problem}")


@pytest.mark.parametrize(
    ("images", "problem"),
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
    ],
)
def test_wrong_images(images, problem):
    assert message(Mine(images), "train").startswith(f"Mine: train set: {problem}")


def test_checks_of_the_test_set():
    mine = Mine()
    mine.given["test"] = (IMAGES, label(7, 5))
    mine.prepare()
    assert message(mine, "test").startswith("Mine: test set: label 5 at index 7")
    mine.given["test"] = (IMAGES[:, :, :3], LABELS)
    assert message(mine, "test").startswith("Mine: test set: images are uint8 (12, 2, 3, 3)")
    mine.given["test"] = (IMAGES[:0], LABELS[:0])
    assert message(mine, "test") == "Mine: test set: 0 images instead of at least one"


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


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged gzip file"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
        (lambda path: path.write_bytes(gzip.compress(bytes(9))), "not an IDX file"),
    ],
    ids=["missing", "truncated", "folder", "other"],
)
@pytest.mark.parametrize("number", [0, 1])
def test_damaged_mini_set(tmp_path, monkeypatch, number, damage, problem):
    shutil.copytree(MINI_FOLDER, tmp_path / "mini")
    monkeypatch.setattr(fashion_mnist, "MINI_FOLDER", tmp_path / "mini")
    for split in ("train", "test"):
        path = tmp_path / "mini" / f"{NAMES[split][number]}.gz"
        damage(path)
        line = message(FashionMNISTMini(), split)
        assert line.startswith(f"FashionMNISTMini: {path}: {problem}")
        assert line.endswith("; reinstall cnntrain")


MEMORY = """
import os, resource
import numpy as np, torch
from cnntrain.data import ImageData

torch.set_num_threads(1)
N, HALF = 8000, 4000

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
    """Peak memory beyond the imports, relative to the images: both parts share them."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert times.keys() == {"contiguous", "read-only", "transposed"}
    assert max(times.values()) < 1.6, times


@pytest.mark.parametrize(("cls", "total"), [(FashionMNIST, 60_000), (FashionMNISTMini, 5_000)])
def test_split_is_disjoint_complete_and_fixed(cls, total):
    train, val = cls().split()
    assert len(val) == total // (12 if total == 60_000 else 10)
    assert sorted([*train, *val]) == list(range(total))
    torch.manual_seed(5)
    np.testing.assert_array_equal(cls().split()[1], val)
    assert set(cls(split_seed=1).split()[1]) != set(val)
    assert set(val) < set(cls(val_size=len(val) + 1).split()[1])


def test_split_of_the_whole_set_never_changes():
    train, val = FashionMNIST().split()
    assert val[:5].tolist() == [2, 3, 11, 13, 20]
    assert int(val.sum()) == 148_902_005
    assert len(train) + len(val) == 60_000


def test_too_large_validation_set_names_the_option():
    FashionMNISTMini(val_size=4999)
    with pytest.raises(ValueError, match=r"data\.val_size=5000 .* choose at most 4999"):
        FashionMNISTMini(val_size=5000)


def test_mini_set():
    data = FashionMNISTMini()
    (train, labels), (test, test_labels) = data.read("train"), data.read("test")
    assert (train.shape, test.shape) == ((5000, 1, 28, 28), (1000, 1, 28, 28))
    assert np.bincount(labels).tolist() == [500] * 10
    assert np.bincount(test_labels).tolist() == [100] * 10
    images = {image.tobytes() for image in [*train, *test]}
    assert len(images) == 6000
    # The whole set's mean and deviation, which are also this one's normalisation.
    assert train.mean() / 255 == pytest.approx(data.mean[0], abs=0.003)
    assert train.std() / 255 == pytest.approx(data.std[0], abs=0.003)
    assert sum(path.stat().st_size for path in MINI_FOLDER.iterdir()) < 3_000_000
    assert "Zalando SE" in (MINI_FOLDER / "LICENSE").read_text()


def test_mini_set_is_drawn_from_the_real_one():
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    data = FashionMNIST(root=f"{cache}/cnntrain/fashion_mnist")
    for names in NAMES.values():
        paths = [data.root / name for name in names]
        if not all(path.is_file() for path in paths):
            pytest.skip(f"the real set is not in {data.root}")
        real, labels = map(read_idx, paths)
        known = {(image.tobytes(), label) for image, label in zip(real, labels, strict=True)}
        mini, mini_labels = (read_idx(MINI_FOLDER / f"{name}.gz") for name in names)
        pairs = {(i.tobytes(), label) for i, label in zip(mini, mini_labels, strict=True)}
        assert pairs <= known


@pytest.mark.parametrize(
    ("name", "cls"), [("fashion_mnist", FashionMNIST), ("fashion_mnist_mini", FashionMNISTMini)]
)
def test_config_has_every_option_and_its_default(name, cls):
    config = {**defaults("data", name)}
    assert config.pop("_target_") == f"cnntrain.data.{cls.__name__}"
    classes = Augment, ImageData, cls  # cls's own win
    options = [p for c in classes for p in inspect.signature(c).parameters.values()]
    expected = {p.name: p.default for p in options if p.default is not p.empty}
    root = config.get("root", "").replace("${oc.env:XDG_CACHE_HOME,'~/.cache'}", "~/.cache")
    config |= {"root": root} if root else {}
    augmentation = inspect.signature(Augment).parameters
    assert expected.items() >= {**config, "scale": tuple(config["scale"])}.items()
    assert config.keys() >= augmentation.keys()
    cls(**config)
