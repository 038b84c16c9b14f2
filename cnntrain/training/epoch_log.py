"""Metrics of each epoch in metrics.csv, TensorBoard and the log, and the progress bar."""

import csv
import io
import logging
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from tqdm.auto import tqdm

from cnntrain.atomic import replacing
from cnntrain.terminal import fit_lines, left_out_lines
from cnntrain.training.insights import Insights
from cnntrain.training.nan_guard import learning_rate
from cnntrain.training.tensorboard import METRICS, TensorBoard

log = logging.getLogger(__name__)

COLUMNS = ["epoch", "step", "lr", *METRICS, "grad_norm"]

# Parts of an epoch's line that a narrow terminal leaves out, the first one first.
OPTIONAL = ("images/s", "seconds", "train loss", "train acc", "val loss")


class EpochLog(lightning.Callback):
    """Writes a row of metrics.csv, the scalars of TensorBoard and a log line after every epoch.

    Args:
        directory: The run directory.
        tensorboard: Its TensorBoard.
        insights: What else TensorBoard shows.

    Attributes:
        epochs: Rows of metrics.csv.
        images: Training images so far, over all epochs.
        seconds: Time of fitting so far, including that before a resume.
    """

    state_key = "Record"  # in checkpoints

    def __init__(self, directory: Path, tensorboard: TensorBoard, insights: Insights):
        self.file, self.tensorboard = directory / "metrics.csv", tensorboard
        self.insights = insights
        self.epochs: list[dict[str, Any]] = []
        self.images = 0
        self.logged = 0  # the last step that was logged; accumulation has several batches per step
        # In seconds; the last three are of the current epoch: all of it, training, loading data.
        self.seconds, self.epoch_seconds, self.train_seconds, self.data_seconds = 0.0, 0.0, 0.0, 0.0
        self.clock: float | None = None  # time of the last `_count`
        self.data_clock = 0.0  # and the loader's seconds then
        self.loader: Any = None
        self.reported = False  # whether the parts left out of the terminal's lines were named

    def state_dict(self) -> dict[str, Any]:
        self._count()
        seconds = [self.seconds, self.epoch_seconds, self.train_seconds, self.data_seconds]
        return {
            "epochs": self.epochs,
            "images": self.images,
            "logged": self.logged,
            "seconds": seconds,
            "tensorboard": self.tensorboard.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.images, self.logged = state["epochs"], state["images"], state["logged"]
        if self.epochs:
            self.tensorboard.first_epoch = self.epochs[0]["epoch"]
        seconds = [*state["seconds"], 0.0]  # early versions did not measure the loader
        self.seconds, self.epoch_seconds, self.train_seconds, self.data_seconds = seconds[:4]

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.clock = time.perf_counter()
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(self.epochs)  # without rows written after the checkpoint
        with replacing(self.file) as file:
            file.write(text.getvalue().encode())

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.loader = trainer.train_dataloader
        self.data_clock = self.loader.seconds

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self._count()
        self.epoch_seconds = self.train_seconds = self.data_seconds = 0.0

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        module.running["train"].metrics("train")  # synchronises, so that the time is right
        self._count()
        self.train_seconds = self.epoch_seconds

    def _count(self) -> None:
        """Add the seconds since the last call."""
        now = time.perf_counter()
        passed, self.clock = now - (now if self.clock is None else self.clock), now
        self.seconds, self.epoch_seconds = self.seconds + passed, self.epoch_seconds + passed
        if self.loader is not None:
            self.data_seconds += self.loader.seconds - self.data_clock
            self.data_clock = self.loader.seconds

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step == self.logged or step % trainer.log_every_n_steps:
            return
        self.logged = step
        scalars = {
            "train/loss_step": float(module.step_loss),
            "weight_update/lr": learning_rate(trainer),
        }
        if module.grad_norm is not None:
            scalars["weight_update/grad_norm"] = float(module.grad_norm)
        self.tensorboard.log_metrics(scalars, step)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
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
        seconds = self.train_seconds or self.epoch_seconds
        speed = train.images / seconds
        metrics = {name: row[name] for name in METRICS if name in row}
        if self.insights.speed:
            metrics["wall_time/images_per_second"] = speed
            metrics["wall_time/data_share"] = self.data_seconds / seconds
        self.tensorboard.log_metrics(metrics, row["epoch"])
        for stage in ("train", "val") if self.insights.charts else ():
            values = {m: row[f"{stage}/{m}"] for m in ("loss", "acc") if f"{stage}/{m}" in row}
            self.tensorboard.curve(stage, values, row["epoch"])
        self.tensorboard.experiment.flush()

        digits = len(str(trainer.max_epochs))
        epoch = f"epoch {trainer.current_epoch + 1:>{digits}}/{trainer.max_epochs}"
        line = partial(_line, epoch, row, speed, self.epoch_seconds)
        fitted, left_out = fit_lines(line, OPTIONAL)
        if not self.reported:
            self.reported = True
            fitted = "\n".join([fitted, *left_out_lines(left_out, " or train.log")])
        log.info(line([]), extra={"terminal": fitted})

    def so_far(self) -> dict[str, Any]:
        """The content of result.json for a run that is not completed."""
        last = self.epochs[-1] if self.epochs else {}
        metrics = {name: last[name] for name in METRICS if name in last}
        return {"metrics": metrics, "epochs": len(self.epochs)}

    def chosen(self, trainer: Any) -> dict[str, Any]:
        """The row of the epoch whose weights are tested."""
        best = trainer.checkpoints.best
        if trainer.test_checkpoint == "last" or best is None:
            return self.epochs[-1]
        return self.epochs[best["epoch"]]


def _line(
    epoch: str, row: dict[str, Any], speed: float, seconds: float, left_out: Sequence[str]
) -> str:
    """The log line of an epoch without the parts in `left_out`."""
    found = [epoch]
    for stage in [stage for stage in ("train", "val") if f"{stage}/loss" in row]:
        parts = {"loss": f"{row[f'{stage}/loss']:.4f}", "acc": f"{row[f'{stage}/acc']:7.2%}"}
        kept = [f"{k} {v}" for k, v in parts.items() if f"{stage} {k}" not in left_out]
        found += [" ".join([stage, *kept])] if kept else []
    more = {"images/s": f"{speed:,.0f} images/s", "seconds": f"{seconds:.1f} s"}
    return "  ".join([*found, *(text for name, text in more.items() if name not in left_out)])


class ProgressBar(lightning.Callback):
    """A bar per epoch with loss, accuracy and images/s so far, in a terminal or a notebook.

    In a distributed run, loss and accuracy are those of this process's images.
    """

    INTERVAL = 0.2  # seconds between updates, each of which synchronises with the device

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.bar is not None:
            return
        notebook = "ipykernel" in sys.modules
        self.bar = tqdm(
            total=int(trainer.num_training_batches),
            initial=batch_idx,  # not 0 in a resumed epoch
            desc=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
            unit="batch",
            leave=False,
            disable=not (notebook or (sys.stderr and sys.stderr.isatty())),
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        self.started = self.updated = time.perf_counter()
        self.images = module.running["train"].images

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self.bar is None or self.bar.disable or now - self.updated < self.INTERVAL:
            return
        self.updated = now
        running = module.running["train"]
        metrics = running.metrics("train")
        speed = (running.images - self.images) * trainer.world_size / (now - self.started)
        self.bar.n = batch_idx + 1
        self.bar.set_postfix_str(
            f"loss {metrics['train/loss']:.4f} acc {metrics['train/acc']:.2%} {speed:,.0f} images/s"
        )

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str("validation")

    def on_train_epoch_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    on_exception = on_train_epoch_end  # type: ignore[assignment]
