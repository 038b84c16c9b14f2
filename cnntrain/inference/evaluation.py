"""Evaluation of a trained network: accuracy, per-class metrics, confusion matrix, mistakes."""

import contextlib
import html
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from torch import Tensor

from cnntrain import pictures
from cnntrain.atomic import write_json
from cnntrain.config import ConfigError, as_config_error, build
from cnntrain.inference.trained import Device, Trained, load_trained
from cnntrain.interruption import interruptible
from cnntrain.terminal import png_html, table_html
from cnntrain.training.checkpoint_file import CheckpointError
from cnntrain.training.insights import worst
from cnntrain.training.metrics import Predictions
from cnntrain.training.trainer import Precision

MAX_MISTAKES = 40  # reported and drawn
MAX_CLASSES = 100  # shown in a notebook
AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`."""

    trained: Trained
    split: str
    tta: str | None
    loss: float  # mean over the images
    accuracy: float  # from 0 to 1
    outcome: Predictions  # with `class_means`: balanced accuracy and macro F1
    images: Tensor  # uint8 (N, C, H, W), as stored in the data set
    positions: Tensor  # index of each image in the files of the data set (N,)
    names: list[str] | None  # of the file of each image, if it has one

    @property
    def classes(self) -> list[dict[str, Any]]:
        """Name, number of images, precision, recall and F1 of each class; None without images."""
        metrics = {name: values.tolist() for name, values in self.outcome.per_class.items()}
        counts = self.outcome.support.tolist()
        return [
            {"class": name, "images": counts[i]}
            | {m: v[i] if counts[i] else None for m, v in metrics.items()}
            for i, name in enumerate(self.trained.data.classes)
        ]

    @property
    def mistakes(self) -> list[dict[str, Any]]:
        """Wrong predictions with the highest probability."""
        names, outcome = self.trained.data.classes, self.outcome
        return [
            {
                "index": int(self.positions[i]),
                **({"image": self.names[i]} if self.names else {}),
                "class": names[int(outcome.labels[i])],
                "predicted": names[int(outcome.predicted[i])],
                "probability": float(outcome.confidence[i]),
            }
            for i in outcome.mistakes(MAX_MISTAKES).tolist()
        ]

    def __repr__(self) -> str:
        trained, tta = self.trained, f", tta={self.tta}" if self.tta else ""
        return (
            f"Evaluation({str(trained.run)!r}, split={self.split}{tta}: accuracy "
            f"{self.accuracy:.2%}, loss {self.loss:.4f}, {len(self.images):,} images;\n"
            f"  {trained.checkpoint.name} on {trained.backend}, {trained.device})"
        )

    def _repr_html_(self) -> str:
        rows = [
            [f"{value:.4f}" if isinstance(value, float) else value for value in row.values()]
            for row in self.classes[:MAX_CLASSES]
        ]
        table = table_html(("class", "images", "precision", "recall", "F1"), rows)
        picture = pictures.confusion(*self.outcome.confusion, self.trained.data.classes, self.split)
        return f"<pre>{html.escape(repr(self))}</pre>{table}{png_html(pictures.png(picture))}"

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write evaluation.json, confusion.png and, if there are mistakes, mistakes.png."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        trained, names, confusion = self.trained, self.trained.data.classes, self.outcome.confusion
        pairs, counts = (values.tolist() for values in confusion)
        content = {
            "run": str(trained.run),
            "checkpoint": str(trained.checkpoint),
            "epoch": trained.epoch,
            "backend": trained.cfg.backend._target_,
            "split": self.split,
            "tta": self.tta,
            "images": len(self.images),
            "accuracy": self.accuracy,
            **self.outcome.class_means,
            "loss": self.loss,
            "calibration_error": self.outcome.calibration_error,
            "classes": self.classes,
            # [class, predicted class, images], of the pairs that occur
            "confusion": [[*pair, n] for pair, n in zip(pairs, counts, strict=True)],
            "mistakes": self.mistakes,
        }
        write_json(folder / "evaluation.json", content)
        (folder / "mistakes.png").unlink(missing_ok=True)  # of an earlier evaluation
        images = {"confusion.png": pictures.confusion(*confusion, names, self.split)}
        if self.mistakes:
            stored = self.images.__getitem__
            shown = worst(self.outcome, stored, names, MAX_MISTAKES, self.names)
            images["mistakes.png"] = shown
        for name, picture in images.items():
            (folder / name).write_bytes(pictures.png(picture))
        return [folder / name for name in ("evaluation.json", *images)]


@interruptible()
@torch.no_grad()
def evaluate(
    run: str | os.PathLike[str] | Trained,
    *,
    checkpoint: str | os.PathLike[str] = "best",
    split: Literal["test", "val"] = "test",
    backend: str | DictConfig | None = None,
    tta: Literal["flip"] | None = None,
    precision: Precision | None = None,
    device: Device = "auto",
    root: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Evaluate the network of a run on a split of its data set.

    Args:
        run, checkpoint, backend, device, root: See `load_trained`.
        split: test, or val: the part of the training set that the run validated with.
        tta: flip: mean of the probabilities of an image and its horizontal flip.
        precision: As `trainer.precision`; None: that of the run.

    Raises:
        ConfigError, CheckpointError: See `load_trained`; or the loss is not finite.
        DataError: The data cannot be read or downloaded.
    """
    trained = load_trained(run, checkpoint, backend=backend, device=device, root=root)
    with as_config_error("loss"):
        criterion = build(trained.cfg.loss).eval()
    data, kind = trained.data, trained.device
    dtype = AUTOCAST.get(str(evaluation_precision(trained, precision)))
    autocast = torch.autocast(kind.type, dtype) if dtype else contextlib.nullcontext()
    loader = data.test_loader(kind) if split == "test" else data.val_loader(kind)
    loss, correct, answers = 0.0, 0, []
    with autocast:
        for images, labels in loader:
            logits = trained.network(images)
            if tta:  # the logarithm of the mean of both probabilities
                both = torch.stack([logits, trained.network(images.flip(-1))])
                logits = both.float().log_softmax(2).logsumexp(0) - math.log(2)
            loss += float(criterion(logits, labels)) * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
            answers.append((logits, labels))
    count = len(loader.labels)
    if not math.isfinite(loss):
        raise CheckpointError(
            f"{trained.checkpoint}: with these weights, on {trained.backend}, the loss is {loss}"
        )
    outcome = Predictions.of(answers)
    stored = loader.stored().cpu()
    names, means = data.names(split), (loss / count, correct / count)
    return Evaluation(trained, split, tta, *means, outcome, stored, loader.positions, names)


def evaluation_precision(trained: Trained, precision: Precision | None) -> Precision:
    """`precision`, or that of the run; ConfigError if the device does not support it."""
    result: Precision = precision or trained.cfg.trainer.get("precision", 32)
    if str(result) == "16-mixed" and trained.device.type == "cpu":
        raise ConfigError(["precision=16-mixed: the CPU has no fast float16; add precision=32"])
    return result
