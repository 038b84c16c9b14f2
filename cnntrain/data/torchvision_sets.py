"""Labelled image sets of torchvision.

Source: https://docs.pytorch.org/vision/stable/datasets.html.
"""

import difflib
import inspect
import logging
import os
import re
import zlib
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, get_args

import numpy as np
from filelock import FileLock

from cnntrain.data import torchvision_compat
from cnntrain.data.dataset import DataError, Part
from cnntrain.data.decoded import PARTS, DecodedData
from cnntrain.data.decoding import is_colour, open_image, oriented_size
from cnntrain.data.entries import Entry
from cnntrain.data.image_folder import file_entry

log = logging.getLogger(__name__)

Variant = Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"]
DOCS = "https://docs.pytorch.org/vision/stable/generated/torchvision.datasets."
SETS: dict[
    str, tuple[Any, ...]
] = {  # name -> the argument that chooses a part, and its values for train, val and test
    **dict.fromkeys(
        ("CIFAR10", "CIFAR100", "EMNIST", "FashionMNIST"), ("train", True, None, False)
    ),
    **dict.fromkeys(("KMNIST", "MNIST", "QMNIST", "USPS"), ("train", True, None, False)),
    **dict.fromkeys(("Food101", "GTSRB", "STL10", "SVHN"), ("split", "train", None, "test")),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102"), ("split", "train", "val", "test")),
    "Country211": ("split", "train", "valid", "test"),
    "Imagenette": ("split", "train", None, "val"),  # published accuracies are those of val
    "OxfordIIITPet": ("split", "trainval", None, "test"),
    "RenderedSST2": ("split", "train", "val", "test"),
    "StanfordCars": ("split", "train", None, "test"),
    **dict.fromkeys(("Caltech101", "EuroSAT", "SUN397"), ()),
}


class TorchVisionData(DecodedData):
    """A set of `torchvision.datasets` with one label for each image.

    Where it has no validation part, images of its training part are split off. Caltech101, EuroSAT
    and SUN397 have no parts; Imagenette's `val` is the test part.

    Args:
        name: Name of torchvision's class.
        root: Folder of the files, as torchvision's `root`.
        split: Variant of EMNIST.
        download: Whether torchvision downloads missing files.
        options: See `DecodedData`.
    """

    def __init__(
        self,
        *,
        name: str,
        root: str = "~/.cache/cnntrain/torchvision",
        split: Variant | None = None,
        download: bool = True,
        **options: Any,
    ) -> None:
        if name not in SETS:
            lower = {known.lower(): known for known in SETS}
            near = [lower[key] for key in difflib.get_close_matches(name.lower(), lower)]
            raise ValueError(
                f"data.name={name}: is not one of torchvision's sets with one label for each image "
                f"(others are for detection, segmentation, captions, videos, image pairs); choose "
                f"from {', '.join(near or SETS)}"
            )
        if (name == "EMNIST") != bool(split):
            way = "leave it out" if split else f"choose from {', '.join(get_args(Variant))}"
            raise ValueError(f"data.split={split}: is a variant of EMNIST, of no other set; {way}")
        super().__init__(root=root, **options)
        self.name, self.variant, self.download = name, split, download
        self.folder, self.root = self.root, self.root / name / (split or "")  # a cache for each set
        self._in_memory: dict[str, tuple[Any, int]] = {}  # images that are not files

    def prepare(self) -> None:
        super().prepare()
        self._in_memory.clear()

    def entries(self) -> list[Entry]:
        choice, entries = SETS[self.name], list[Entry]()
        classes: dict[str, None] = {}
        parts: dict[Part | None, dict[str, Any]] = {
            part: {choice[0]: value}
            for part, value in zip(PARTS, choice[1:], strict=False)
            if value is not None
        }
        for part, arguments in (parts or {None: {}}).items():
            dataset = self._dataset(arguments)
            files, labels = _files_and_labels(dataset)
            names = _class_names(dataset, max(labels) + 1)
            # No label of EMNIST's letters is 0, N/A.
            classes |= {names[label]: None for label in sorted({*labels})}
            texts = [names[label] for label in labels]
            if files:
                for path, text in zip(files, texts, strict=True):
                    name = os.path.relpath(path, self.folder)
                    entries.append(file_entry(Path(path), name, text, part))
            else:
                stamp = dataset.data.nbytes, zlib.crc32(np.ascontiguousarray(dataset.data).data)
                own = [Entry(f"{part}[{i:06}]", text, part, *stamp) for i, text in enumerate(texts)]
                self._in_memory |= {entry.name: (dataset, i) for i, entry in enumerate(own)}
                entries += own
        if not hasattr(self, "classes"):
            self.find(classes=list(classes))
        return entries

    def header(self, entry: Entry) -> tuple[tuple[int, int], bool]:
        if entry.name in self._in_memory:
            dataset, index = self._in_memory[entry.name]
            image = dataset[index][0]
            return (image.height, image.width), is_colour(image)
        with open_image(self.folder / entry.name) as image:
            return oriented_size(image), is_colour(image)

    def decode(self, entry: Entry) -> np.ndarray:
        if entry.name not in self._in_memory:
            return self.decoder.read(self.folder / entry.name)
        dataset, index = self._in_memory[entry.name]
        return self.decoder(dataset[index][0])

    def _dataset(self, arguments: dict[str, Any]) -> Any:
        """A part as torchvision's data set, downloaded if necessary."""
        from torchvision import datasets  # takes a second

        cls = getattr(datasets, self.name)
        arguments = {"root": str(self.folder), **arguments}
        if self.variant:
            arguments["split"] = self.variant
        if "loader" in inspect.signature(cls).parameters:
            arguments["loader"] = Path  # its items have a path instead of an image
        try:
            return cls(**arguments)
        except Exception as error:  # of many classes
            problem = f"data.root={self.folder}: has no complete {self.name} ({_one_line(error)})"
        try:
            if not self.download:
                raise ValueError("because of data.download=false")
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                log.info(f"{self.folder}: torchvision downloads {self.name}")
                return cls(**arguments, download=True)
        except Exception as error:
            found = str([vars(cls).get(name) for name in ("resources", "split_list", "url")])
            files = dict.fromkeys(re.findall(r"[\w.-]+\.(?:bz2|gz|mat|xz|zip)(?=')", found))
            in_raw = issubclass(cls, datasets.MNIST)
            folder = self.folder / self.name / "raw" if in_raw else self.folder
            what = ", ".join(files) or f"the unpacked files that {DOCS}{self.name}.html describes"
            raise DataError(
                f"{problem} and cannot be downloaded ({_one_line(error)}); put {what} into "
                f"{folder} (archives are unpacked with data.download=true, without a network, too; "
                "data.download=false never downloads)"
            ) from error


def _one_line(error: Exception) -> str:
    return shorten(str(error), 200, placeholder=" ...") or type(error).__name__


def _class_names(dataset: Any, count: int) -> list[str]:
    """Names of the labels 0, 1, ..., of synonyms the first; numbers where there are none."""
    known = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or []
    names = [name if isinstance(name, str) else name[0] for name in known]
    return names + [str(label) for label in range(len(names), count)]


def _files_and_labels(dataset: Any) -> tuple[list[str | Path], list[int]]:
    """Paths of the images, none if they are not files, and their labels."""
    from torchvision import datasets

    if known := torchvision_compat.files_and_labels(dataset):
        return known
    if isinstance(dataset, datasets.Caltech101):
        folders = [Path(dataset.root, "101_ObjectCategories", name) for name in dataset.categories]
        places = zip(dataset.y, dataset.index, strict=True)
        return [folders[y] / f"image_{number:04d}.jpg" for y, number in places], dataset.y
    if hasattr(dataset, "loader"):
        items = [dataset[row] for row in range(len(dataset))]
        return [path for path, _ in items], [label for _, label in items]
    labels = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels)
    return [], labels.reshape(len(labels), -1)[:, 0].tolist()  # QMNIST's have eight columns
