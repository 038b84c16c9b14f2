"""The Lightning module: training and evaluation steps of an image classifier."""

import contextlib
import ctypes
import inspect
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cnntrain.config import as_config_error
from cnntrain.training.distributed import all_gather, all_sum, is_single_process
from cnntrain.training.metrics import Batches, Predictions, RunningMetrics, Stage
from cnntrain.training.optim import build_optimizer
from cnntrain.training.step_graph import Recorder, StepGraph, is_fused


class Classifier(lightning.LightningModule):
    """Trains a network that maps images (N, C, H, W) to logits (N, classes).

    In a distributed run each process computes its part of a batch; the gradients are those of the
    mean loss of the whole batch.

    Args:
        loss: Mean loss of logits (N, classes) and labels (N,).
        optimizer: Called with `params`; see `build_optimizer`.
        scheduler: Called with `optimizer`. One that takes `total_steps` is stepped after every
            update, any other after every epoch.
        seed: Seed of dropout.

    Attributes:
        running: Metrics per stage, of this process.
        totals: The same over all processes, as of the end of the last evaluation.
        predictions: Those of the last evaluation.
        last_loss: Loss of this process's part of the last batch.
        step_loss, grad_norm: Loss of a whole batch and norm of its gradients before clipping, of
            the last step to be logged.
        recorder: Records CUDA graphs of the steps, if set.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.seed = seed
        self.running: dict[Stage, RunningMetrics] = {}
        self.totals = self.running
        self.batches: Batches = []  # of the current evaluation
        self.predictions: Predictions | None = None
        self.last_loss: Tensor | None = None
        self.step_loss: Tensor | None = None
        self.grad_norm: Tensor | None = None
        self.share = 1.0  # of the last batch, in this process
        self.resumed: dict[str, Any] | None = None  # state of an interrupted epoch
        self.recorder: Recorder | None = None
        self.graph: StepGraph | None = None
        self.replayed = False  # whether the last batch, gradients included, was a replay

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    @property
    def stage(self) -> Stage:
        """Of the current evaluation."""
        return "test" if self.trainer.testing else "val"

    def transfer_batch_to_device(self, batch: Any, *_: Any, **__: Any) -> Any:
        return batch  # loaders create it on the device

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.schedule(int(self.trainer.estimated_stepping_batches))
        return [optimizer], [scheduler] if scheduler else []

    def schedule(self, total_steps: int) -> tuple[Optimizer, dict[str, Any] | None]:
        """The optimizer and its learning rate schedule over this number of steps."""
        optimizer = build_optimizer(self.make_optimizer, self.network)
        if self.make_scheduler is None:
            return optimizer, None
        every_step = "total_steps" in inspect.signature(self.make_scheduler).parameters
        steps = {"total_steps": total_steps} if every_step else {}
        with as_config_error("scheduler"):
            scheduler = self.make_scheduler(optimizer=optimizer, **steps)
        return optimizer, {"scheduler": scheduler, "interval": "step" if every_step else "epoch"}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = self.running["train"].state()
        checkpoint["epoch_so_far"] = {"train": all_gather(state), "grad_norm": self.grad_norm}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.resumed = checkpoint["epoch_so_far"]

    def on_train_start(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        self.running["train"] = RunningMetrics(self.device)
        if self.resumed:  # within an epoch, whose start hook is not called again
            self.running["train"].load_state(self.resumed["train"][self.global_rank])
            self.grad_norm = self.resumed["grad_norm"]
            self.resumed = None
        if self.recorder:
            optimizer, step = self.trainer.optimizers[0], (self._train, self._backward)
            # A GradScaler changes its scale on the host, which a recorded update would not see.
            self.graph = StepGraph(*step, optimizer, self.recorder, updates=not self._scaler)

    def on_train_epoch_start(self) -> None:
        self.running["train"].clear()

    def on_validation_epoch_start(self) -> None:
        self.running[self.stage], self.batches = RunningMetrics(self.device), []

    on_test_epoch_start = on_validation_epoch_start

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.reseed(self.current_epoch, batch_idx)

    def reseed(self, epoch: int, batch: int, rank: int | None = None) -> None:
        """Seed all generators from (seed, epoch, batch, rank); default: this process's rank.

        Dropout then depends on nothing that was drawn before, as bitwise resume requires.
        """
        key = [self.seed, epoch, batch, self.global_rank if rank is None else rank]
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        random.seed(seed)
        np.random.seed(seed >> 32)  # noqa: NPY002
        # torch.manual_seed would queue a call, with its stack trace, for each kind of accelerator
        # that is not initialised: memory that grows with every step.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        replayed = self.graph(*batch) if self.graph else None
        self.replayed = replayed is not None
        loss = self._train(*batch) if replayed is None else replayed
        self.running["train"].images += len(batch[1])
        self.last_loss = loss.detach()
        if is_single_process():
            return loss
        # DDP averages the gradients of all processes, whose parts of a batch may differ in size.
        self.share = len(batch[1]) / self.trainer.train_dataloader.size(batch_idx)  # type: ignore[union-attr]
        return loss * (self.share * self.trainer.world_size)

    def _train(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.network(images)
        loss: Tensor = self.loss(logits, labels)
        self.running["train"].add(loss, logits, labels)
        return loss

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _backward(self, loss: Tensor) -> None:
        """As Lightning does it for a batch that is not replayed."""
        with torch.autocast(self.device.type, enabled=False):
            (self._scaler.scale(loss) if self._scaler else loss).backward()

    def backward(self, loss: Tensor, *_: Any) -> None:
        if not self.replayed:
            loss.backward()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if not self.replayed:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        if len(labels):  # a last batch may have fewer images than there are processes
            logits, running = self.network(images), self.running[self.stage]
            running.add(self.loss(logits, labels), logits, labels)
            running.images += len(labels)
            self.batches.append((logits, labels))

    test_step = validation_step

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Before clipping, and only for steps that are logged.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self.grad_norm = norm / self.gradient_scale(optimizer)
            self.step_loss = self.last_loss
            if not is_single_process() and self.last_loss is not None:
                self.step_loss = torch.tensor(all_sum([float(self.last_loss) * self.share])[0])

    def gradient_scale(self, optimizer: Optimizer) -> Tensor | float:
        """Factor of the gradients before `optimizer.step`, without synchronisation: that of the
        GradScaler if a fused optimizer unscales them within its step, otherwise 1."""
        if self._scaler is None or not is_fused(optimizer):
            return 1.0
        return self._scaler.scale(torch.ones((), device=self.device))

    def on_train_epoch_end(self) -> None:
        self._log("train")

    def on_validation_epoch_end(self) -> None:
        self.predictions, self.batches = Predictions.of(self.batches), []
        self.running[self.stage].class_means = self.predictions.class_means
        if not is_single_process():
            self.totals = {stage: metrics.total() for stage, metrics in self.running.items()}
        self._log(self.stage)

    on_test_epoch_end = on_validation_epoch_end

    def _log(self, stage: Stage) -> None:
        # For EarlyStopping, which looks up its metric by name.
        self.log_dict(self.totals[stage].metrics(stage), logger=False)


def keep_freed_memory() -> None:
    """Set glibc's malloc to keep freed memory, up to 1 GiB per block, for this process.

    By default every step returns its activations to the kernel and faults them in again, a quarter
    of its time (LeNet-5, batch 128). Other C libraries are unchanged. Source: mallopt(3), malloc.h.
    """
    mmap_threshold, trim_threshold = -3, -1
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no mallopt, or no such library
        libc = ctypes.CDLL(None)
        sizes = (1 << 30, 32 << 20)  # 32 MiB is the maximum before glibc 2.35
        # Setting either one disables glibc's own adaptation of both.
        if any(libc.mallopt(mmap_threshold, size) for size in sizes):
            libc.mallopt(trim_threshold, 2**31 - 1)
