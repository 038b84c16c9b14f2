"""NaN/Inf guard: stops training before a non-finite loss or gradient reaches the weights.

The batch is then repeated with forward hooks to find the layer.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from cnntrain.atomic import replacing
from cnntrain.terminal import NoTraceback
from cnntrain.training.classifier import Classifier
from cnntrain.training.distributed import all_gather, any_rank, is_single_process
from cnntrain.training.metrics import Stage

FILE = "not_finite.pt"


class NonFiniteError(NoTraceback, Exception):
    """A loss, gradient or weight is NaN or Inf; the message names the batch and the layer.

    Attributes:
        details: The same for result.json, as {"not_finite": {...}}. Epoch and batch count from 1.
    """

    def __init__(self, message: str, details: dict[str, Any]):
        super().__init__(message)
        self.details = details


@dataclass(frozen=True)
class BatchRecord:
    """A training batch with its loss and, once it was repeated, the cause of the NaN or Inf."""

    epoch: int  # from 0, as `batch`
    batch: int
    step: int  # optimizer steps before
    lr: float
    loss: Tensor | float
    rank: int = 0
    tensors: tuple[Tensor, Tensor] | None = None  # images (N, C, H, W), labels (N,)
    indices: Sequence[int] = ()  # positions of the images in the files of the data set
    cause: str = ""
    layer: str | None = None
    parameter: str | None = None

    @property
    def certain(self) -> bool:
        """Whether this rank's images are the cause: a non-finite gradient alone may come from
        another rank, as DDP averages gradients."""
        return self.layer is not None or not math.isfinite(self.loss)

    def text(self, epochs: int | None) -> str:
        at = f"epoch {self.epoch + 1}/{epochs}, batch {self.batch + 1}, step {self.step}"
        loss = f"the loss of {len(self.indices)} images is {float(self.loss):.4g}"
        return f"{at}, lr {self.lr:.3g}: {loss}; {self.cause}"

    def facts(self) -> dict[str, Any]:
        """What result.json and not_finite.pt record; a loss that JSON does not have as text."""
        loss = float(self.loss) if math.isfinite(self.loss) else str(float(self.loss))
        counted = {"stage": "train", "epoch": self.epoch + 1, "batch": self.batch + 1, "loss": loss}
        names = "step", "lr", "layer", "parameter"
        return counted | {name: getattr(self, name) for name in names}


class NaNGuard(lightning.Callback):
    """Raises NonFiniteError before the optimizer step that would use a non-finite gradient.

    Must be the first callback, so that nothing is logged or saved before the check. Writes the
    batch, and the weights that it was computed with, to `directory`/not_finite.pt. In a distributed
    run all ranks stop together, and the first bad batch is reported.

    On CUDA the check is asynchronous: a device-side flag makes fused optimizers and Muon skip this
    and all later updates (their `found_inf`, as `GradScaler` uses it), and the host reads it only
    every `log_every_n_steps` steps, at the end of an epoch and before a checkpoint. With other
    optimizers, and on other devices, the host checks every batch.

    Args:
        directory: The run directory.
        positions: Those of the training images in the files of the data set, int (N,).
        deferred: Checks asynchronously on any device; for tests.
    """

    def __init__(self, directory: Path, positions: np.ndarray, deferred: bool = False):
        self.file, self.positions = directory / FILE, positions
        self.always_deferred = deferred
        self.unchecked: list[BatchRecord] = []  # batches since the last check
        self.batch: tuple[Tensor, Tensor] | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        optimizer = trainer.optimizers[0]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.flag = torch.zeros((), device=module.device)  # 1 from the first bad batch on
        self.bad_batches = torch.zeros((), device=module.device)  # since the flag is 1
        fused = all(group.get("fused") for group in optimizer.param_groups)
        skips = fused or hasattr(optimizer, "found_inf")
        self.deferred = skips and (self.always_deferred or module.device.type == "cuda")
        if self.deferred:
            optimizer.found_inf = self.flag  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.index = batch_idx
        self.batch = None if self.deferred else batch

    def on_before_backward(self, trainer: lightning.Trainer, module: Any, loss: Tensor) -> None:
        position = trainer.current_epoch, self.index, trainer.global_step
        record = BatchRecord(*position, learning_rate(trainer), module.last_loss)
        self.unchecked = [*self.unchecked, record] if self.deferred else [record]
        # In a distributed run the other ranks wait in the backward pass.
        if not self.deferred and is_single_process() and not math.isfinite(loss.item()):
            self._stop(trainer, module, record)

    def on_after_backward(self, trainer: lightning.Trainer, module: Any) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        bad = ~get_total_norm(gradients, math.inf).isfinite()
        bad |= ~module.last_loss.isfinite()
        self.flag.copy_(torch.maximum(self.flag, bad.float()))
        if self.deferred:
            self.bad_batches += self.flag
        elif any_rank(bool(self.flag)):
            self._stop(trainer, module, self.unchecked[-1])

    def check_now(self, trainer: lightning.Trainer, module: Any) -> None:
        """Synchronise, and raise if a weight, or a batch since the last check, is not finite."""
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

    def on_validation_epoch_end(self, trainer: Any, module: Any, stage: Stage = "val") -> None:
        if any_rank(not math.isfinite(module.running[stage].loss)):
            epoch = f"the validation loss of epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            name = epoch if stage == "val" else "the test loss"
            raise NonFiniteError(f"{name} is not finite", {"not_finite": {"stage": stage}})

    def on_test_epoch_end(self, trainer: Any, module: Any) -> None:
        self.on_validation_epoch_end(trainer, module, "test")

    @torch.inference_mode(False)  # on_validation_start is called in inference mode
    def _stop(
        self, trainer: Any, module: Classifier, record: BatchRecord | None, updated: bool = False
    ) -> NoReturn:
        """Raise NonFiniteError, on all ranks, for the first bad batch of any; `updated` if the
        update after the batch has made a weight non-finite."""
        own = record and self._diagnosed(trainer, module, record, updated)
        found = [bad for bad in all_gather(own) if bad]
        first = min(found, key=lambda bad: (not bad.certain, bad.epoch, bad.batch))
        message, saved = first.text(trainer.max_epochs), None
        if first.tensors and trainer.is_global_zero:
            try:
                save(self.file, module, first)
                saved = str(self.file)
                message += f"; to reproduce it: {saved}"
            except OSError as failure:
                message += f"; {self.file} could not be written: {failure.strerror}"
        details = {"reason": first.cause, "indices": [*first.indices], "saved": saved}
        raise NonFiniteError(message, {"not_finite": first.facts() | details})

    def _diagnosed(
        self, trainer: Any, module: Classifier, record: BatchRecord, updated: bool
    ) -> BatchRecord:
        """The record with its images, moved to the CPU, and the cause."""
        loader, at = trainer.train_dataloader, (record.epoch, record.batch)
        indices = self.positions[loader.indices(*at).numpy()].tolist()
        images, labels = self.batch or loader.batch(*at)
        known = {"rank": module.global_rank, "indices": indices, "loss": float(record.loss)}
        record = replace(record, tensors=(images, labels), **known)
        try:
            record = with_cause(trainer, module, record, updated)
        except Exception as failure:  # must not hide what is already known
            reason = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
            record = replace(record, cause=f"looking for the layer failed: {reason}")
        # No views of larger tensors.
        return replace(record, tensors=(images.detach().cpu().clone(), labels.cpu().clone()))


def finite(tensors: Iterable[Any]) -> bool:
    """Whether all numbers in the tensors among `tensors` are finite. Synchronises."""
    all_finite = [t.isfinite().all() for t in tensors if isinstance(t, Tensor)]
    return not all_finite or bool(torch.stack(all_finite).all())


def with_cause(
    trainer: lightning.Trainer, module: Classifier, record: BatchRecord, updated: bool
) -> BatchRecord:
    """Repeat a batch, with the same random numbers, on a copy of the network with hooks."""
    assert record.tensors
    images, labels = record.tensors
    network, criterion = copy.deepcopy((module.network, module.loss))  # a copy is not compiled
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}

    def with_parameter(name: str, text: str) -> BatchRecord:
        layer = name.rpartition(".")[0]
        cause = f"{text} {name} ({type(network.get_submodule(layer)).__name__})"
        return replace(record, cause=cause, layer=layer, parameter=name)

    if updated:
        name = next(name for name, p in parameters.items() if not finite([p]))
        return with_parameter(name, "its gradient is finite, but not the updated")

    first: list[tuple[str, nn.Module]] = []

    def check(name: str, layer: nn.Module, _: Any, output: Any) -> None:
        if not first and not finite(output if isinstance(output, (tuple, list)) else [output]):
            first.append((name, layer))

    for name, layer in network.named_modules():
        layer.register_forward_hook(partial(check, name))
    network.train()
    criterion.train()
    module.reseed(record.epoch, record.batch)
    with trainer.precision_plugin.forward_context(), torch.enable_grad():
        loss = criterion(network(images), labels)
    if first:
        name, layer = first[0]
        kind = type(layer).__name__
        text = f"the first layer with a non-finite output is {f'{name} ({kind})' if name else kind}"
        own = layer.named_parameters(name)
        bad = next((parameter for parameter, t in own if not finite([t])), None)
        if not finite([images]):
            text += ", and the images are not finite"
        elif bad:
            text += f", whose {bad.rpartition('.')[2]} is not finite"
        return replace(record, cause=text, layer=name, parameter=bad)
    if not loss.isfinite():
        kind = type(criterion).__name__
        return replace(record, cause=f"every output is finite, but the loss of {kind} is not")
    found = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
    if bad_gradients := [n for n, g in zip(parameters, found, strict=True) if not finite([g])]:
        last = bad_gradients[-1].rpartition(".")[0]  # the first one in backward order
        name = next(n for n in bad_gradients if n.rpartition(".")[0] == last)
        return with_parameter(name, "every output is finite, but not the gradient of")
    return replace(record, cause="when the batch is repeated, all numbers are finite")


def save(file: Path, module: Classifier, record: BatchRecord) -> None:
    """Write what reproduces a batch, to be read by `torch.load(weights_only=True)`."""
    assert record.tensors
    module.reseed(record.epoch, record.batch, record.rank)
    content = record.facts() | {
        "torch_seed": torch.initial_seed(),
        "indices": torch.tensor(record.indices),
        "images": record.tensors[0],
        "labels": record.tensors[1],
        "state_dict": {name: t.cpu() for name, t in module.network.state_dict().items()},
    }
    with replacing(file) as to:
        torch.save(content, to)


def learning_rate(trainer: lightning.Trainer) -> float:
    """The current learning rate."""
    return float(trainer.optimizers[0].param_groups[0]["lr"])
