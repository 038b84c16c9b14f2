"""A network in training: what one step does, and what is counted on the way."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cnntrain.config import as_config_error
from cnntrain.training.distributed import all_gather, all_sum, is_single_process
from cnntrain.training.outcome import Answers, Outcome, answer
from cnntrain.training.step_graph import Recorder, StepGraph
from cnntrain.training.tally import TOGETHER, Stage, Tally

SEEDS = 64  # that are made at a time


class Classifier(lightning.LightningModule):
    """Trains `network`, which makes logits (N, classes) of images (N, C, H, W).

    `optimizer` is called with the parameters, `scheduler` with the optimizer; one that asks for
    `total_steps` moves at every update, any other once an epoch.

    With several processes, each sees its part of a batch, and what they train is the mean loss
    over the whole batch. `tallies` are then those of this process, `totals`, as of the end of an
    evaluation, those of all; else they are the same. `outcome` is of the last evaluation.
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
        self.tallies: dict[Stage, Tally] = {}
        self.totals = self.tallies
        self.answers: Answers = []  # of the evaluation that is going on, by this process
        self.classes = 0  # that the network tells apart
        self.outcome: Outcome | None = None
        self.last_loss: Tensor | None = None  # of this process's part of the last batch
        self.step_loss: Tensor | None = None  # of all of it, and the norm, where they are logged
        self.grad_norm: Tensor | None = None
        self.share = 1.0  # of this process in the last batch
        self.resumed: dict[str, Any] | None = None  # of an epoch that was interrupted
        self.recorder: Recorder | None = None  # where steps are recorded, to be replayed
        self.graph: StepGraph | None = None
        self.replayed = False  # the last batch, and so its gradients are there already

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        return batch  # loaders make it there

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.schedule(int(self.trainer.estimated_stepping_batches))
        return [optimizer], [scheduler] if scheduler else []

    def schedule(self, total_steps: int) -> tuple[Optimizer, dict[str, Any] | None]:
        """The optimizer, and the schedule of its learning rate over so many updates, if any."""
        optimizer = self.make_optimizer(params=self.network.parameters())
        if self.make_scheduler is None:
            return optimizer, None
        every_step = "total_steps" in inspect.signature(self.make_scheduler).parameters
        steps = {"total_steps": total_steps} if every_step else {}
        with as_config_error("scheduler"):
            scheduler = self.make_scheduler(optimizer=optimizer, **steps)
        return optimizer, {"scheduler": scheduler, "interval": "step" if every_step else "epoch"}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tally = self.tallies["train"].state()
        checkpoint["epoch_so_far"] = {"train": tally, "grad_norm": self.grad_norm}
        if not is_single_process():
            on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in tally.items()}
            checkpoint["epoch_so_far"]["of_all"] = all_gather(on_cpu)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.resumed = checkpoint["epoch_so_far"]

    def on_train_start(self) -> None:
        together = 1 if self.recorder else TOGETHER  # what is recorded does the same every time
        tally = self.tallies["train"] = Tally(self.device, together)
        if self.resumed:  # an epoch that is gone on with does not start
            of_all = self.resumed.get("of_all")
            tally.restore(of_all[self.global_rank] if of_all else self.resumed["train"])
            self.grad_norm = self.resumed["grad_norm"]
            self.resumed = None
        if self.recorder:
            scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
            self.graph = StepGraph(
                self._train,
                self._gradients,
                self.trainer.optimizers[0],
                self.recorder,
                updates=not scaled,  # for which a scaler has a new scale every time
            )

    def on_train_epoch_start(self) -> None:
        self.tallies["train"].clear()

    def on_validation_epoch_start(self) -> None:
        self.tallies["val"], self.answers = Tally(self.device), []

    def on_test_epoch_start(self) -> None:
        self.tallies["test"], self.answers = Tally(self.device), []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.reseed(self.current_epoch, batch_idx)

    def reseed(self, epoch: int, batch: int, rank: int | None = None) -> None:
        """Make dropout a function of (seed, epoch, batch, rank), whatever was drawn before.

        Where `rank` is not given, it is that of this process.
        """
        rank = self.global_rank if rank is None else rank
        block, place = divmod(batch, SEEDS)
        seed = batch_seeds(self.seed, epoch, block, rank)[place]
        # Not torch.manual_seed: for every kind of device that is not there it keeps the call, with
        # the stack as text, to make it once there is one.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        replayed = self.graph(*batch) if self.graph else None
        self.replayed = replayed is not None
        loss = self._train(*batch) if replayed is None else replayed
        self.tallies["train"].images += len(batch[1])
        self.last_loss = loss.detach()
        if is_single_process():
            return loss
        # What DDP makes of the gradients is their mean over the processes: parts of a batch that
        # are not of one size must not count the same.
        self.share = len(batch[1]) / self.trainer.train_dataloader.size(batch_idx)  # type: ignore[union-attr]
        return loss * (self.share * self.trainer.world_size)

    def _train(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.network(images)
        loss: Tensor = self.loss(logits, labels)
        self.tallies["train"].add(loss, logits, labels)
        return loss

    def _gradients(self, loss: Tensor) -> None:
        """What Lightning does for a batch that is not replayed."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        with torch.autocast(self.device.type, enabled=False):
            (scaler.scale(loss) if scaler else loss).backward()

    def backward(self, loss: Tensor, *_: Any) -> None:
        if not self.replayed:
            loss.backward()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if not self.replayed:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", *batch)

    def _evaluate(self, stage: Stage, images: Tensor, labels: Tensor) -> None:
        if len(labels):  # a last batch may have fewer images than there are processes
            logits = self.network(images)
            self.tallies[stage].add(self.loss(logits, labels), logits, labels)
            self.tallies[stage].images += len(labels)
            self.answers.append((answer(logits), labels))
            self.classes = logits.shape[1]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Before clipping, and only where it will be shown.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.global_step + 1) % every == 0:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self.grad_norm = norm / self.gradient_scale(optimizer)
            self.step_loss = self.last_loss
            if not is_single_process() and self.last_loss is not None:
                self.step_loss = torch.tensor(all_sum([float(self.last_loss) * self.share])[0])

    def gradient_scale(self, optimizer: Optimizer) -> Tensor | float:
        """By what gradients are too large before a step, without waiting for the device: those of
        float16 are scaled, and a fused optimizer divides them within its step."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None or not unscales(optimizer):
            return 1.0
        scale: Tensor = scaler.scale(torch.ones((), device=self.device))
        return scale

    def on_train_epoch_end(self) -> None:
        self._publish("train")

    def on_validation_epoch_end(self) -> None:
        self._add_up()
        self._publish("val")

    def on_test_epoch_end(self) -> None:
        self._add_up()
        self._publish("test")

    def _add_up(self) -> None:
        # Every epoch ends with a validation, and only then are they asked for.
        self.outcome = Outcome.of(self.answers, self.classes)
        self.answers = []
        if not is_single_process():
            self.totals = {stage: tally.total() for stage, tally in self.tallies.items()}

    def _publish(self, stage: Stage) -> None:
        # For checkpoints and early stopping, which look up a metric by name.
        self.log_dict(self.totals[stage].metrics(stage), logger=False)


@lru_cache(maxsize=1)
def batch_seeds(seed: int, epoch: int, block: int, rank: int) -> list[int]:
    """Of the batches from `block` * SEEDS on. Many at a time: the first one takes twenty times as
    long as any other, when kernels have just emptied the core's caches."""
    return [
        int(np.random.SeedSequence([seed, epoch, batch, rank]).generate_state(1, np.uint64)[0])
        for batch in range(block * SEEDS, (block + 1) * SEEDS)
    ]


def unscales(optimizer: Optimizer) -> bool:
    """Whether `step` divides gradients by `grad_scale`, and does nothing, on the device, where
    `found_inf` is 1: its attributes, if they are set."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
