"""The progress bar."""

import sys
import time
from typing import Any

import lightning.pytorch as lightning
from tqdm.auto import tqdm


class Progress(lightning.Callback):
    """One bar an epoch with loss, accuracy and images/s so far, in a terminal or a notebook.

    In a pipe or a file there is no bar; the line that every epoch prints is enough there. With
    several processes, loss and accuracy are those of the images of this one.
    """

    INTERVAL = 0.2  # seconds between two looks at the device: a look waits for it

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is not None:
            return
        name = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        notebook = "ipykernel" in sys.modules
        self.bar = tqdm(
            total=int(trainer.num_training_batches),
            initial=batch_idx,  # not 0 where an interrupted epoch goes on
            desc=name,
            unit="batch",
            leave=False,
            disable=not (notebook or (sys.stderr and sys.stderr.isatty())),
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        self.started = self.shown = time.perf_counter()
        self.images = module.tallies["train"].images

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self.bar is None or self.bar.disable or now - self.shown < self.INTERVAL:
            return
        self.shown = now
        tally = module.tallies["train"]
        metrics = tally.metrics("train")
        self.bar.n = batch_idx + 1
        self.bar.set_postfix_str(
            f"loss {metrics['train/loss']:.4f} acc {metrics['train/acc']:.2%} "
            f"{(tally.images - self.images) * trainer.world_size / (now - self.started):,.0f} "
            "images/s"
        )

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str("validation")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
