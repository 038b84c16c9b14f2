"""What a run writes down while it trains: metrics.csv, TensorBoard and a line an epoch."""

import csv
import json
import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.utils.tensorboard.summary import hparams

from cnntrain.training.trainer import Trainer

log = logging.getLogger(__name__)

METRICS = ["train/loss", "train/acc", "val/loss", "val/acc"]
COLUMNS = ["epoch", "step", "lr", *METRICS, "grad_norm"]


class TensorBoard(TensorBoardLogger):
    """Lightning's logger with one event stream at the root of the run directory."""

    def __init__(self, directory: Path):
        super().__init__(directory, name="", version="", default_hp_metric=False)

    def save(self) -> None:
        """Nothing beside the event file: the options are in .hydra/config.yaml."""

    def finalize(self, status: str) -> None:
        """Not closed after fitting: testing goes on in the same stream. `end` closes it."""
        self.experiment.flush()

    def begin(self, cfg: DictConfig) -> None:
        """Fill the HParams tab: the options now, the metrics as they are logged under their names.

        Not `log_hyperparams`, which would log the metrics once more, at step 0.
        """
        experiment, start, self._end = hparams(
            options(cfg), dict.fromkeys(["test/acc", "val/acc", "test/loss", *METRICS], 0.0)
        )
        for summary in (experiment, start):
            self.experiment._get_file_writer().add_summary(summary)

    def end(self) -> None:
        """Mark the run as finished in the HParams tab, and close the stream."""
        self.experiment._get_file_writer().add_summary(self._end)
        self.experiment.close()


class Record(lightning.Callback):
    """Writes a row of metrics.csv, the scalars of TensorBoard and a line of text every epoch.

    In TensorBoard an epoch's metrics stand over the epoch, a step's over the step.
    """

    def __init__(self, directory: Path, tensorboard: TensorBoard):
        self.file, self.tensorboard = directory / "metrics.csv", tensorboard
        self.epochs: list[dict[str, Any]] = []  # the rows written
        self.images = 0  # trained on, over all epochs
        self.logged = 0  # the last step logged: accumulation has several batches to a step
        self.started = 0.0
        self.trained: float | None = None  # when an epoch's training ended and validation began

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.current_epoch == 0:
            with self.file.open("w", newline="") as file:
                csv.writer(file).writerow(COLUMNS)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.started, self.trained = time.perf_counter(), None

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        module.tallies["train"].metrics("train")  # waits for the device: the time is honest
        self.trained = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.logged or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self.logged = step
        scalars = {"train/loss_step": float(module.last_loss), "lr": learning_rate(trainer)}
        if module.grad_norm is not None:
            scalars["grad_norm"] = float(module.grad_norm)
        self.tensorboard.log_metrics(scalars, step)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        train, val = module.tallies["train"], module.tallies.get("val")
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": learning_rate(trainer),
            **train.metrics("train"),
            **(val.metrics("val") if val else {}),
            "grad_norm": float(module.grad_norm) if module.grad_norm is not None else None,
        }
        self.epochs.append(row)
        self.images += train.images
        with self.file.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        speed = train.images / ((self.trained or time.perf_counter()) - self.started)
        metrics = {name: row[name] for name in METRICS if name in row}
        self.tensorboard.log_metrics({**metrics, "images_per_second": speed}, row["epoch"])
        self.tensorboard.experiment.flush()  # to be seen now, by whoever is watching

        width = len(str(trainer.max_epochs))
        shown = "".join(
            f"{stage} loss {row[f'{stage}/loss']:.4f} acc {row[f'{stage}/acc']:7.2%}  "
            for stage in ("train", "val")
            if f"{stage}/loss" in row
        )
        log.info(
            f"epoch {row['epoch'] + 1:>{width}}/{trainer.max_epochs}  {shown}"
            f"{speed:,.0f} images/s  {time.perf_counter() - self.started:.1f} s"
        )

    def chosen(self, trainer: Trainer) -> dict[str, Any]:
        """The row of the epoch whose weights meet the test set."""
        if trainer.test_checkpoint == "last":
            return self.epochs[-1]
        sign = 1 if trainer.monitor.endswith("acc") else -1
        return max(self.epochs, key=lambda row: sign * row[trainer.monitor])  # the first of equals


def learning_rate(trainer: lightning.Trainer) -> float:
    """The learning rate now."""
    return float(trainer.optimizers[0].param_groups[0]["lr"])


def options(cfg: DictConfig) -> dict[str, Any]:
    """The config as one flat table, `model.dropout` to 0.3, for HParams."""
    found: dict[str, Any] = {}

    def walk(node: DictConfig, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key!s}"
            if isinstance(value, DictConfig):
                walk(value, f"{name}.")
            elif isinstance(value, ListConfig):
                found[name] = str(OmegaConf.to_container(value))
            elif key != "_partial_":  # true as one would type it, where TensorBoard has 1
                found[name] = json.dumps(value) if isinstance(value, bool | None) else value

    walk(cfg, "")
    return found
