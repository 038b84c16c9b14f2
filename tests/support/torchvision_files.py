"""Tiny files in the formats of torchvision's data sets, written independently of torchvision."""

import bz2
import json
import pickle
import struct
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from idx_files import idx_bytes
from PIL import Image
from scipy.io import savemat

COUNTS = {"train": 5, "val": 2, "test": 2}  # of each class
CHECKED = ("cifar", "stl10", "svhn", "flowers102")  # modules that verify the original files


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels(part: str) -> np.ndarray:
    return np.tile([0, 1], COUNTS[part])


def batch(part: str, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    return pixels(len(part), 2 * COUNTS[part], *shape), labels(part)


class Photos:
    """Photos of 13x11 pixels, no two the same."""

    def __init__(self) -> None:
        self.numbers = count()

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(100 + next(self.numbers), 13, 11, 3)).save(path)
        return path

    def folders(self, root: Path, names: tuple[str, str], pattern: str, part: str) -> list[str]:
        """Path of each, relative to the root."""
        paths = [f"{name}/{pattern % (i + 1)}" for name in names for i in range(COUNTS[part])]
        for path in paths:
            self.save(root / path)
        return paths


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def data(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def mnist(name: str, prefix: str = "", first: int = 0, test: str = "t10k") -> Callable[[Path], Any]:
    def write(root: Path) -> None:
        for part, file in {"train": "train", "test": test}.items():
            images, numbers = batch(part, 28, 28)
            start = root / name / "raw"
            data(start / f"{prefix}{file}-images-idx3-ubyte", idx_bytes(images))
            values = (numbers + first).astype(np.uint8)
            data(start / f"{prefix}{file}-labels-idx1-ubyte", idx_bytes(values))

    return write


def qmnist(root: Path) -> None:
    mnist("QMNIST", "qmnist-", test="test")(root)
    for part in ("train", "test"):
        table = np.column_stack([labels(part), *[pixels(7, 2 * COUNTS[part])] * 7]).astype(">i4")
        head = struct.pack(">HBBII", 0, 12, 2, *table.shape)
        data(root / f"QMNIST/raw/qmnist-{part}-labels-idx2-int", head + table.tobytes())


def cifar(folder: str, files: dict[str, str], meta: str, key: str, names: str):
    def write(root: Path) -> None:
        for seed, (file, part) in enumerate(files.items()):
            own = {"data": pixels(seed, 4, 3072), key: [0, 1, 0, 1], "batch_label": part}
            data(root / folder / file, pickle.dumps(own))
        data(root / folder / meta, pickle.dumps({names: ["dog", "cat", "absent"]}))

    return write


def stl10(root: Path) -> None:
    for part in ("train", "test", "unlabeled"):
        images, numbers = batch("val" if part == "unlabeled" else part, 3, 96, 96)
        data(root / f"stl10_binary/{part}_X.bin", images.tobytes())
        data(root / f"stl10_binary/{part}_y.bin", (numbers + 1).astype(np.uint8).tobytes())
    text(root / "stl10_binary/class_names.txt", "airplane", "bird")


def svhn(root: Path) -> None:
    for part in ("train", "test"):
        images, numbers = batch(part, 32, 32, 3)
        digits = np.where(numbers == 0, 10, numbers)[:, None].astype(np.uint8)
        savemat(root / f"{part}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": digits})


def usps(root: Path) -> None:
    for part, name in {"train": "usps.bz2", "test": "usps.t.bz2"}.items():
        images, numbers = batch(part, 256)
        rows = zip((images / 127.5 - 1).tolist(), numbers, strict=True)
        lines = [
            f"{k + 1} " + " ".join(f"{i + 1}:{v:.4f}" for i, v in enumerate(row)) for row, k in rows
        ]
        data(root / name, bz2.compress("\n".join(lines).encode()))


def gtsrb(root: Path) -> None:
    folder = root / "gtsrb"
    Photos().folders(folder / "GTSRB/Training", ("00000", "00001"), "%05d.ppm", "train")
    photos, rows = Photos(), []
    for i, k in enumerate(labels("test")):
        photos.save(folder / f"GTSRB/Final_Test/Images/{i:05}.ppm")
        rows.append(f"{i:05}.ppm;11;13;{k}")
    text(folder / "GT-final_test.csv", "Filename;Width;Height;ClassId", *rows)


def flowers102(root: Path) -> None:
    folder, photos, numbers, ids = root / "flowers-102", Photos(), [], {}
    for part, key in {"train": "trnid", "val": "valid", "test": "tstid"}.items():
        start, own = len(numbers) + 1, labels(part).tolist()
        ids[key] = np.arange(start, start + len(own))
        numbers += own
    for i in range(len(numbers)):
        photos.save(folder / f"jpg/image_{i + 1:05}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array(numbers) + 1})
    savemat(folder / "setid.mat", ids)


def pets(root: Path) -> None:
    photos = Photos()
    for part, name in {"train": "trainval", "test": "test"}.items():
        ids = [
            (f"{'yorkshire_terrier' if k else 'Abyssinian'}_{part}{i}", k)
            for i, k in enumerate(labels(part))
        ]
        for id_, _ in ids:
            photos.save(root / f"oxford-iiit-pet/images/{id_}.jpg")
        lines = [f"{id_} {k + 1} {k + 1} 1" for id_, k in ids]
        text(root / f"oxford-iiit-pet/annotations/{name}.txt", *lines)


def food101(root: Path) -> None:
    photos, names = Photos(), ("apple_pie", "waffles")
    for part in ("train", "test"):
        paths = photos.folders(root / "food-101/images", names, f"{part}%d.jpg", part)
        own = {name: [p[:-4] for p in paths if p.startswith(name)] for name in names}
        text(root / f"food-101/meta/{part}.json", json.dumps(own))


def dtd(root: Path) -> None:
    photos, folder = Photos(), root / "dtd/dtd"
    for part in COUNTS:
        paths = photos.folders(folder / "images", ("banded", "zigzagged"), f"{part}%d.jpg", part)
        text(folder / f"labels/{part}1.txt", *paths)


def aircraft(root: Path) -> None:
    photos, folder, names = Photos(), root / "fgvc-aircraft-2013b/data", ("707-320", "F-16A/B")
    text(folder / "variants.txt", *names)
    for part in COUNTS:
        ids = [(f"{part}{i}", names[k]) for i, k in enumerate(labels(part))]
        for id_, _ in ids:
            photos.save(folder / f"images/{id_}.jpg")
        text(folder / f"images_variant_{part}.txt", *(" ".join(pair) for pair in ids))


def cars(root: Path) -> None:
    photos, folder = Photos(), root / "stanford_cars"
    annotations = {
        "train": "devkit/cars_train_annos.mat",
        "test": "cars_test_annos_withlabels.mat",
    }
    text(folder / "devkit/README.txt")
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], object)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    for part, name in annotations.items():
        rows = [(f"{i + 1:05}.jpg", k + 1) for i, k in enumerate(labels(part))]
        for file, _ in rows:
            photos.save(folder / f"cars_{part}/{file}")
        table = np.array(rows, [("fname", object), ("class", object)])
        savemat(folder / name, {"annotations": table})


def sun397(root: Path) -> None:
    text(root / "SUN397/ClassName.txt", "/a/abbey", "/z/zen/garden")
    Photos().folders(root / "SUN397", ("a/abbey", "z/zen/garden"), "sun_%d.jpg", "train")


def split_folders(folder: str, names: tuple[str, str], pattern: str, **parts: str):
    def write(root: Path) -> None:
        photos = Photos()
        for part, own in parts.items():
            photos.folders(root / folder / own, names, pattern, part)

    return write


def caltech101(root: Path) -> None:
    folder = root / "caltech101/101_ObjectCategories"
    Photos().folders(folder, ("accordion", "yin_yang"), "image_%04d.jpg", "train")
    Photos().save(folder / "BACKGROUND_Google/image_0001.jpg")


BATCHES = {**{f"data_batch_{i}": "train" for i in range(1, 6)}, "test_batch": "test"}
WNIDS = ("n01440764", "n02102040")
DIGITS = ("0 - zero", "1 - one")
BY_TRAIN = {"train": {"train": True}, "test": {"train": False}}
TWO = {"train": {"split": "train"}, "test": {"split": "test"}}
THREE = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
ALL = {"all": {}}

# Name -> what writes its files, arguments of torchvision's class for each part, names of the labels
SETS: dict[str, tuple[Callable[[Path], Any], dict[str, dict[str, Any]], tuple[str, ...]]] = {
    "MNIST": (mnist("MNIST"), BY_TRAIN, DIGITS),
    "FashionMNIST": (mnist("FashionMNIST"), BY_TRAIN, ("T-shirt/top", "Trouser")),
    "KMNIST": (mnist("KMNIST"), BY_TRAIN, ("o", "ki")),
    "EMNIST": (
        mnist("EMNIST", "emnist-letters-", 1, "test"),
        {part: {**which, "split": "letters"} for part, which in BY_TRAIN.items()},
        ("N/A", "a", "b"),
    ),
    "QMNIST": (qmnist, BY_TRAIN, DIGITS),
    "USPS": (usps, BY_TRAIN, ("0", "1")),
    "CIFAR10": (
        cifar("cifar-10-batches-py", BATCHES, "batches.meta", "labels", "label_names"),
        BY_TRAIN,
        ("dog", "cat"),
    ),
    "CIFAR100": (
        cifar(
            "cifar-100-python",
            {"train": "train", "test": "test"},
            "meta",
            "fine_labels",
            "fine_label_names",
        ),
        BY_TRAIN,
        ("dog", "cat"),
    ),
    "STL10": (stl10, TWO, ("airplane", "bird")),
    "SVHN": (svhn, TWO, ("0", "1")),
    "GTSRB": (gtsrb, TWO, ("0", "1")),
    "EuroSAT": (
        split_folders("eurosat", ("AnnualCrop", "SeaLake"), "%d.jpg", train="2750"),
        ALL,
        ("AnnualCrop", "SeaLake"),
    ),
    "Flowers102": (flowers102, THREE, ("pink primrose", "hard-leaved pocket orchid")),
    "OxfordIIITPet": (
        pets,
        {"train": {"split": "trainval"}, "test": {"split": "test"}},
        ("Abyssinian", "Yorkshire Terrier"),
    ),
    "Food101": (food101, TWO, ("apple_pie", "waffles")),
    "DTD": (dtd, THREE, ("banded", "zigzagged")),
    "FGVCAircraft": (aircraft, THREE, ("707-320", "F-16A/B")),
    "Imagenette": (
        split_folders("imagenette2", WNIDS, "%d.jpeg", train="train", test="val"),
        {"train": {"split": "train"}, "test": {"split": "val"}},
        ("tench", "English springer"),
    ),
    "StanfordCars": (cars, TWO, ("AM General Hummer SUV 2000", "Acura RL Sedan 2012")),
    "Caltech101": (caltech101, ALL, ("accordion", "yin_yang")),
    "SUN397": (sun397, ALL, ("a/abbey"[2:], "zen/garden")),
    "Country211": (
        split_folders(
            "country211", ("AD", "ZW"), "%d.jpg", train="train", val="valid", test="test"
        ),
        {**THREE, "val": {"split": "valid"}},
        ("AD", "ZW"),
    ),
    "RenderedSST2": (
        split_folders(
            "rendered-sst2",
            ("negative", "positive"),
            "%d.png",
            train="train",
            val="valid",
            test="test",
        ),
        THREE,
        ("negative", "positive"),
    ),
}


def write(name: str, root: Path, patch: Any) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Write the files and accept them instead of the original ones; arguments and class names."""
    for module in CHECKED:
        patch.setattr(
            f"torchvision.datasets.{module}.check_integrity",
            lambda path, md5=None: Path(path).is_file(),
        )
    write_files, parts, names = SETS[name]
    root.mkdir(parents=True, exist_ok=True)
    write_files(root)
    return parts, names
