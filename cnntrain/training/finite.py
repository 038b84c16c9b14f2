"""A run stops at the first number that is not one, before it has done any harm."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import Tensor, nn

from cnntrain.training.classifier import unscales
from cnntrain.training.diagnosis import (
    Batch,
    Cause,
    Finding,
    Forward,
    NotFinite,
    Place,
    explain,
    finite,
    first_not_finite,
    repeat,
    report,
    spoilt,
)
from cnntrain.training.distributed import alone, anywhere, gathered
from cnntrain.training.record import learning_rate
from cnntrain.training.tally import Stage

FILE = "not_finite.pt"


class Finite(lightning.Callback):
    """Raises NotFinite before the update that a non-finite loss or gradient would make.

    It leaves the batch with the weights that it met in `directory`/not_finite.pt. `train` and
    `val` are, for each image of these parts, its place in the data set's own files. To stand before
    all other callbacks: nothing is logged or saved before it has looked.

    On CUDA the host waits for no step. A flag on the device, once up, lets the optimizer skip this
    and all later updates by itself, as it does for `GradScaler`; the host reads it where it waits
    anyway: every `log_every_n_steps`, at the end of an epoch, before a checkpoint is written, and
    wherever `look` is called. What led there is then found by repeating the batch. Only fused
    optimizers and Muon can skip by themselves: with any other one, and on other devices, the host
    looks at every batch. Float16 gradients that overflow are the scaler's business, until its scale
    has come down to 1.

    With several processes, all stop together, the one whose images they were finds out why, and
    rank 0 tells.

    `deferred` makes any device do what CUDA does, for tests.
    """

    def __init__(
        self, directory: Path, train: np.ndarray, val: np.ndarray, *, deferred: bool = False
    ):
        self.file = directory / FILE
        self.positions: dict[Stage, np.ndarray] = {"train": train, "val": val}
        self.always_deferred = deferred
        self.since: list[Place] = []  # the batches since the last look; the last one is now
        self.batch: Batch | None = None
        self.outputs: list[tuple[str, nn.Module, Any]] = []  # of the layers, for this batch
        self.watched: list[tuple[nn.Module, Any]] = []  # layers, and a `forward` of their own

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        optimizer = trainer.optimizers[0]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.flag = torch.zeros((), device=module.device)  # 1 from the first bad batch on
        self.bad_batches = torch.zeros((), device=module.device)  # since it is 1
        skips = unscales(optimizer) or (self.scaler is None and hasattr(optimizer, "found_inf"))
        self.deferred = skips and (self.always_deferred or module.device.type == "cuda")
        if self.deferred:
            optimizer.found_inf = self.flag  # type: ignore[attr-defined]
        elif not getattr(module.network, "_compiled_call_impl", None):  # which would be slowed
            for name, layer in module.network.named_modules():
                self._watch(module.network, name, layer)

    def _watch(self, network: nn.Module, name: str, layer: nn.Module) -> None:
        forward = layer.forward

        def keeping(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if network.training:  # and so autograd keeps most outputs anyway
                self.outputs.append((name, layer, output))
            return output

        self.watched.append((layer, vars(layer).get("forward")))
        layer.forward = keeping  # no hook: a module that has one is called the slow way

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.index = batch_idx
        self.batch = None if self.deferred else batch
        self.outputs.clear()

    def on_before_backward(self, trainer: lightning.Trainer, module: Any, loss: Tensor) -> None:
        step, lr = trainer.global_step, learning_rate(trainer)
        here = Place("train", trainer.current_epoch, self.index, step, lr, module.last_loss)
        if self.deferred:
            self.since.append(here)
            return
        self.since = [here]
        if math.isfinite(module.last_loss.item()):
            self.outputs.clear()  # before the backward pass, which needs room
        elif alone():  # else the others wait for this process in the backward pass
            self._stop(trainer, module, here)

    def on_after_backward(self, trainer: lightning.Trainer, module: Any) -> None:
        self._raise_flag(module.last_loss)
        if self.deferred:
            self.bad_batches += self.flag
        elif anywhere(bool(self.flag)):
            self._stop(trainer, module, self.since[-1])

    def _raise_flag(self, loss: Tensor) -> None:
        """Set the flag to 1 if the loss or a gradient is not finite, without waiting."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaler is None:
            set_if_not_finite(self.flag, [loss, *gradients])
            return
        set_if_not_finite(self.flag, [loss])
        overflow = torch.zeros_like(self.flag)
        set_if_not_finite(overflow, gradients)
        no_way_down = self.scaler.scale(torch.ones_like(self.flag)) <= 1
        self.flag.copy_(torch.maximum(self.flag, overflow * no_way_down))
        # By 1 or by 0: the scaler replaces found_inf by what it finds in the gradients.
        gradients[0].div_(1 - self.flag)

    def look(self, trainer: lightning.Trainer, module: Any) -> None:
        """Wait for the device; raise NotFinite if a batch since the last look or a weight is bad.

        To be called before anything that was trained is saved or shown.
        """
        if not self.since:
            return
        bad_batches = int(self.bad_batches) if self.deferred else 0
        if self.deferred and anywhere(bad_batches > 0):
            self._stop(trainer, module, self.since[-bad_batches] if bad_batches else None)
        if not finite(self.parameters):
            self._stop(trainer, module, self.since[-1], updated=True)
        self.since.clear()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.look(trainer, module)

    def on_validation_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.look(trainer, module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.look(trainer, module)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        self.look(trainer, module)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._let_go()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        for layer, own in self.watched:
            del layer.forward
            if own is not None:
                layer.forward = own
        self.watched, self.outputs, self.since, self.batch = [], [], [], None

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._check_tally(trainer, module, "val")

    def on_test_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._check_tally(trainer, module, "test")

    @torch.inference_mode(False)
    def _check_tally(self, trainer: lightning.Trainer, module: Any, stage: Stage) -> None:
        """Look at the sum of an evaluation's losses, for which the host is about to wait."""
        total = float(module.tallies[stage].loss)
        if not anywhere(not math.isfinite(total)):
            return
        lr = learning_rate(trainer) if stage == "val" else None
        loader = loader_of(trainer, stage)
        bad: Place | None = None
        for index in range(len(loader)) if not math.isfinite(total) else ():
            place = Place(stage, trainer.current_epoch, index, trainer.global_step, lr, total)
            images, labels = loader.batch(0, index)
            forward = repeat(trainer, module, place, (images, labels)) if len(images) else None
            if forward and not math.isfinite(forward.loss):
                bad = replace(place, loss=forward.loss)
                break
        if anywhere(bad is not None):
            self._stop(trainer, module, bad)
        raise NotFinite(
            f"{stage}: the sum of the losses is {total}, though not when a batch is repeated",
            {"not_finite": {"stage": stage, "loss": str(total)}},
        )

    @torch.inference_mode(False)  # a look before validation is made in that mode
    def _stop(
        self, trainer: lightning.Trainer, module: Any, place: Place | None, *, updated: bool = False
    ) -> NoReturn:
        """Raise NotFinite with all that can be found out about this batch; with several processes,
        about the first of their batches that is bad. They call it together."""
        own = self._finding(trainer, module, place, updated) if place else None
        found = [finding for finding in gathered(own) if finding]
        found = [finding for finding in found if finding.certain] or found
        first = min(found, key=lambda f: (f.place.epoch, f.place.batch))
        raise report(self.file, trainer, module, first)

    def _finding(
        self, trainer: lightning.Trainer, module: Any, place: Place, updated: bool
    ) -> Finding:
        training = place.stage == "train"
        kept = self.batch if training else None
        batch: Batch | None = kept
        indices: list[int] = []
        try:
            loader = loader_of(trainer, place.stage)
            rows = loader.indices(place.epoch, place.batch).numpy()
            positions = self.positions.get(place.stage)
            indices = (rows if positions is None else positions[rows]).tolist()
            batch = kept or loader.batch(place.epoch, place.batch)
            if updated:
                cause = spoilt(module)
            elif training and self.outputs:
                forward = Forward(first_not_finite(self.outputs), float(place.loss))
                cause = explain(module, place.stage, batch[0], forward)
            else:
                forward = repeat(trainer, module, place, batch)
                if kept and training and alone():  # else they are of all processes
                    gradients = {n: p.grad for n, p in module.network.named_parameters()}
                    forward = replace(forward, gradients=gradients)
                cause = explain(module, place.stage, batch[0], forward)
        except Exception as error:  # must not hide what is known already
            said = str(error).partition("\n")[0]
            cause = Cause(f"looking for the layer failed: {type(error).__name__}: {said}")
        place = replace(place, loss=float(place.loss))
        if batch:
            batch = (batch[0].detach().cpu().clone(), batch[1].cpu().clone())  # no views
        return Finding(place, module.global_rank, batch, indices, cause)


def loader_of(trainer: lightning.Trainer, stage: Stage) -> Any:
    if stage == "train":
        return trainer.train_dataloader
    return trainer.val_dataloaders if stage == "val" else trainer.test_dataloaders


def set_if_not_finite(flag: Tensor, tensors: Iterable[Tensor]) -> None:
    """Set `flag`, float32 without dimensions, to 1 if a number in `tensors` is not finite.

    One kernel for all tensors of a type, GradScaler's own; it never sets the flag to 0.
    """
    by_type = defaultdict(list)
    for tensor in tensors:
        by_type[tensor.dtype].append(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
    for same_type in by_type.values():
        # It multiplies them as well, by the last argument: by 1.
        torch._amp_foreach_non_finite_check_and_unscale_(same_type, flag, torch.ones_like(flag))
