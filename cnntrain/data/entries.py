"""Images of a data set that are not decoded yet, and their split by a hash of the names."""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cnntrain.data.dataset import Part
from cnntrain.terminal import printable

LISTED = 10  # names in an error


@dataclass(frozen=True)
class Entry:
    """An image of a data set that is not decoded yet.

    Attributes:
        name: Unique, the same on every machine, such as the path below the root.
        label: Name of its class.
        part: train, val or test; None: is split off by the data set.
        nbytes: Of the file.
        modified: Its time of modification in ns.
    """

    name: str
    label: str
    part: Part | None = None
    nbytes: int = 0
    modified: int = 0


def few(texts: Sequence[str], most: int = LISTED) -> str:
    """The first texts, in one line, and the number of the others."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return f"{', '.join(map(printable, texts[:most]))}{more}"


def by_hash(entries: Sequence[Entry], seed: int = 0) -> list[Entry]:
    """Entries in an order that depends on the names and the seed only."""

    def digest(entry: Entry) -> bytes:
        name = unicodedata.normalize("NFC", entry.name)  # file systems differ in this
        return hashlib.sha256(f"{seed}/{name}".encode(errors="surrogatepass")).digest()

    return sorted(entries, key=digest)


def split_by_hash(
    entries: Sequence[Entry], val_fraction: float, test_fraction: float, seed: int
) -> np.ndarray:
    """The part of each entry (N,); see `DecodedData`."""
    given = {entry.part for entry in entries}
    parts = {entry.name: entry.part or "train" for entry in entries}
    classes: dict[str, list[Entry]] = {}
    for entry in by_hash(entries, seed):
        if parts[entry.name] == "train":
            classes.setdefault(entry.label, []).append(entry)
    for own in classes.values():
        fractions = {"test": test_fraction, "val": val_fraction}
        counts = {
            part: 0 if part in given else max(1, round(fraction * len(own)))
            for part, fraction in fractions.items()
        }
        # At opposite ends: a file that is added moves at most one other out of each part.
        if len(own) > counts["test"]:
            parts |= {entry.name: "test" for entry in own[: counts["test"]]}
        if len(own) > counts["test"] + counts["val"]:
            parts |= {entry.name: "val" for entry in own[len(own) - counts["val"] :]}
    return np.array([parts[entry.name] for entry in entries])
