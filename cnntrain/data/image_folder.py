"""Image folders, and CSV files that list images and labels."""

import csv
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cnntrain.data.dataset import DataError, Part
from cnntrain.data.decoded import DecodedData
from cnntrain.data.decoding import SUFFIXES, is_colour, open_image, oriented_size
from cnntrain.data.entries import Entry, few

PART_NAMES: dict[str, Part] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
COLUMNS = ("path", "label", "split")
SEPARATORS = ",;\t|"


class ImageFolder(DecodedData):
    """Images in one folder per class, or listed in a CSV file.

    ::

        photos/cat/1.jpg            photos/train/cat/1.jpg        path,label,split
        photos/cat/more/2.png       photos/val/cat/2.png          photos/1.jpg,cat,train
        photos/dog/3.jpg            photos/test/dog/3.jpg         photos/3.jpg,dog,test

    Folders may be nested below those of the classes, and symbolic links are followed. Hidden files,
    and files whose names do not end as those of images, are ignored. The paths in a CSV file are
    relative to its folder; its column `split` may be missing.

    Args:
        root: The folder, or the CSV file.
        options: See `DecodedData`.
    """

    def __init__(self, *, root: str, **options: Any) -> None:
        super().__init__(root=root, **options)

    def entries(self) -> list[Entry]:
        if not self.root.exists():
            raise DataError(f"data.root={self.root}: there is no such folder or file")
        try:
            if self.root.is_dir():
                return list(_in_folder(self.root))
            if self.root.suffix.lower() not in (".csv", ".tsv", ".txt"):
                raise DataError(
                    f"data.root={self.root}: is neither a folder nor a CSV file; name the folder "
                    "with one folder of images per class"
                )
            return list(_in_csv(self.root))
        except OSError as error:
            raise DataError(f"data.root={self.root}: {error.filename}: {error.strerror}") from error

    def file(self, entry: Entry) -> Path:
        """Path of an image."""
        return (self.root if self.root.is_dir() else self.root.parent) / entry.name

    def header(self, entry: Entry) -> tuple[tuple[int, int], bool]:
        with open_image(self.file(entry)) as image:
            return oriented_size(image), is_colour(image)

    def decode(self, entry: Entry) -> np.ndarray:
        return self.decoder.read(self.file(entry))


def class_folders(root: Path) -> Iterator[tuple[Path, str, Part | None]]:
    """The folders of classes, with or without images: path, name of the class, part."""
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not _ignored(f.name))
    parts = {folder: PART_NAMES.get(folder.name.lower()) for folder in folders}
    if "train" not in parts.values() or None in parts.values():  # classes, whatever their names
        parts = dict.fromkeys(folders)
    for folder, part in parts.items():
        classes = [folder]
        if part:
            classes = [f for f in folder.iterdir() if f.is_dir() and not _ignored(f.name)]
        for own in classes:
            yield own, unicodedata.normalize("NFC", own.name), part


def _in_folder(root: Path) -> Iterator[Entry]:
    found = False
    for folder, label, part in class_folders(root):
        for path in _images(folder):
            found = True
            yield _entry(path, os.path.relpath(path, root), label, part)
    if not found:
        loose = sum(f.name.lower().endswith(SUFFIXES) for f in root.iterdir())
        what = f"{loose:,} images, but no class folders with images" if loose else "no images"
        raise DataError(
            f"data.root={root}: contains {what}; put images into {root / '<class>'}, or name a CSV "
            "file with the columns path,label"
        )


def _images(folder: Path) -> Iterator[Path]:
    """The images below a folder. Raises OSError where one cannot be listed."""
    visited = set()  # a symbolic link may lead to a folder above

    def fail(error: OSError) -> None:
        raise error

    for above, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(above)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not _ignored(name)]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not _ignored(name):
                yield Path(above, name)


def _ignored(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _entry(path: Path, name: str, label: str, part: Part | None) -> Entry:
    try:
        status = path.stat()
        nbytes, modified = status.st_size, status.st_mtime_ns
    except OSError:  # a broken link: reported when it is decoded
        nbytes = modified = 0
    return Entry(Path(name).as_posix(), label, part, nbytes, modified)


def _in_csv(file: Path) -> Iterator[Entry]:
    """The images that a CSV file lists. Raises DataError with the first problem."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"data.root={file}: is not UTF-8 ({error.reason}); save it so") from error
    lines = text.splitlines()
    head = lines[0] if lines else ""
    separator = max(SEPARATORS, key=head.count)
    rows = csv.reader(lines, delimiter=separator)
    names = [name.strip().lower() for name in next(rows, [])]
    if missing := [name for name in COLUMNS[:2] if name not in names]:
        raise DataError(
            f"data.root={file}: has no column {' and '.join(missing)}; its first line must name "
            f"path{separator}label, and may name split"
        )
    seen: dict[str, tuple[str, int]] = {}
    absent = []
    for cells in rows:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"data.root={file}: line {rows.line_num}"
        if len(cells) < len(names):
            raise DataError(f"{where}: has {len(cells)} cells instead of {len(names)}")
        row = dict(zip(names, (cell.strip() for cell in cells), strict=False))
        name, label, split = row["path"], row["label"], row.get("split", "").lower()
        if not name or not label:
            raise DataError(f"{where}: has no {'label' if name else 'path'}")
        if split and split not in PART_NAMES:
            raise DataError(f"{where}: split is {split!r}; take train, val or test, or nothing")
        path = file.parent / name
        key = os.path.normpath(path)
        if key in seen:
            other, line = seen[key]
            problem = f"as line {line}" if other == label else f"with another label in line {line}"
            raise DataError(f"{where}: {name} is listed already, {problem}; remove one of them")
        seen[key] = label, rows.line_num
        if not path.is_file():
            absent.append(f"{name} (line {rows.line_num})")
        yield _entry(path, name, unicodedata.normalize("NFC", label), PART_NAMES.get(split))
    if absent:
        raise DataError(
            f"data.root={file}: {len(absent):,} files do not exist: {few(absent)}; paths are "
            f"relative to {file.parent}"
        )
    if not seen:
        raise DataError(f"data.root={file}: lists no images")
