"""How fast cnntrain trains beside a bare PyTorch loop and the usual DataLoader script.

    python scripts/benchmark_training.py --rounds 5 --batch-sizes 64 512

In one process and in turns, each on one epoch of LeNet-5 on the 55,000 training images with the
5,000 of validation after it: (a) `cnntrain.training.train`, as a user runs it, with all logging
and checkpoints; (b) a bare PyTorch loop over float tensors in memory; (c) a Lightning script with
torchvision's dataset, ToTensor, Normalize and a DataLoader. What counts is the wall time from the
start of fitting to its end. Machines are noisy: only the ratios mean something.
"""

import argparse
import csv
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
import torchmetrics
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import FashionMNIST

from cnntrain.config import build, compose
from cnntrain.models import LeNet5
from cnntrain.training import train


def cnntrain_run(backend: str, batch_size: int, data: str) -> float:
    """(a) images/s of a run with its default recipe."""
    cfg = compose(
        [
            f"backend={backend}",
            f"data={data}",
            f"data.batch_size={batch_size}",
            "trainer=cpu",
            "trainer.max_epochs=1",
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train(cfg, Path(folder) / "run")
    return result.images_per_second


def bare_loop(sets: dict[str, tuple[Tensor, Tensor]], batch_size: int) -> float:
    """(b) images/s of the shortest loop that does the same job."""
    images, labels = sets["train"]
    val_images, val_labels = sets["val"]
    network = LeNet5()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    started = time.perf_counter()
    network.train()
    for index in torch.randperm(len(labels)).split(batch_size):
        loss = cross_entropy(network(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        for x, y in zip(val_images.split(1024), val_labels.split(1024), strict=True):
            logits = network(x)
            cross_entropy(logits, y), (logits.argmax(1) == y).sum()
    return len(labels) / (time.perf_counter() - started)


class UsualModule(lightning.LightningModule):
    """What a tutorial writes."""

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
        self.log("train_loss", loss)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        logits = self.network(images)
        self.val_acc(logits, labels)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def usual_script(sets: dict[str, tuple[Tensor, Tensor]], batch_size: int) -> float:
    """(c) images/s of torchvision's dataset and transforms behind a DataLoader, in Lightning."""

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
            max_epochs=1,
            accelerator="cpu",
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        train_loader, val_loader = loader("train", batch_size, True), loader("val", 1024, False)
        started = time.perf_counter()
        trainer.fit(UsualModule(), train_loader, val_loader)
        seconds = time.perf_counter() - started
    return len(sets["train"][1]) / seconds


def load(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The training and validation images, as floats in memory and as bytes."""
    data = build(compose([f"data={name}"]).data)
    data.prepare()
    mean, std = (torch.tensor(t).view(-1, 1, 1) for t in (data.mean, data.std))
    floats, raw = {}, {}
    for part, loader in [("train", data.train_loader(0, "cpu")), ("val", data.val_loader("cpu"))]:
        raw[part] = (loader.images.squeeze(1), loader.labels)
        normalised = (loader.images.float() / 255 - mean) / std
        floats[part] = (normalised, loader.labels)
    return floats, raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--backend", default="native")
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--csv", type=Path, default=Path("outputs/benchmark_training.csv"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    floats, raw = load(arguments.data)
    rows = []
    for batch_size in arguments.batch_sizes:
        contenders: dict[str, Callable[[], float]] = {
            "cnntrain": partial(cnntrain_run, arguments.backend, batch_size, arguments.data),
            "bare": partial(bare_loop, floats, batch_size),
            "usual": partial(usual_script, raw, batch_size),
        }
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for round_ in range(arguments.rounds):
            for name, contender in contenders.items():
                speeds[name].append(contender())
            row = {"batch_size": batch_size, "round": round_} | {
                n: s[-1] for n, s in speeds.items()
            }
            rows.append(row)
            print(row, flush=True)
        median = {name: statistics.median(values) for name, values in speeds.items()}
        per_round = [a / b for a, b in zip(speeds["cnntrain"], speeds["bare"], strict=True)]
        print(
            f"batch size {batch_size}, median of {arguments.rounds} rounds: "
            + ", ".join(f"{name} {speed:,.0f} images/s" for name, speed in median.items())
            + f"; cnntrain is {median['cnntrain'] / median['bare']:.2f} x the bare loop "
            f"(rounds {min(per_round):.2f} to {max(per_round):.2f}), "
            f"{median['cnntrain'] / median['usual']:.2f} x the usual script",
            flush=True,
        )
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {arguments.csv}; torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
