"""Benchmark of training speed against a plain PyTorch loop and a common Lightning script.

    python scripts/benchmark_training.py --rounds 5 --batch-sizes 64 512
    python scripts/benchmark_training.py --device cuda --epochs 20 --batch-sizes 512 2048 \
        --implementations bare native native+graphs im2col im2col+graphs naive naive+graphs

In one process, alternately, each implementation trains LeNet-5 on 55,000 images for one or several
epochs, and validates on the other 5,000 after each:

- native, im2col, naive: `cnntrain.training.train` with that backend and the default recipe, with
  all logging and checkpoints;
- +augmented: with horizontal flips, crops and erasing, as in experiment=lenet5;
- +graphs: with trainer.cuda_graphs=true scheduler.cycle_momentum=false;
- bare: a minimal PyTorch loop over float tensors on the device;
- usual: a Lightning script with torchvision's dataset, ToTensor, Normalize, a DataLoader with its
  defaults, and torchmetrics.

Reported are the wall time of fitting per epoch, and the time of the median epoch, which has no
first-time work and no pictures (those are written after 1, 2, 4, 8, ... epochs). On a shared
machine only the ratios are meaningful.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as lightning
import torch
import torchmetrics
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import FashionMNIST

from cnntrain.config import build, compose
from cnntrain.conv import BACKENDS
from cnntrain.models import LeNet5
from cnntrain.training import train

IMPLEMENTATIONS = [*BACKENDS, "bare", "usual"]
VARIANTS = {
    "augmented": ["data.hflip=0.5", "data.crop=1", "data.erase=0.1"],
    # The optimizer step is captured too, which needs constant betas of Adam.
    "graphs": ["trainer.cuda_graphs=true", "scheduler.cycle_momentum=false"],
}
CHOICES = [
    *IMPLEMENTATIONS,
    *(f"{backend}+{variant}" for backend in BACKENDS for variant in VARIANTS),
]


class Seconds(NamedTuple):
    """Seconds per epoch: the mean over a run, and the median epoch."""

    run: float
    epoch: float

    @classmethod
    def between(cls, times: list[float]) -> Seconds:
        seconds = [end - begin for begin, end in pairwise(times)]
        return cls(sum(seconds) / len(seconds), statistics.median(seconds))


class Clock(lightning.Callback):
    """Records when the epochs start, and when the last one ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.times.append(time.perf_counter())

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch:
            self.times.append(time.perf_counter())

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        self.times.append(time.perf_counter())


def cnntrain_run(
    implementation: str, batch_size: int, data: str, device: str, epochs: int
) -> Seconds:
    """A run of cnntrain with the default recipe."""
    backend, *variants = implementation.split("+")
    cfg = compose(
        [
            f"backend={backend}",
            f"data={data}",
            f"data.batch_size={batch_size}",
            f"trainer={'gpu' if device == 'cuda' else 'cpu'}",
            f"trainer.max_epochs={epochs}",
            *(option for variant in variants for option in VARIANTS[variant]),
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        train(cfg, Path(folder) / "run", callbacks=[clock := Clock()])
    return Seconds.between(clock.times)


def bare_loop(
    sets: dict[str, tuple[Tensor, Tensor]], batch_size: int, device: str, epochs: int
) -> Seconds:
    """A minimal PyTorch loop."""
    images, labels = (tensor.to(device) for tensor in sets["train"])
    val_images, val_labels = (tensor.to(device) for tensor in sets["val"])
    network = LeNet5().to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    times = [time.perf_counter()]
    for _ in range(epochs):
        network.train()
        for index in torch.randperm(len(labels), device=device).split(batch_size):
            loss = cross_entropy(network(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            for x, y in zip(val_images.split(1024), val_labels.split(1024), strict=True):
                logits = network(x)
                cross_entropy(logits, y), (logits.argmax(1) == y).sum()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    return Seconds.between(times)


class UsualModule(lightning.LightningModule):
    """The Lightning module of a tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.network = LeNet5()
        self.train_acc = torchmetrics.Accuracy("multiclass", num_classes=10)
        self.val_acc = torchmetrics.Accuracy("multiclass", num_classes=10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.network(images)
        loss = cross_entropy(logits, labels)
        self.train_acc(logits, labels)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        logits = self.network(images)
        self.val_acc(logits, labels)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def usual_script(
    sets: dict[str, tuple[Tensor, Tensor]], batch_size: int, device: str, epochs: int
) -> Seconds:
    """torchvision's dataset and transforms behind a DataLoader, in Lightning."""

    def loader(name: str, size: int, shuffle: bool) -> DataLoader:
        dataset = FashionMNIST.__new__(FashionMNIST)  # its __getitem__, without its download
        dataset.data, dataset.targets = sets[name]
        dataset.target_transform = None
        dataset.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.286,), (0.353,))]
        )
        return DataLoader(dataset, batch_size=size, shuffle=shuffle)

    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="gpu" if device == "cuda" else "cpu",
            default_root_dir=folder,
            callbacks=[clock := Clock()],
        )
        train_loader, val_loader = loader("train", batch_size, True), loader("val", 1024, False)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.fit(UsualModule(), train_loader, val_loader)
    return Seconds.between(clock.times)


def load(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The training and validation images, as floats in memory and as bytes."""
    data = build(compose([f"data={name}"]).data)
    data.prepare()
    mean, std = (torch.tensor(t).view(-1, 1, 1) for t in (data.mean, data.std))
    floats, raw = {}, {}
    for part, loader in [("train", data.train_loader(0, "cpu")), ("val", data.val_loader("cpu"))]:
        raw[part] = (loader.stored().squeeze(1), loader.labels)
        normalised = (loader.stored().float() / 255 - mean) / std
        floats[part] = (normalised, loader.labels)
    return floats, raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--implementations", nargs="+", default=IMPLEMENTATIONS, choices=CHOICES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--epochs", type=int, default=1, help="of each run")
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--csv", type=Path, default=Path("outputs/benchmark_training.csv"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("cnntrain").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")  # such as: the DataLoader should have workers
    floats, raw = load(arguments.data)
    rows = []
    for batch_size in arguments.batch_sizes:
        how = (arguments.device, arguments.epochs)
        calls: dict[str, Callable[[], Seconds]] = {
            "bare": partial(bare_loop, floats, batch_size, *how),
            "usual": partial(usual_script, raw, batch_size, *how),
        }
        for name in arguments.implementations:
            if name not in calls:
                calls[name] = partial(cnntrain_run, name, batch_size, arguments.data, *how)
        seconds: dict[str, list[Seconds]] = {name: [] for name in arguments.implementations}
        for number in range(arguments.rounds):
            for name, taken in seconds.items():
                taken.append(calls[name]())
            shown = ", ".join(f"{name} {taken[-1].run:.3g}" for name, taken in seconds.items())
            print(f"batch size {batch_size}, round {number + 1}, s/epoch: {shown}", flush=True)
        rows += summary(batch_size, seconds, len(raw["train"][1]))
    print_table(rows)
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    machine = f"{torch.get_num_threads()} threads"
    if arguments.device == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{arguments.csv}; torch {torch.__version__}, {machine}")


def summary(batch_size: int, seconds: dict[str, list[Seconds]], images: int) -> list[dict]:
    """Median times of each implementation, and its speed relative to others within a round."""
    rows = []
    for name, taken in seconds.items():
        row: dict[str, Any] = {"batch_size": batch_size, "implementation": name}
        row["seconds_per_epoch"] = round(statistics.median(t.run for t in taken), 4)
        row["seconds_of_the_median_epoch"] = round(statistics.median(t.epoch for t in taken), 4)
        row["images_per_second"] = round(images / row["seconds_per_epoch"])
        for other in ("bare", "usual", "native"):
            if other in seconds:
                pairs = list(zip(seconds[other], taken, strict=True))
                ratios = [theirs.run / own.run for theirs, own in pairs]
                row[f"to_{other}"] = round(statistics.median(ratios), 3)
                row[f"to_{other}_lowest"] = round(min(ratios), 3)
                row[f"to_{other}_highest"] = round(max(ratios), 3)
                ratios = [theirs.epoch / own.epoch for theirs, own in pairs]
                row[f"to_{other}_median_epoch"] = round(statistics.median(ratios), 3)
        row["rounds"] = len(taken)
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table("batch size", "", "images/s", "s/epoch", "median epoch", box=box.SIMPLE_HEAD)
    others = [name for name in ("bare", "usual", "native") if f"to_{name}" in rows[0]]
    for name in others:
        table.add_column(f"times {name} (lowest to highest), median epoch")
    for row in rows:
        ratios = [
            f"{row[f'to_{o}']:.2f} ({row[f'to_{o}_lowest']:.2f} to {row[f'to_{o}_highest']:.2f}), "
            f"{row[f'to_{o}_median_epoch']:.2f}"
            for o in others
        ]
        taken = f"{row['seconds_per_epoch']:.3g}", f"{row['seconds_of_the_median_epoch']:.3g}"
        speed = f"{row['images_per_second']:,}"
        table.add_row(str(row["batch_size"]), row["implementation"], speed, *taken, *ratios)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
