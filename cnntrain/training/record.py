"""What a run writes down while it trains: metrics.csv, TensorBoard and a line an epoch."""

import csv
import io
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning

from cnntrain.atomic import replacing
from cnntrain.terminal import fit_lines, left_out_lines
from cnntrain.training.insights import Insights
from cnntrain.training.tensorboard import METRICS, TensorBoard
from cnntrain.training.trainer import Trainer

log = logging.getLogger(__name__)

COLUMNS = ["epoch", "step", "lr", *METRICS, "grad_norm"]

# What a narrow terminal does without, the first one first.
OPTIONAL = ("images/s", "seconds", "train loss", "train acc", "val loss")


class Record(lightning.Callback):
    """Writes a row of metrics.csv, the scalars of TensorBoard and a line of text every epoch.

    In TensorBoard an epoch's metrics stand over the epoch, a step's over the step. It sorts tags by
    name: all but losses and accuracies begin with something behind `val/`.
    """

    def __init__(self, directory: Path, tensorboard: TensorBoard, insights: Insights):
        self.file, self.tensorboard = directory / "metrics.csv", tensorboard
        self.insights = insights
        self.epochs: list[dict[str, Any]] = []  # the rows written
        self.images = 0  # trained on, over all epochs
        self.logged = 0  # the last step logged: accumulation has several batches to a step
        # Seconds; what processes before this one took counts as well.
        self.in_all, self.in_epoch, self.in_training = 0.0, 0.0, 0.0
        self.in_data = 0.0  # of the epoch's training, making batches
        self.clock: float | None = None  # when the seconds were last added up
        self.data_clock = 0.0  # and those of the loader
        self.loader: Any = None
        self.reported = False  # which parts of the line the terminal has no room for

    def state_dict(self) -> dict[str, Any]:
        self._count()
        return {
            "epochs": self.epochs,
            "images": self.images,
            "logged": self.logged,
            "seconds": [self.in_all, self.in_epoch, self.in_training, self.in_data],
            "tensorboard": self.tensorboard.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.images = state["epochs"], state["images"]
        self.logged = state["logged"]
        if self.epochs:
            self.tensorboard.first_epoch = self.epochs[0]["epoch"]
        seconds = [*state["seconds"], 0.0]  # earlier versions did not look at the loader
        self.in_all, self.in_epoch, self.in_training, self.in_data = seconds[:4]

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.clock = time.perf_counter()
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(self.epochs)  # what an interrupted run had written beyond is cut off
        with replacing(self.file) as file:
            file.write(text.getvalue().encode())

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.loader = trainer.train_dataloader
        self.data_clock = self.loader.seconds

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self._count()
        self.in_epoch = self.in_training = self.in_data = 0.0

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        module.tallies["train"].metrics("train")  # waits for the device: the time is honest
        self._count()
        self.in_training = self.in_epoch

    def _count(self) -> None:
        """Add the seconds since the last call."""
        now = time.perf_counter()
        passed = now - (self.clock if self.clock is not None else now)
        self.in_all, self.in_epoch, self.clock = self.in_all + passed, self.in_epoch + passed, now
        if self.loader is not None:
            seconds = self.loader.seconds
            self.in_data, self.data_clock = self.in_data + seconds - self.data_clock, seconds

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.logged or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self.logged = step
        loss, lr = float(module.step_loss), learning_rate(trainer)
        scalars = {"train/loss_step": loss, "weight_update/lr": lr}
        if module.grad_norm is not None:
            scalars["weight_update/grad_norm"] = float(module.grad_norm)
        self.tensorboard.log_metrics(scalars, step)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        train, val = module.totals["train"], module.totals.get("val")
        row = {
            "epoch": self.tensorboard.numbered(trainer.current_epoch),
            "step": trainer.global_step,
            "lr": learning_rate(trainer),
            **train.metrics("train"),
            **(val.metrics("val") if val else {}),
            "grad_norm": float(module.grad_norm) if module.grad_norm is not None else None,
        }
        self.epochs.append(row)
        self.images += train.images
        with self.file.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        self._count()
        seconds = self.in_training or self.in_epoch
        speed = train.images / seconds
        metrics = {name: row[name] for name in METRICS if name in row}
        if self.insights.speed:
            metrics["wall_time/images_per_second"] = speed
            metrics["wall_time/data_share"] = self.in_data / seconds
        self.tensorboard.log_metrics(metrics, row["epoch"])
        for stage in ("train", "val") if self.insights.charts else ():
            values = {m: row[f"{stage}/{m}"] for m in ("loss", "acc") if f"{stage}/{m}" in row}
            self.tensorboard.curve(stage, values, row["epoch"])
        self.tensorboard.experiment.flush()  # to be seen now, by whoever is watching

        digits = len(str(trainer.max_epochs))
        epoch = f"epoch {trainer.current_epoch + 1:>{digits}}/{trainer.max_epochs}"
        line = partial(_line, epoch, row, speed, self.in_epoch)
        fitted, left_out = fit_lines(line, OPTIONAL)
        if not self.reported:
            self.reported = True
            fitted = "\n".join([fitted, *left_out_lines(left_out, " or train.log")])
        log.info(line([]), extra={"terminal": fitted})

    def so_far(self) -> dict[str, Any]:
        """What result.json says of a run that has not come to its end."""
        last = self.epochs[-1] if self.epochs else {}
        return {
            "metrics": {name: last[name] for name in METRICS if name in last},
            "epochs": len(self.epochs),
        }

    def chosen(self, trainer: Trainer) -> dict[str, Any]:
        """The row of the epoch whose weights meet the test set."""
        best = trainer.checkpoints.best
        if trainer.test_checkpoint == "last" or best is None:
            return self.epochs[-1]
        return self.epochs[best["epoch"]]


def _line(
    epoch: str, row: dict[str, Any], speed: float, seconds: float, left_out: Sequence[str]
) -> str:
    """An epoch in a line, without the parts that are left out."""
    found = [epoch]
    for stage in [stage for stage in ("train", "val") if f"{stage}/loss" in row]:
        parts = {"loss": f"{row[f'{stage}/loss']:.4f}", "acc": f"{row[f'{stage}/acc']:7.2%}"}
        kept = [f"{k} {v}" for k, v in parts.items() if f"{stage} {k}" not in left_out]
        found += [" ".join([stage, *kept])] if kept else []
    more = {"images/s": f"{speed:,.0f} images/s", "seconds": f"{seconds:.1f} s"}
    return "  ".join([*found, *(text for name, text in more.items() if name not in left_out)])


def learning_rate(trainer: lightning.Trainer) -> float:
    """The learning rate now."""
    return float(trainer.optimizers[0].param_groups[0]["lr"])
