"""How good a trained network is: `cnntrain evaluate`."""

import html
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as lightning
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from cnntrain import pictures
from cnntrain.atomic import write_json
from cnntrain.config import ConfigError, as_config_error, build
from cnntrain.data import Loader
from cnntrain.inference.trained import Device, Trained, load_trained
from cnntrain.interruption import interruptible
from cnntrain.notebook import png_html, table_html
from cnntrain.training.building import quieten_lightning
from cnntrain.training.checkpoint_file import CheckpointError
from cnntrain.training.classifier import Classifier
from cnntrain.training.insights import worst
from cnntrain.training.outcome import Outcome
from cnntrain.training.trainer import Precision

MISTAKES = 40  # the worst, shown and listed
SHOWN = 100  # classes in a notebook; the confusion of more is not drawn there


class Flipped(nn.Module):
    """The mean of a network's answers to images and to their mirror images, (N, C, H, W).

    The answers are probabilities; their logarithms come out, so that softmax gives them back.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        here = self.network(images).float().log_softmax(1)
        mirrored = self.network(images.flip(-1)).float().log_softmax(1)
        return torch.stack([here, mirrored]).logsumexp(0) - torch.log(here.new_tensor(2.0))


@dataclass(frozen=True)
class Evaluation:
    """What came out; `loss` in nats, `accuracy` from 0 to 1."""

    trained: Trained
    split: str
    tta: str | None
    loss: float
    accuracy: float
    outcome: Outcome
    images: Tensor  # uint8 (N, C, H, W), as they are stored
    positions: Tensor  # of each in the data set's own files (N,)

    @property
    def classes(self) -> list[dict[str, Any]]:
        """Of each class its name, number of images, precision, recall and F1; these are None where
        it has no images."""
        measures = {name: values.tolist() for name, values in self.outcome.per_class.items()}
        counts = self.outcome.support.tolist()
        return [
            {"class": name, "images": counts[i]}
            | {m: v[i] if counts[i] else None for m, v in measures.items()}
            for i, name in enumerate(self.trained.data.classes)
        ]

    @property
    def mistakes(self) -> list[dict[str, Any]]:
        """The wrong answers given with the most confidence."""
        names, outcome = self.trained.data.classes, self.outcome
        return [
            {
                "index": int(self.positions[i]),
                "class": names[int(outcome.labels[i])],
                "predicted": names[int(outcome.predicted[i])],
                "probability": float(outcome.confidence[i]),
            }
            for i in outcome.mistakes(MISTAKES).tolist()
        ]

    def __repr__(self) -> str:
        trained, flip = self.trained, f", tta={self.tta}" if self.tta else ""
        return (
            f"Evaluation({str(trained.run)!r}, split={self.split}{flip}: accuracy "
            f"{self.accuracy:.2%}, loss {self.loss:.4f}, {len(self.images):,} images;\n"
            f"  {trained.checkpoint.name} on {trained.backend}, {trained.device})"
        )

    def _repr_html_(self) -> str:
        names, picture = self.trained.data.classes, ""
        rows = [
            [f"{value:.4f}" if isinstance(value, float) else value for value in row.values()]
            for row in self.classes[:SHOWN]
        ]
        if len(names) <= SHOWN:
            picture = png_html(
                pictures.png(pictures.confusion(self.outcome.confusion, names, self.split))
            )
        head = ("class", "images", "precision", "recall", "F1")
        return f"<pre>{html.escape(repr(self))}</pre>{table_html(head, rows)}{picture}"

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """evaluation.json, confusion.png and mistakes.png, if any were made; the files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        trained, names = self.trained, self.trained.data.classes
        confusion = self.outcome.confusion
        pairs, counts = confusion.indices().T.tolist(), confusion.values().tolist()
        write_json(
            folder / "evaluation.json",
            {
                "run": str(trained.run),
                "checkpoint": str(trained.checkpoint),
                "epoch": trained.epoch,
                "backend": trained.cfg.backend._target_,
                "split": self.split,
                "tta": self.tta,
                "images": len(self.images),
                "accuracy": self.accuracy,
                "loss": self.loss,
                "calibration_error": self.outcome.calibration_error,
                "classes": self.classes,
                # [class, predicted class, images], of the pairs that there are
                "confusion": [[*pair, n] for pair, n in zip(pairs, counts, strict=True)],
                "mistakes": self.mistakes,
            },
        )
        (folder / "mistakes.png").unlink(missing_ok=True)  # of an earlier one
        drawn = {"confusion.png": pictures.confusion(confusion, names, self.split)}
        if self.mistakes:
            drawn["mistakes.png"] = worst(self.outcome, self.images.__getitem__, names, MISTAKES)
        for name, picture in drawn.items():
            (folder / name).write_bytes(pictures.png(picture))
        return [folder / name for name in ("evaluation.json", *drawn)]


@interruptible()
def evaluate(
    run: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] = "best",
    split: Literal["test", "val"] = "test",
    backend: str | DictConfig | None = None,
    tta: Literal["flip"] | None = None,
    precision: Precision | None = None,
    device: Device = "auto",
    root: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Show a run's network all images of a split, and add up what it says.

    Args:
        run: The run's folder, or a Result.
        checkpoint: best, last, or a file.
        split: The test set, or the part of the training set that the run validated with.
        backend: A choice by name, or a node of a config; None: the run's own.
        tta: flip: the mean of the answers to an image and to its mirror image.
        precision: As `trainer.precision`; None: the run's own.
        device: cpu, cuda, mps, or auto: a GPU where there is one.
        root: The data set's folder, where that is not the one that the run had.

    Raises:
        ConfigError, CheckpointError: As `load_trained`; or the loss is no number.
        DataError: The data cannot be had.
    """
    trained = load_trained(run, checkpoint, backend=backend, device=device, root=root)
    return evaluate_trained(trained, split=split, tta=tta, precision=precision)


def evaluate_trained(
    trained: Trained,
    *,
    split: Literal["test", "val"] = "test",
    tta: Literal["flip"] | None = None,
    precision: Precision | None = None,
) -> Evaluation:
    """As `evaluate`, of a network that is loaded."""
    quieten_lightning()
    cfg, data, device = trained.cfg, trained.data, trained.device
    with as_config_error("loss"):
        loss = build(cfg.loss)
    network = Flipped(trained.network) if tta == "flip" else trained.network
    module = Classifier(network, loss, torch.optim.SGD)
    trainer = lightning.Trainer(
        accelerator=device.type,
        devices=1,
        precision=precision_for(trained, precision),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader: Loader = data.test_loader(device) if split == "test" else data.val_loader(device)
    trainer.test(module, loader, verbose=False)
    totals = module.totals["test"].metrics("test")
    if not math.isfinite(totals["test/loss"]):
        raise CheckpointError(
            f"{trained.checkpoint}: with these weights, on {trained.backend}, the loss is "
            f"{totals['test/loss']}"
        )
    assert module.outcome
    positions = torch.arange(len(loader.labels))
    if split == "val":
        positions = torch.from_numpy(data.split()[1])
    return Evaluation(
        trained,
        split,
        tta,
        totals["test/loss"],
        totals["test/acc"],
        module.outcome,
        loader.stored().cpu(),
        positions,
    )


def precision_for(trained: Trained, wanted: Precision | None) -> Any:
    """What is wanted, or the run's own; ConfigError for what the device cannot compute with, as
    nothing falls back in silence."""
    precision = wanted or trained.cfg.trainer.get("precision", 32)
    if str(precision) == "16-mixed" and trained.device.type == "cpu":
        raise ConfigError(
            ["precision=16-mixed: the CPU has no float16 to speak of; add precision=32"]
        )
    return precision
