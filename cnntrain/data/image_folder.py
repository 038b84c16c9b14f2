"""Image folders, and CSV files that list images and labels."""

import contextlib
import csv
import io
import os
import unicodedata
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

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
HIDDEN = (".", "__MACOSX", "Thumbs.db", "desktop.ini")  # beginnings of names


class ImageFolder(DecodedData):
    """Images in one folder per class, or listed in a CSV file.

    ::

        photos/cat/1.jpg            photos/train/cat/1.jpg        path,label,split
        photos/cat/more/2.png       photos/val/cat/2.png          photos/1.jpg,cat,train
        photos/dog/3.jpg            photos/test/dog/3.jpg         photos/3.jpg,dog,test

    Folders may be nested below those of the classes, and symbolic links are followed, once to each
    folder. Hidden files are ignored, and with a note in the log, files whose names do not end as
    those of images. The paths in a CSV file are relative to its folder; its column `split` may be
    missing.

    Args:
        root: The folder, or the CSV file.
        options: See `DecodedData`.
    """

    def __init__(self, *, root: str, **options: Any) -> None:
        super().__init__(root=root, **options)

    def entries(self) -> list[Entry]:
        self.ignored, self.empty = [], []
        try:
            if self.root.is_dir():
                return self._in_folder()
            if not self.root.exists():
                self._fail("there is no such folder or file")
            if self.root.suffix.lower() not in (".csv", ".tsv", ".txt") or not self.root.is_file():
                self._fail(
                    "is neither a folder nor a CSV file; name the folder with one folder of images "
                    "per class"
                )
            return self._in_csv()
        except OSError as error:
            self._fail(f"{few([str(error.filename)])}: {error.strerror}")

    def file(self, entry: Entry) -> Path:
        """Path of an image."""
        return self._folder / entry.name

    @cached_property
    def _folder(self) -> Path:
        """What the names of the images are relative to."""
        return self.root if self.root.is_dir() else self.root.parent

    def header(self, entry: Entry) -> tuple[tuple[int, int], bool]:
        with open_image(self.file(entry)) as image:
            return oriented_size(image), is_colour(image)

    def decode(self, entry: Entry) -> np.ndarray:
        return self.decoder.read(self.file(entry))

    def _fail(self, problem: str) -> NoReturn:
        raise DataError(f"data.root={self.root}: {problem}")

    def _in_folder(self) -> list[Entry]:
        folders, files = self._walk()  # parts of paths below the root
        images = [file for file in files if file[-1].lower().endswith(SUFFIXES)]
        named = {f[0]: PART_NAMES[f[0].lower()] for f in folders if f[0].lower() in PART_NAMES}
        others = sorted({image[0] for image in images if len(image) > 1 and image[0] not in named})
        depths = {len(image) for image in images if named.get(image[0]) == "train"}
        # Otherwise train is a class of this name.
        divided = max(depths, default=0) > 2 and not (others and 2 in depths)
        if divided and others:
            self._fail(
                f"{few(others)}: neither train, val nor test, but beside them; move the images "
                "into these, or elsewhere"
            )
        depth = 2 if divided else 1  # of the folders of the classes
        used = [image for image in images if len(image) > depth]
        if not used:
            loose = f"{len(images):,} images, but no class folders with images"
            self._fail(
                f"contains {loose if images else 'no images'}; put images into "
                f"{self.root / '<class>'}, or name a CSV file with the columns path,label"
            )
        needed = {f for f in folders if len(f) <= depth and (f[0] in named or not divided)}
        empty = needed - {image[:n] for image in used for n in range(1, depth + 1)}
        self.empty = sorted("/".join(folder) for folder in empty)
        self.ignored += sorted("/".join(file) for file in {*files} - {*used})
        # A label that is not UTF-8 could not be written to the config of the run.
        labels = {f: f[-1].encode(errors="backslashreplace").decode() for f in needed}
        return [
            self._entry("/".join(i), labels[i[:depth]], named[i[0]] if divided else None)
            for i in used
        ]

    def _walk(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Folders and files below the root that are not hidden. Raises OSError."""
        folders, files = [], []
        root = self.root.resolve()
        above, visited = {str(path) for path in (root, *root.parents)}, set()

        def fail(error: OSError) -> None:
            raise error

        for path, names, inside in os.walk(self.root, onerror=fail, followlinks=True):
            below, real = Path(path).relative_to(self.root).parts, os.path.realpath(path)
            part = PART_NAMES.get(below[0].lower()) if below else None
            names[:] = sorted(name for name in names if not name.startswith(HIDDEN))
            folders += [below] if below else []
            if below and ((part, real) in visited or real in above):  # by a symbolic link
                self.ignored.append("/".join(below))
                names.clear()
                continue
            visited.add((part, real))
            files += [(*below, name) for name in inside if not name.startswith(HIDDEN)]
        return folders, files

    def _entry(self, name: str, label: str, part: Part | None) -> Entry:
        return file_entry(self._folder / name, name, label, part)

    def _in_csv(self) -> list[Entry]:
        try:
            text = self.root.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            self._fail(f"is not UTF-8 ({error.reason}); save it so")
        head = text.partition("\n")[0]
        separator = max(SEPARATORS, key=head.count)
        rows = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
        try:
            table = [(rows.line_num, [cell.strip() for cell in cells]) for cells in rows]
        except csv.Error as error:
            self._fail(f"line {rows.line_num}: {error}; correct the quotation marks before it")
        names = [name.lower() for name in table[0][1]] if table else []
        if wrong := [name for name in COLUMNS[:2] if names.count(name) != 1]:
            self._fail(
                f"has {names.count(wrong[0]) or 'no'} columns {wrong[0]}; its first line must name "
                f"path{separator}label, and may name split"
            )
        seen: dict[str, tuple[str, int]] = {}
        absent, entries = [], []
        for line, cells in table[1:]:
            if not any(cells):
                continue
            if len(cells) < len(names) or any(cells[len(names) :]):
                self._fail(
                    f"line {line}: has {len(cells)} cells instead of {len(names)}; put texts with "
                    f"{separator!r} into quotation marks"
                )
            row = dict(zip(names, cells, strict=False))
            path, label, split = row["path"], row["label"], row.get("split", "").lower()
            if not path or not label:
                self._fail(f"line {line}: has no {'label' if path else 'path'}")
            if split and split not in PART_NAMES:
                self._fail(f"line {line}: split is {split!r}; take train, val or test, or nothing")
            name = self._name(path)
            other, before = seen.setdefault(name, (label, line))
            if before != line:
                same = "as line" if other == label else "with another label in line"
                self._fail(
                    f"line {line}: {few([path])} is listed already, {same} {before}; remove one of "
                    "them"
                )
            if not os.path.isfile(self._folder / name):
                absent.append(f"{path} (line {line})")
            entries.append(self._entry(name, label, PART_NAMES.get(split)))
        if not entries:
            self._fail("lists no images")
        if absent and (self.on_error == "stop" or len(absent) == len(entries)):
            self._fail(
                f"{len(absent):,} files do not exist: {few(absent)}; paths are relative to "
                f"{self._folder}"
            )
        return entries

    def _name(self, path: str) -> str:
        """A path in a CSV file relative to its folder, if it is below it, with forward slashes."""
        if "\\" in path and not os.path.isfile(self._folder / path):  # of Windows
            path = path.replace("\\", "/")
        below = os.path.relpath(self._folder / path, self._folder)
        elsewhere = os.path.isabs(path) and below.startswith("..")
        return Path(path if elsewhere else below).as_posix()


def file_entry(path: Path, name: str, label: str, part: Part | None) -> Entry:
    """The entry of a file, whether it can be read or not."""
    nbytes = modified = 0
    with contextlib.suppress(OSError, ValueError):  # reported when it is decoded
        status = os.stat(path)
        nbytes, modified = status.st_size, status.st_mtime_ns
    return Entry(name, unicodedata.normalize("NFC", label), part, nbytes, modified)
