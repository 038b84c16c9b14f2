"""NaN/Inf guard: stops training before a non-finite loss or gradient reaches the weights."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from cnntrain.terminal import NoTraceback
from cnntrain.training.classifier import Classifier
from cnntrain.training.distributed import all_gather, any_rank, is_single_process
from cnntrain.training.metrics import Stage
from cnntrain.training.nan_cause import BatchRecord, cause_of, finite, save
from cnntrain.training.step_graph import is_fused

FILE = "not_finite.pt"


class NonFiniteError(NoTraceback, Exception):
    """A loss, gradient or weight is NaN or Inf; the message names the batch and the layer.

    Attributes:
        details: The same for result.json, as {"not_finite": {...}}. Epoch and batch count from 1;
            `step` is the number of optimizer steps before; `indices` are the positions of the
            images in the files of the data set.
    """

    def __init__(self, message: str, details: dict[str, Any]):
        super().__init__(message)
        self.details = details


class NaNGuard(lightning.Callback):
    """Raises NonFiniteError before the optimizer step that would use a non-finite gradient.

    Must be the first callback, so that nothing is logged or saved before the check. Writes the
    batch, and the weights that it was computed with, to `directory`/not_finite.pt.

    On CUDA the check is asynchronous: a device-side flag makes fused optimizers and Muon skip this
    and all later updates (their `found_inf`, as `GradScaler` uses it), and the host reads it only
    every `log_every_n_steps` steps, at the end of an epoch, before a checkpoint and in `check_now`.
    With other optimizers, and on other devices, the host checks every batch. An overflow of float16
    gradients is left to the `GradScaler` until its scale is down to 1.

    In a distributed run all ranks stop together, and the first bad batch is reported.

    Args:
        directory: The run directory.
        train, val: Positions of the images of these splits in the files of the data set, int (N,).
        deferred: Checks asynchronously on any device; for tests.
    """

    def __init__(self, directory: Path, train: np.ndarray, val: np.ndarray, deferred: bool = False):
        self.file = directory / FILE
        self.positions: dict[Stage, np.ndarray] = {"train": train, "val": val}
        self.always_deferred = deferred
        self.unchecked: list[BatchRecord] = []  # batches since the last check
        self.batch: tuple[Tensor, Tensor] | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        optimizer = trainer.optimizers[0]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.flag = torch.zeros((), device=module.device)  # 1 from the first bad batch on
        self.bad_batches = torch.zeros((), device=module.device)  # since the flag is 1
        skips = is_fused(optimizer) or (self.scaler is None and hasattr(optimizer, "found_inf"))
        self.deferred = skips and (self.always_deferred or module.device.type == "cuda")
        if self.deferred:
            optimizer.found_inf = self.flag  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.index = batch_idx
        self.batch = None if self.deferred else batch

    def on_before_backward(self, trainer: lightning.Trainer, module: Any, loss: Tensor) -> None:
        record = self._record(trainer, "train", self.index, module.last_loss)
        self.unchecked = [*self.unchecked, record] if self.deferred else [record]
        # In a distributed run the other ranks wait in the backward pass.
        if not self.deferred and is_single_process() and not math.isfinite(loss.item()):
            self._stop(trainer, module, record)

    def _record(self, trainer: Any, stage: Stage, batch: int, loss: Tensor | float) -> BatchRecord:
        lr = None if stage == "test" else learning_rate(trainer)
        return BatchRecord(stage, trainer.current_epoch, batch, trainer.global_step, lr, loss)

    def on_after_backward(self, trainer: lightning.Trainer, module: Any) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        bad = ~get_total_norm(gradients, math.inf).isfinite()
        if self.scaler is not None:
            bad &= self.scaler.scale(torch.ones_like(self.flag)) <= 1
        bad |= ~module.last_loss.isfinite()
        self.flag.copy_(torch.maximum(self.flag, bad.float()))
        if self.scaler is not None:
            # It overwrites found_inf by what it finds in the gradients: divide by 1 or 0.
            gradients[0].div_(1 - self.flag)
        if self.deferred:
            self.bad_batches += self.flag
        elif any_rank(bool(self.flag)):
            self._stop(trainer, module, self.unchecked[-1])

    def check_now(self, trainer: lightning.Trainer, module: Any) -> None:
        """Synchronise, and raise NonFiniteError if a weight, or a batch since the last check, is
        not finite. To be called before weights are saved or shown."""
        if not self.unchecked:
            return
        bad_batches = int(self.bad_batches) if self.deferred else 0
        if self.deferred and any_rank(bad_batches > 0):
            self._stop(trainer, module, self.unchecked[-bad_batches] if bad_batches else None)
        if not finite(self.parameters):
            self._stop(trainer, module, self.unchecked[-1], updated=True)
        self.unchecked.clear()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self.check_now(trainer, module)

    def on_validation_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.check_now(trainer, module)

    on_train_epoch_end = on_save_checkpoint = on_validation_start  # type: ignore[assignment]

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        self._check_evaluation(trainer, module, "val")

    def on_test_epoch_end(self, trainer: Any, module: Any) -> None:
        self._check_evaluation(trainer, module, "test")

    @torch.inference_mode(False)
    def _check_evaluation(self, trainer: lightning.Trainer, module: Any, stage: Stage) -> None:
        bad = None
        if not math.isfinite(module.running[stage].loss):
            for index, (logits, labels) in enumerate(module.batches):
                whole = logits.shape[1] == module.classes  # else the largest probabilities
                loss = module.loss(logits.float(), labels) if whole else logits.sum()
                if not math.isfinite(loss):
                    bad = self._record(trainer, stage, index, float(loss))
                    break
        if any_rank(bad is not None):
            self._stop(trainer, module, bad)

    @torch.inference_mode(False)  # on_validation_start is called in inference mode
    def _stop(
        self, trainer: Any, module: Classifier, record: BatchRecord | None, updated: bool = False
    ) -> NoReturn:
        """Raise NonFiniteError for the first bad batch of all ranks, which call this together, each
        with its own; `updated` if the update after the batch has made a weight non-finite."""
        own = record and self._diagnosed(trainer, module, record, updated)
        found = [bad for bad in all_gather(own) if bad]
        first = min(found, key=lambda bad: (not bad.certain, bad.epoch, bad.batch))
        message, saved = first.text(trainer.max_epochs), None
        if first.tensors and trainer.is_global_zero:
            try:
                save(self.file, module, first)
                saved = str(self.file)
                message += f"; to reproduce it: {saved}"
            except Exception as failure:  # such as a full disk
                reason = getattr(failure, "strerror", None) or str(failure).partition("\n")[0]
                message += f"; {self.file} could not be written: {reason}"
        details = {
            name: str(v) if isinstance(v, float) and not math.isfinite(v) else v  # for JSON
            for name, v in first.facts().items()
        }
        details |= {"reason": first.cause, "indices": [*first.indices], "saved": saved}
        raise NonFiniteError(message, {"not_finite": details})

    def _diagnosed(
        self, trainer: Any, module: Classifier, record: BatchRecord, updated: bool
    ) -> BatchRecord:
        """The record with its images, moved to the CPU, and the cause."""
        tensors, indices = self.batch if record.stage == "train" else None, []
        try:
            name = {"train": "train_dataloader"}.get(record.stage, f"{record.stage}_dataloaders")
            loader = getattr(trainer, name)
            rows = loader.indices(record.epoch, record.batch).numpy()
            positions = self.positions.get(record.stage)
            indices = (rows if positions is None else positions[rows]).tolist()
            tensors = tensors or loader.batch(record.epoch, record.batch)
            cause = cause_of(trainer, module, replace(record, tensors=tensors), updated)
        except Exception as failure:  # must not hide what is already known
            reason = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
            cause = {"cause": f"looking for the layer failed: {reason}"}
        if tensors:
            tensors = tensors[0].detach().cpu().clone(), tensors[1].cpu().clone()  # no views
        known = {"rank": module.global_rank, "tensors": tensors, "indices": indices}
        return replace(record, loss=float(record.loss), **known, **cause)  # type: ignore[arg-type]


def learning_rate(trainer: lightning.Trainer) -> float:
    """The current learning rate."""
    return float(trainer.optimizers[0].param_groups[0]["lr"])
