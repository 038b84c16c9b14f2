"""What a trained network takes pictures for: `cnntrain predict`."""

import html
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from pydantic import PositiveInt

from cnntrain import pictures
from cnntrain.config import ConfigError
from cnntrain.inference.images import (
    Given,
    Picture,
    Unreadable,
    given_pictures,
    picture_files,
    read_pictures,
)
from cnntrain.inference.trained import Device, Trained, load_trained
from cnntrain.interruption import interruptible
from cnntrain.models.introspection import evaluation_mode
from cnntrain.notebook import png_html, table_html

BATCH = 256
DRAWN = 80  # pictures in the grid
SHOWN = 20  # of a list, in a notebook


@dataclass(frozen=True)
class Prediction:
    """Of one picture the most probable classes, with probabilities; or why it has none.

    `dark_on_light`: its border is lighter than its middle, and the network was trained on what is
    light on dark, so that `invert=True` is probably missing.
    """

    name: str
    classes: list[tuple[str, float]]
    pixels: np.ndarray | None = None  # uint8 (C, H, W), as the network saw it
    error: str | None = None
    dark_on_light: bool = False

    def __repr__(self) -> str:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.classes)
        return f"Prediction({self.name!r}: {self.error or shares})"

    def _repr_html_(self) -> str:
        seen = ""
        if self.pixels is not None:
            tile = torch.tensor(self.pixels[None])
            seen = png_html(pictures.png(pictures.grid(pictures.in_colour(tile), 1)))
        rows = ((name, f"{share:.1%}") for name, share in self.classes)
        said = f"<br>{html.escape(self.error)}" if self.error else table_html([], rows)
        return f"<div>{html.escape(self.name)}<br>{seen}{said}</div>"

    def json(self) -> str:
        """One line."""
        if self.error:
            return json.dumps({"image": self.name, "error": self.error})
        answers = [{"class": name, "probability": p} for name, p in self.classes]
        return json.dumps({"image": self.name, "predictions": answers})


class Predictions(list[Prediction]):
    """A list that a notebook shows with its first pictures."""

    def _repr_html_(self) -> str:
        more = f"... and {len(self) - SHOWN:,} more" if len(self) > SHOWN else ""
        return "".join(one._repr_html_() for one in self[:SHOWN]) + more


@interruptible()
def predict(
    run: str | os.PathLike[str],
    images: Any,
    *,
    top: PositiveInt = 3,
    invert: bool = False,
    checkpoint: str | os.PathLike[str] = "best",
    backend: str | DictConfig | None = None,
    device: Device = "auto",
    max_pixels: PositiveInt = 100_000_000,
) -> Predictions:
    """The classes of pictures of any size and kind by a run's network, in their order.

    An array or tensor holds uint8 from 0 to 255, or floats from 0 to 1, not normalised. One image
    is (H, W), or (H, W, C) in an array and (C, H, W) in a tensor; several are (N, C, H, W) or
    (N, H, W, C), in an array also (N, H, W). C is 1, 3 or 4: grey, RGB, RGBA.

    Args:
        run: The run's folder, or a Result.
        images: A path of a PNG, JPEG or idx file or of a folder with such, a PIL image, an array,
            a tensor, or an iterable of any of these.
        top: The most probable classes that are wanted of each.
        invert: Dark becomes light first: for what is dark on light.
        checkpoint: best, last, or a file.
        backend: A choice by name, or a node of a config; None: the run's own.
        device: cpu, cuda, mps, or auto: a GPU where there is one.
        max_pixels: A larger picture is not decoded.

    Raises:
        ConfigError, CheckpointError: As `load_trained`; or a file or folder is not there, or an
            array's shape, dtype or values are none of these.
    """
    given = list(given_pictures(images))
    paths = [one for one in given if isinstance(one, Path)]
    if paths or not given:
        files(paths)  # all are there
    each = (
        picture
        for one in given
        for picture in (picture_files(one) if isinstance(one, Path) else [one])
    )
    trained = load_trained(run, checkpoint, backend=backend, device=device)
    return Predictions(predictions(trained, each, top=top, invert=invert, max_pixels=max_pixels))


def files(images: str | Iterable[str | Path]) -> list[Path]:
    """All files with pictures that are named, or in folders that are; ConfigError if one is not
    there."""
    named = [images] if isinstance(images, str) else [str(name) for name in images]
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
    trained: Trained, files: Iterable[Given], *, top: int, invert: bool, max_pixels: int
) -> Iterator[Prediction]:
    """One for each picture, in their order; of a file that cannot be read, one with its `error`."""
    shape = trained.data.shape
    waiting = _each(files, shape, invert, max_pixels)
    # Where the deviation exceeds the mean most pixels are dark, as the background of digits and
    # clothes; photographs that fill their frame have a deviation of half their mean.
    mean, std = trained.data.mean, trained.data.std
    light_on_dark = all(m < s for m, s in zip(mean, std, strict=True)) and not invert
    dark = max(mean) / 2
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
                hint = light_on_dark and picture.border > dark
                yield Prediction(picture.name, classes, picture.pixels, wrong, hint)


def _each(
    files: Iterable[Given], shape: tuple[int, int, int], invert: bool, max_pixels: int
) -> Iterator[Picture | Prediction]:
    for file in files:
        try:
            yield from read_pictures(file, shape, invert=invert, max_pixels=max_pixels)
        except Unreadable as error:
            name = file if isinstance(file, Path) else file[0]
            yield Prediction(str(name), [], error=str(error))


def _classes(trained: Trained, shown: list[Picture], top: int) -> list[list[tuple[str, float]]]:
    if not shown:
        return []
    images = torch.from_numpy(np.stack([picture.pixels for picture in shown]))
    with evaluation_mode(trained.network):
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
    texts = [f"{Path(one.name).name}\n{_first(one)}" for one in found]
    columns = min(8, len(found))
    picture = pictures.captioned(pictures.in_colour(tiles), texts, columns=columns)
    file.write_bytes(pictures.png(picture))


def _first(one: Prediction) -> str:
    name, probability = one.classes[0]
    return f"{name} {probability:.0%}"
