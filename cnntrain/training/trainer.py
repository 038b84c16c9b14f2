"""Lightning's trainer with the options that a run has."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from pydantic import PositiveFloat, PositiveInt

from cnntrain.training.progress import Progress

Metric = Literal["val/acc", "val/loss", "train/acc", "train/loss"]
Precision = Literal[32, "32", "32-true", "bf16-mixed", "16-mixed"]


class Trainer(lightning.Trainer):
    """`lightning.Trainer` on one device, with checkpoints and early stopping by one metric.

    `checkpoints/last.ckpt` and `best.ckpt` are written under `default_root_dir`. Whatever else
    Lightning's trainer takes can be given as well.
    """

    def __init__(
        self,
        *,
        accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
        devices: Literal[1] = 1,
        max_epochs: PositiveInt = 10,
        precision: Precision = 32,
        compile: bool = False,
        deterministic: bool = False,
        gradient_clip_val: PositiveFloat | None = None,
        accumulate_grad_batches: PositiveInt = 1,
        monitor: Metric = "val/acc",
        early_stopping: PositiveInt | None = None,
        test_checkpoint: Literal["best", "last"] = "best",
        progress_bar: bool = True,
        log_every_n_steps: PositiveInt = 50,
        default_root_dir: Path | None = None,
        callbacks: list[lightning.Callback] | None = None,
        **lightning_options: Any,
    ):
        mode = "max" if monitor.endswith("acc") else "min"
        folder = Path(default_root_dir or ".") / "checkpoints"
        self.best = ModelCheckpoint(
            folder, "best", monitor=monitor, mode=mode, enable_version_counter=False
        )
        # Not the first one's `save_last`, which is the last of the best.
        self.last = ModelCheckpoint(folder, "last", enable_version_counter=False)
        progress = [Progress()] if progress_bar else []
        stopping: list[lightning.Callback] = []
        if early_stopping is not None:
            stopping.append(EarlyStopping(monitor, patience=early_stopping, mode=mode))
        self.compile_network, self.monitor = compile, monitor
        self.test_checkpoint = test_checkpoint
        super().__init__(
            accelerator=accelerator,
            devices=devices,
            max_epochs=max_epochs,
            precision=precision,
            deterministic=deterministic,
            gradient_clip_val=gradient_clip_val,
            accumulate_grad_batches=accumulate_grad_batches,
            log_every_n_steps=log_every_n_steps,
            default_root_dir=default_root_dir,
            callbacks=[*progress, *(callbacks or []), self.best, self.last, *stopping],
            # What these would print, the run says itself, and the weights are new, not suspect.
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **lightning_options,
        )

    @property
    def chosen_checkpoint(self) -> Path:
        """The file of the weights that are to meet the test set."""
        chosen = self.best if self.test_checkpoint == "best" else self.last
        return Path(chosen.best_model_path)
