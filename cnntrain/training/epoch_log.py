"""Metrics of each epoch in metrics.csv, TensorBoard and the log, and the progress bar."""

import codecs
import csv
import logging
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from tqdm.auto import tqdm

from cnntrain.atomic import replacing
from cnntrain.metric_names import EPOCH_METRICS
from cnntrain.training.insights import Insights
from cnntrain.training.nan_guard import learning_rate

log = logging.getLogger(__name__)

COLUMNS = ["epoch", "step", "lr", *EPOCH_METRICS, "grad_norm"]


class EpochLog(lightning.Callback):
    """Writes metrics.csv, the scalars of TensorBoard and a log line after every epoch.

    Attributes:
        epochs: Rows of metrics.csv.
        images: Training images so far, over all epochs.
        seconds_before: Time of fitting before this start of the run.
        seconds: Time of fitting in all, once it has ended.
    """

    def __init__(self, directory: Path, insights: Insights):
        self.file, self.tensorboard = directory / "metrics.csv", insights.board
        self.insights = insights
        self.epochs: list[dict[str, Any]] = []
        self.images = 0
        self.seconds_before = self.seconds = 0.0
        self.epoch_seconds_before = 0.0  # of an epoch that was interrupted

    def resume(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Continue the logs of an interrupted run from its checkpoint."""
        epoch, batch = checkpoint["position"]["epoch"] + 1, checkpoint["position"]["batch"] + 1
        log.info(f"resuming from {path.name} at epoch {epoch}, batch {batch}")
        self.tensorboard.resume(checkpoint["callbacks"][self.state_key]["event_files"])

    def state_dict(self) -> dict[str, Any]:
        now = time.perf_counter()
        return {
            "epochs": self.epochs,
            "images": self.images,
            "seconds": now - self.fit_began,
            "epoch_seconds": now - self.epoch_began,
            "event_files": self.tensorboard.sizes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self.images = state["epochs"], state["images"]
        self.seconds_before, self.epoch_seconds_before = state["seconds"], state["epoch_seconds"]

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.fit_began = time.perf_counter() - self.seconds_before
        self._write()

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.epoch_began = time.perf_counter()
        self.loading_before = trainer.train_dataloader.seconds
        self.train_seconds: float | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.on_train_epoch_start(trainer, module)  # not called within an epoch that is resumed
        self.epoch_began -= self.epoch_seconds_before

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        module.running["train"].metrics("train")  # synchronises, so that the time is right
        self.train_seconds = time.perf_counter() - self.epoch_began

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if module.step_loss is None:
            return
        scalars = {
            "train/loss_step": float(module.step_loss),
            "weight_update/lr": learning_rate(trainer),
            "weight_update/grad_norm": float(module.grad_norm),
        }
        module.step_loss = None
        self.tensorboard.log_metrics(scalars, trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        epoch, images = trainer.current_epoch + 1, module.totals["train"].images
        metrics: dict[str, float] = {}
        line = [f"epoch {epoch:>{len(str(trainer.max_epochs))}}/{trainer.max_epochs}"]
        for stage, totals in module.totals.items():
            if found := totals.metrics(stage):
                metrics |= found
                loss, accuracy, *_ = found.values()
                line.append(f"{stage} loss {loss:.4f} acc {accuracy:7.2%}")
                if self.insights.charts:
                    self.tensorboard.curve(stage, {"loss": loss, "acc": accuracy}, epoch)
        norm = float(module.grad_norm) if module.grad_norm is not None else None
        position = {"epoch": epoch, "step": trainer.global_step, "lr": learning_rate(trainer)}
        self.epochs.append({**position, **metrics, "grad_norm": norm})
        self._write()
        self.images += images
        seconds = time.perf_counter() - self.epoch_began
        train_seconds = self.train_seconds or seconds
        speed = images / train_seconds
        if self.insights.speed:
            metrics["wall_time/images_per_second"] = speed
            loading = trainer.train_dataloader.seconds - self.loading_before
            metrics["wall_time/data_share"] = loading / train_seconds
        self.tensorboard.log_metrics(metrics, epoch)
        self.tensorboard.experiment.flush()
        log.info("  ".join([*line, f"{speed:,.0f} images/s", f"{seconds:.1f} s"]))

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        self.seconds = time.perf_counter() - self.fit_began

    def _write(self) -> None:
        """Write metrics.csv, without the epochs after the checkpoint of a resumed run."""
        with replacing(self.file) as file:
            writer = csv.DictWriter(codecs.getwriter("utf-8")(file), COLUMNS)
            writer.writeheader()
            writer.writerows(self.epochs)

    def so_far(self) -> dict[str, Any]:
        """The content of result.json for a run that is not completed."""
        last = self.epochs[-1] if self.epochs else {}
        metrics = {name: last[name] for name in EPOCH_METRICS if name in last}
        return {"metrics": metrics, "epochs": len(self.epochs)}


class ProgressBar(lightning.Callback):
    """A bar per epoch with loss, accuracy and images/s so far, in a terminal or a notebook.

    In a distributed run, loss and accuracy are those of this process's images.
    """

    bar: Any = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.bar is not None:
            return
        self.bar = tqdm(
            total=int(trainer.num_training_batches),
            initial=batch_idx,  # not 0 in a resumed epoch
            desc=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
            unit=" images",
            unit_scale=trainer.train_dataloader.batch_size,
            leave=False,
            disable=False if "ipykernel" in sys.modules else None,  # None: but for a terminal
            dynamic_ncols=True,
            mininterval=0.2,  # seconds: each update synchronises with the device
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
            "{postfix} {rate_noinv_fmt}",
        )

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if self.bar.update():  # the bar was drawn
            metrics = module.running["train"].metrics("train")
            text = f"loss {metrics['train/loss']:.4f} acc {metrics['train/acc']:.2%}"
            self.bar.set_postfix_str(text, refresh=False)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str("validation")

    def on_train_epoch_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    on_exception = on_train_epoch_end  # type: ignore[assignment]
