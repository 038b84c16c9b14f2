"""Inspection of a data set before training: counts, sizes, formats, damage, duplicates, leakage."""

import contextlib
import hashlib
import os
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cnntrain.data import DataError, DecodedData, Entry, ImageData, ImageFolder
from cnntrain.data.decoded import PARTS
from cnntrain.data.decoding import decoding_error, no_warnings, open_image
from cnntrain.data.image_cache import BATCH, cores, map_ahead
from cnntrain.data.image_folder import class_folders
from cnntrain.lab.duplicates import SMALL, as_image, fingerprint, near_duplicates
from cnntrain.pictures import Picture, captioned, font_file

ON_SHEET, MAX_CLASSES, TILE, GAP = 6, 200, 84, 4  # images per class, classes, pixels


@dataclass(frozen=True)
class Pair:
    """Two images that are alike; `exact`: their pixels are the same at the network's size."""

    names: tuple[str, str]
    parts: tuple[str, str]
    labels: tuple[str, str]
    exact: bool


@dataclass
class Inspection:
    """What `inspect` found.

    Attributes:
        problems: Why it cannot be trained on.
        classes: Images in each part, by class.
        empty_classes: Folders of classes without images.
        sizes: Height and width of the smallest, median and largest image.
        shape: Channels, height and width that training takes.
        formats: Images by file format and mode.
        unreadable: Why images cannot be decoded, by name.
        ignored: Files that are not used, by suffix.
        duplicates: Of more than two that are alike, each with the first of each part and class.
        near: Whether near duplicates were looked for; requires imagehash.
    """

    root: str
    problems: list[str] = field(default_factory=list)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    empty_classes: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    shape: tuple[int, int, int] | None = None
    formats: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    duplicates: list[Pair] = field(default_factory=list)
    near: bool = field(default_factory=lambda: find_spec("imagehash") is not None)


class _Stored(DecodedData):
    """A data set that is stored decoded, such as FashionMNIST, image by image."""

    def __init__(self, data: ImageData) -> None:
        data.prepare()
        self.sets = {"train": data.read("train"), "test": data.read("test")}
        self.held_out = {*data.split()[1].tolist()}
        size: Any = data.shape[1:]
        color: Any = "rgb" if data.shape[0] == 3 else "grey"
        options: dict[str, Any] = {"size": size, "color": color, "batch_size": data.batch_size}
        super().__init__(root=type(data).__name__, **options)
        self.find(classes=data.classes)

    def entries(self) -> list[Entry]:
        found = []
        for part in ("train", "test"):
            for i, label in enumerate(self.sets[part][1].tolist()):
                own: Any = "val" if part == "train" and i in self.held_out else part
                found.append(Entry(f"{part}[{i:06}]", self.classes[label], own))
        return found

    def header(self, entry: Entry) -> tuple[tuple[int, int], bool]:
        return self.size, self.color == "rgb"

    def decode(self, entry: Entry) -> np.ndarray:
        part, _, row = entry.name.rstrip("]").partition("[")
        return self.sets[part][0][int(row)][: self.shape[0]]


def inspect(data: ImageData) -> tuple[Inspection, dict[int, list[np.ndarray]]]:
    """Decode all images of a data set, by all cores, and compare them.

    Returns:
        What was found, and some images of each label for `contact_sheet`.

    Raises:
        DataError: A set that is not derived from `DecodedData` cannot be read.
    """
    data = data if isinstance(data, DecodedData) else _Stored(data)
    found = Inspection(str(data.root))
    entries: list[Entry] = []
    try:
        entries = data.listed
        data.open()
    except DataError as error:
        found.problems.append(str(error))
    _walk(found, data, entries)
    if not entries:
        return found, {}
    try:
        data.measure()  # if `open` has not
    except DataError as error:
        found.problems = list(dict.fromkeys([*found.problems, str(error)]))
        data.find(shape=(3, SMALL, SMALL))  # each will fail
    labels = {str(part): data.labels[rows] for part, rows in data.rows.items()}
    for k, name in enumerate(data.classes):
        found.classes[name] = {part: int((own == k).sum()) for part, own in labels.items()}
    return found, _decode(found, data)


def _walk(found: Inspection, data: DecodedData, entries: list[Entry]) -> None:
    """Files that are ignored, and folders of classes without images."""
    if not isinstance(data, ImageFolder) or not data.root.is_dir():
        return
    used, labels = {entry.name for entry in entries}, {entry.label for entry in entries}
    for above, folders, files in os.walk(data.root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (name for name in sorted(files) if not name.startswith(".")):
            path = Path(os.path.relpath(os.path.join(above, name), data.root)).as_posix()
            if path not in used:
                suffix = Path(name).suffix.lower() or "no suffix"
                found.ignored.setdefault(suffix, []).append(path)
    with contextlib.suppress(OSError):  # is reported as a problem
        found.empty_classes = sorted({name for _, name, _ in class_folders(data.root)} - labels)


def _decode(found: Inspection, data: DecodedData) -> dict[int, list[np.ndarray]]:
    """Fill in what the images show; some of each label, uint8 (3, H, W), for `contact_sheet`."""
    count = len(data.listed)
    on_sheet, digests = set[int](), [b""] * count
    hashes = np.zeros(count, np.uint64)
    small = np.zeros((count, SMALL, SMALL, data.shape[0]), np.uint8)
    for label in range(min(data.num_classes, MAX_CLASSES)):
        rows = np.flatnonzero(data.labels == label)
        some = np.linspace(0, len(rows) - 1, min(len(rows), ON_SHEET)).round().astype(int)
        on_sheet |= {*rows[some].tolist()}

    def examine(row: int) -> tuple[tuple[int, int], str, np.ndarray | None]:
        entry = data.listed[row]
        size, colour = data.header(entry)
        kind = "rgb" if colour else "grey"
        if isinstance(data, ImageFolder):
            with open_image(data.file(entry)) as file:
                kind = f"{file.format} {file.mode}"
        pixels = data.decode(entry)
        digests[row] = hashlib.sha256(pixels.tobytes()).digest()
        if found.near:
            hashes[row], small[row] = fingerprint(pixels)
        tile = None
        if row in on_sheet:
            image = as_image(pixels)
            image.thumbnail((TILE, TILE))
            tile = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        return size, kind, tile

    def batch(start: int) -> list[Any]:
        results = list[Any]()
        for row in range(start, min(start + BATCH, count)):
            try:
                results.append(examine(row))
            except Exception as error:  # decoders raise many classes
                results.append(decoding_error(error, data.listed[row].name))
        return results

    sizes, kinds, tiles = list[tuple[int, int]](), Counter[str](), dict[int, list[np.ndarray]]()
    options: dict[str, Any] = {"unit": " images", "leave": False, "disable": None}
    bar = tqdm(total=count, desc=f"decoding {data.root.name}", **options)
    starts = range(0, count, BATCH)
    results: list[Any]
    with bar, no_warnings():
        for start, results in zip(starts, map_ahead(batch, starts, cores()), strict=True):
            for row, result in enumerate(results, start):
                if isinstance(result, str):
                    found.unreadable[data.listed[row].name] = result
                    continue
                sizes.append(result[0])
                kinds[result[1]] += 1
                if result[2] is not None:
                    tiles.setdefault(int(data.labels[row]), []).append(result[2])
            bar.update(len(results))
    if sizes:
        sizes.sort(key=lambda size: (size[0] * size[1], size))
        found.sizes = [sizes[0], sizes[len(sizes) // 2], sizes[-1]]
        found.shape, found.formats = data.shape, dict(kinds.most_common())
    _compare(found, data, digests, hashes, small)
    return tiles


def _compare(
    found: Inspection,
    data: DecodedData,
    digests: list[bytes],
    hashes: np.ndarray,
    small: np.ndarray,
) -> None:
    same: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        if digest:
            same.setdefault(digest, []).append(row)
    groups = list(same.values())
    links = [(k, k) for k, group in enumerate(groups) if len(group) > 1]
    if found.near:
        firsts = [group[0] for group in groups]
        links += near_duplicates(hashes[firsts], small[firsts]).tolist()
    part = {row: name for name in PARTS for row in data.rows[name].tolist()}
    pairs: dict[tuple[int, int], bool] = {}
    for i, j in links:
        for some, others in ((groups[i], groups[j]), (groups[j], groups[i])):
            kinds = {(part[row], data.labels[row]): row for row in reversed(others)}
            both = ((min(a, b), max(a, b)) for a in some for b in kinds.values() if a != b)
            pairs |= dict.fromkeys(both, i == j)
    for (a, b), exact in pairs.items():
        first, second = data.listed[a], data.listed[b]
        names, labels = (first.name, second.name), (first.label, second.label)
        found.duplicates.append(Pair(names, (part[a], part[b]), labels, exact))


def contact_sheet(
    found: Inspection, tiles: dict[int, list[np.ndarray]]
) -> tuple[Picture, list[str]]:
    """Images of each class, and the names that no font can draw: these are numbered instead."""
    names = list(found.classes)[:MAX_CLASSES]
    height, width = next(iter(tiles.values()))[0].shape[1:]
    strips = np.full((len(names), 3, height, ON_SHEET * (width + GAP)), 255, np.uint8)
    for label, own in tiles.items():
        for k, tile in enumerate(own):
            strips[label, :, :, k * (width + GAP) : k * (width + GAP) + width] = tile
    foreign = [name for name in names if font_file(name) is None]
    captions = [
        f"{f'class {k + 1}' if name in foreign else name} ({sum(found.classes[name].values()):,})"
        for k, name in enumerate(names)
    ]
    columns = max(1, round((len(names) / 7) ** 0.5))
    size = ON_SHEET * (TILE + GAP)
    return captioned(torch.from_numpy(strips), captions, columns=columns, size=size), foreign
