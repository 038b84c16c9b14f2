"""Prediction of the classes of images by a trained network."""

import html
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from pydantic import PositiveInt

from cnntrain import pictures
from cnntrain.inference.images import ImageSource, InputImage, find_images, read_images
from cnntrain.inference.trained import Device, Trained, load_trained
from cnntrain.interruption import interruptible
from cnntrain.models.introspection import evaluation_mode
from cnntrain.terminal import png_html, table_html

BATCH_SIZE = 256
MAX_DRAWN = 80  # images in predictions.png
MAX_SHOWN = 20  # images of a list in a notebook


@dataclass(frozen=True)
class Prediction:
    """Most probable classes of an image, or the error that it cannot be read."""

    name: str
    classes: list[tuple[str, float]]  # with probabilities, the most probable first
    pixels: np.ndarray | None = None  # input of the network, uint8 (C, H, W)
    error: str | None = None
    # Whether the border of the image is light, but the background of the training images dark.
    light_border: bool = False

    def __repr__(self) -> str:
        classes = ", ".join(f"{name} {p:.1%}" for name, p in self.classes)
        return f"Prediction({self.name!r}: {self.error or classes})"

    def _repr_html_(self) -> str:
        image = ""
        if self.pixels is not None:
            tile = pictures.in_colour(torch.tensor(self.pixels[None]))[0]
            image = png_html(pictures.png(tile.movedim(0, -1).numpy()))
        rows = ((name, f"{p:.1%}") for name, p in self.classes)
        text = f"<br>{html.escape(self.error)}" if self.error else table_html([], rows)
        return f"<div>{html.escape(self.name)}<br>{image}{text}</div>"

    def json(self) -> str:
        """JSON without line breaks."""
        if self.error:
            return json.dumps({"image": self.name, "error": self.error})
        classes = [{"class": name, "probability": p} for name, p in self.classes]
        return json.dumps({"image": self.name, "predictions": classes})


class PredictionList(list[Prediction]):
    """List whose first images are shown in a notebook."""

    def _repr_html_(self) -> str:
        more = f"... and {len(self) - MAX_SHOWN:,} more" if len(self) > MAX_SHOWN else ""
        return "".join(one._repr_html_() for one in self[:MAX_SHOWN]) + more


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
) -> PredictionList:
    """Predict the classes of images of any size with the network of a run.

    Arrays and tensors are not normalised: uint8 from 0 to 255, or floats from 0 to 1. One image is
    (H, W), or (H, W, C) in an array and (C, H, W) in a tensor; several are (N, C, H, W) or, where C
    does not fit, (N, H, W, C) or grey (N, H, W). C is 1, 3 or 4: grey, RGB, RGBA. Arrays (3, H, W)
    and (4, H, W) raise an error.

    Args:
        run, checkpoint, backend, device: See `load_trained`.
        images: A path of an image or IDX file or of a folder with such files, a PIL image, an
            array, a tensor, or an iterable of any of these.
        top: Number of classes of each image.
        invert: Whether dark becomes light first, for images that are dark on light.

    Returns:
        One for each image, in the same order. Files that cannot be read have an `error`.

    Raises:
        ConfigError, CheckpointError: See `load_trained` and `find_images`.
    """
    sources = find_images(images)
    trained = load_trained(run, checkpoint, backend=backend, device=device)
    return PredictionList(predictions(trained, sources, top=top, invert=invert))


def predictions(
    trained: Trained, sources: Iterable[ImageSource], *, top: int, invert: bool
) -> Iterator[Prediction]:
    """Predictions of the images, one after the other; see `predict`."""
    decoder = replace(trained.data.decoder, invert=invert)
    images = (image for source in sources for image in read_images(source, decoder))
    # Where the standard deviation exceeds the mean, most pixels are dark, as the background of
    # digits and clothes; in photographs it is about half the mean.
    mean, std = trained.data.mean, trained.data.std
    light_on_dark = all(m < s for m, s in zip(mean, std, strict=True)) and not invert
    while batch := list(islice(images, BATCH_SIZE)):
        classes = iter(_classify(trained, batch, top))
        for image in batch:
            best, error = [] if image.error else next(classes), image.error
            if best and not math.isfinite(best[0][1]):
                error = "the output of the network is not finite"
            hint = light_on_dark and image.light_border
            yield Prediction(image.name, best, image.pixels, error, hint)


def _classify(
    trained: Trained, images: list[InputImage], top: int
) -> list[list[tuple[str, float]]]:
    """Names and probabilities of the most probable classes of the images that can be read."""
    pixels = [image.pixels for image in images if image.pixels is not None]
    if not pixels:
        return []
    inputs = trained.data.normalised(torch.from_numpy(np.stack(pixels)), trained.device)
    with evaluation_mode(trained.network):
        logits = trained.network(inputs)
    best = logits.float().softmax(1).topk(min(top, trained.data.num_classes))
    names = trained.data.classes
    return [
        [(names[k], p) for k, p in zip(classes, shares, strict=True)]
        for classes, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def draw(predictions: list[Prediction], file: Path) -> None:
    """Draw the inputs of the network with the most probable class, as a PNG file."""
    tiles = torch.from_numpy(np.stack([p.pixels for p in predictions if p.pixels is not None]))
    texts = [f"{Path(p.name).name}\n{p.classes[0][0]} {p.classes[0][1]:.0%}" for p in predictions]
    columns = min(8, len(texts))
    sheet = pictures.captioned(pictures.in_colour(tiles), texts, columns=columns)
    file.write_bytes(pictures.png(sheet))
