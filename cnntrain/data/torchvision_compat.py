"""Private attributes of torchvision's data sets: no public one has their files and labels.

Their items have both, but decoded: half a minute at the start of each run. Those of torchvision
0.26 to 0.30 are used here; tests/data/test_torchvision_sets.py compares them with the items.
"""

from pathlib import Path
from typing import Any


def files_and_labels(dataset: Any) -> tuple[list[str | Path], list[int]] | None:
    """Of GTSRB and OxfordIIITPet; None for other data sets."""
    from torchvision import datasets

    if isinstance(dataset, datasets.GTSRB):
        return [path for path, _ in dataset._samples], [label for _, label in dataset._samples]
    if isinstance(dataset, datasets.OxfordIIITPet):
        return dataset._images, dataset._labels
    return None
