"""What a trained network takes pictures for: `cnntrain predict`."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from pydantic import PositiveInt

from cnntrain import pictures
from cnntrain.config import ConfigError
from cnntrain.inference.images import Picture, Unreadable, picture_files, read_pictures
from cnntrain.inference.trained import Device, Trained, load_trained
from cnntrain.models.inside import evaluating

BATCH = 256
DRAWN = 80  # pictures in the grid


@dataclass(frozen=True)
class Prediction:
    """Of one picture the most probable classes, with probabilities; or why it has none."""

    name: str
    classes: list[tuple[str, float]]
    pixels: np.ndarray | None = None  # uint8 (C, H, W), as the network saw it
    error: str | None = None

    def json(self) -> str:
        """One line."""
        if self.error:
            return json.dumps({"image": self.name, "error": self.error})
        answers = [{"class": name, "probability": p} for name, p in self.classes]
        return json.dumps({"image": self.name, "predictions": answers})


def predict(
    run: str | Path,
    images: str | list[str],
    *,
    top: PositiveInt = 3,
    invert: bool = False,
    checkpoint: str = "best",
    backend: DictConfig | None = None,
    device: Device = "auto",
    max_pixels: PositiveInt = 100_000_000,
) -> Iterator[Prediction]:
    """Show a run's network pictures of any size and kind.

    Args:
        run: The run's folder.
        images: PNG, JPEG and idx files, and folders with such.
        top: The most probable classes that are wanted of each.
        invert: Dark becomes light first: for what is dark on light.
        checkpoint: best, last, or a file.
        backend: A node of a config; None: the run's own.
        device: cpu, cuda, mps, or auto: a GPU where there is one.
        max_pixels: A larger picture is not decoded.

    Raises:
        ConfigError, CheckpointError: As `load_trained`; or a file or folder is not there.
    """
    trained = load_trained(run, checkpoint, backend=backend, device=device)
    return predictions(trained, files(images), top=top, invert=invert, max_pixels=max_pixels)


def files(images: str | list[str]) -> list[Path]:
    """All files with pictures that are named, or in folders that are; ConfigError if one is not
    there."""
    named = [images] if isinstance(images, str) else list(images)
    found: list[Path] = []
    problems = []
    for name in named:
        there = picture_files(Path(name)) if name and Path(name).exists() else []
        if not there:
            folder = bool(name) and Path(name).is_dir()
            why = "no PNG, JPEG or idx file is in it" if folder else "there is no such file"
            problems.append(f"images={name}: {why}")
        found += there
    if problems or not found:
        raise ConfigError(problems or ["images=[]: name a file or a folder"])
    return list(dict.fromkeys(found))


def predictions(
    trained: Trained, files: Iterable[Path], *, top: int, invert: bool, max_pixels: int
) -> Iterator[Prediction]:
    """One for each picture, in their order; of a file that cannot be read, one with its `error`."""
    shape = trained.data.shape
    waiting = _each(files, shape, invert, max_pixels)
    while batch := list(islice(waiting, BATCH)):
        good = [picture for picture in batch if isinstance(picture, Picture)]
        answers = iter(_classes(trained, good, top))
        for picture in batch:
            if isinstance(picture, Prediction):
                yield picture
            else:
                classes = next(answers)
                wrong = (
                    None if math.isfinite(classes[0][1]) else "the network's answer is no number"
                )
                yield Prediction(picture.name, classes, picture.pixels, wrong)


def _each(
    files: Iterable[Path], shape: tuple[int, int, int], invert: bool, max_pixels: int
) -> Iterator[Picture | Prediction]:
    for file in files:
        try:
            yield from read_pictures(file, shape, invert=invert, max_pixels=max_pixels)
        except Unreadable as error:
            yield Prediction(str(file), [], error=str(error))


def _classes(trained: Trained, shown: list[Picture], top: int) -> list[list[tuple[str, float]]]:
    if not shown:
        return []
    images = torch.from_numpy(np.stack([picture.pixels for picture in shown]))
    with evaluating(trained.network):
        logits = trained.network(trained.data.normalised(images, trained.device))
    best = logits.float().softmax(1).topk(min(top, trained.data.num_classes))
    names = trained.data.classes
    return [
        [(names[k], p) for k, p in zip(classes, shares, strict=True)]
        for classes, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def draw(found: list[Prediction], file: Path) -> None:
    """Pictures that were read, as the network saw them, with their class and its probability."""
    tiles = torch.from_numpy(np.stack([one.pixels for one in found if one.pixels is not None]))
    texts = [f"{Path(one.name).name[-18:]}\n{_first(one)}" for one in found]
    columns = min(8, len(found))
    picture = pictures.captioned(pictures.in_colour(tiles), texts, columns=columns)
    file.write_bytes(pictures.png(picture))


def _first(one: Prediction) -> str:
    name, probability = one.classes[0]
    return f"{name} {probability:.0%}"
