"""NaN/Inf guard: stops training before a non-finite loss or gradient reaches the weights."""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import Tensor, nn

from cnntrain.atomic import replacing
from cnntrain.terminal import NoTraceback
from cnntrain.training.classifier import unscales
from cnntrain.training.distributed import all_gather, any_rank, is_single_process
from cnntrain.training.record import learning_rate
from cnntrain.training.tally import Stage

FILE = "not_finite.pt"

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W), labels (N,)


class NonFiniteError(NoTraceback, Exception):
    """A loss, a gradient or a weight is NaN or Inf; the message names the batch and the layer.

    Attributes:
        details: The same for result.json, as {"not_finite": {...}}. Epoch and batch count from 1,
            as in metrics.csv; `step` is the number of optimizer steps before; `indices` are the
            positions of the batch's images in the files of the data set.
    """

    def __init__(self, message: str, details: dict[str, Any]):
        super().__init__(message)
        self.details = details


@dataclass(frozen=True)
class BatchRecord:
    """A batch, its loss and, once it was repeated, why the loss or a gradient is not finite.

    Epoch and batch count from 0; `step` is the number of optimizer steps before; `lr` is None in
    the test stage. `cause` is a phrase, with the layer and the parameter in it.
    """

    stage: Stage
    epoch: int
    batch: int
    step: int
    lr: float | None
    loss: Tensor | float
    rank: int = 0
    tensors: Batch | None = None
    indices: Sequence[int] = ()  # of the images, in the files of the data set
    cause: str = ""
    layer: str | None = None
    layer_type: str | None = None
    parameter: str | None = None

    @property
    def certain(self) -> bool:
        """Whether this process's images are the cause. DDP averages gradients, so a non-finite
        gradient alone may come from another process."""
        return self.layer is not None or not math.isfinite(self.loss)

    def text(self, epochs: int | None) -> str:
        epoch = f"epoch {self.epoch + 1}/{epochs}"
        stage = {"train": epoch, "val": f"validation of {epoch}", "test": "test"}[self.stage]
        lr = "" if self.lr is None else f", lr {self.lr:.3g}"
        loss = f"the loss of {len(self.indices)} images is {float(self.loss):.4g}"
        return f"{stage}, batch {self.batch + 1}, step {self.step}{lr}: {loss}; {self.cause}"

    def facts(self) -> dict[str, Any]:
        names = "stage", "epoch", "batch", "step", "lr", "loss", "layer", "layer_type", "parameter"
        facts = {name: getattr(self, name) for name in names}
        return facts | {"epoch": self.epoch + 1, "batch": self.batch + 1}


class NaNGuard(lightning.Callback):
    """Raises NonFiniteError before the optimizer step that would use a non-finite gradient.

    Must be the first callback, so that nothing is logged or saved before the check. Writes the
    batch, and the weights it was computed with, into `directory`/not_finite.pt.

    On CUDA the check is asynchronous: a device-side flag makes fused optimizers and Muon skip this
    and all later updates (their `found_inf`, as `GradScaler` uses it), and the host reads it only
    every `log_every_n_steps` steps, at the end of an epoch, before a checkpoint and in `check_now`.
    With other optimizers, and on other devices, the host checks every batch. The layer is found
    by repeating the batch with forward hooks. An overflow of float16 gradients is left to the
    `GradScaler` until its scale is down to 1.

    With several processes all stop together; rank 0 reports the batch that was the cause.

    Args:
        directory: The run directory.
        train, val: Positions of the images of these splits in the files of the data set, int (N,).
        deferred: Checks asynchronously on any device; for tests.
    """

    def __init__(
        self, directory: Path, train: np.ndarray, val: np.ndarray, *, deferred: bool = False
    ):
        self.file = directory / FILE
        self.positions: dict[Stage, np.ndarray] = {"train": train, "val": val}
        self.always_deferred = deferred
        self.unchecked: list[BatchRecord] = []  # batches since the last check
        self.batch: Batch | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        optimizer = trainer.optimizers[0]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.flag = torch.zeros((), device=module.device)  # 1 from the first bad batch on
        self.bad_batches = torch.zeros((), device=module.device)  # since the flag is 1
        skips = unscales(optimizer) or (self.scaler is None and hasattr(optimizer, "found_inf"))
        self.deferred = skips and (self.always_deferred or module.device.type == "cuda")
        if self.deferred:
            optimizer.found_inf = self.flag  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.index = batch_idx
        self.batch = None if self.deferred else batch

    def on_before_backward(self, trainer: lightning.Trainer, module: Any, loss: Tensor) -> None:
        step, lr, loss = trainer.global_step, learning_rate(trainer), module.last_loss
        record = BatchRecord("train", trainer.current_epoch, self.index, step, lr, loss)
        self.unchecked = [*self.unchecked, record] if self.deferred else [record]
        # With several processes, the others are waiting in the backward pass.
        if not self.deferred and is_single_process() and not math.isfinite(loss.item()):
            self._stop(trainer, module, record)

    def on_after_backward(self, trainer: lightning.Trainer, module: Any) -> None:
        self._set_flag(module.last_loss)
        if self.deferred:
            self.bad_batches += self.flag
        elif any_rank(bool(self.flag)):
            self._stop(trainer, module, self.unchecked[-1])

    def _set_flag(self, loss: Tensor) -> None:
        """Set the flag to 1 if the loss or a gradient is not finite, without synchronisation."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        overflow = non_finite_flag(gradients)
        if self.scaler is not None:
            overflow *= self.scaler.scale(torch.ones_like(self.flag)) <= 1
        self.flag.copy_(torch.maximum(self.flag, torch.maximum(non_finite_flag([loss]), overflow)))
        if self.scaler is not None:
            # The scaler overwrites found_inf by what it finds in the gradients: divide by 1 or 0.
            gradients[0].div_(1 - self.flag)

    def check_now(self, trainer: lightning.Trainer, module: Any) -> None:
        """Synchronise with the device; raise NonFiniteError if a batch since the last check, or a
        weight, is not finite. To be called before weights are saved or shown."""
        if not self.unchecked:
            return
        bad_batches = int(self.bad_batches) if self.deferred else 0
        if self.deferred and any_rank(bad_batches > 0):
            self._stop(trainer, module, self.unchecked[-bad_batches] if bad_batches else None)
        if not finite(self.parameters):
            self._stop(trainer, module, self.unchecked[-1], updated=True)
        self.unchecked.clear()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.check_now(trainer, module)

    def on_validation_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.check_now(trainer, module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.check_now(trainer, module)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        self.check_now(trainer, module)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._check_evaluation(trainer, module, "val")

    def on_test_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._check_evaluation(trainer, module, "test")

    @torch.inference_mode(False)
    def _check_evaluation(self, trainer: lightning.Trainer, module: Any, stage: Stage) -> None:
        """Check the sum of the losses of an evaluation, which the host is about to read."""
        total = float(module.tallies[stage].loss)
        if not any_rank(not math.isfinite(total)):
            return
        lr = learning_rate(trainer) if stage == "val" else None
        loader = loader_of(trainer, stage)
        bad: BatchRecord | None = None
        for index in range(len(loader)) if not math.isfinite(total) else ():
            batch = loader.batch(0, index)
            at = BatchRecord(stage, trainer.current_epoch, index, trainer.global_step, lr, total)
            at = replace(at, tensors=batch)
            loss = repeat(trainer, module, at)[0] if len(batch[1]) else 0.0
            if not math.isfinite(loss):
                bad = replace(at, loss=loss)
                break
        if any_rank(bad is not None):
            self._stop(trainer, module, bad)
        raise NonFiniteError(
            f"{stage}: the sum of the losses is {total}, but every batch is finite when repeated",
            {"not_finite": {"stage": stage, "loss": str(total)}},
        )

    @torch.inference_mode(False)  # on_validation_start is called in inference mode
    def _stop(
        self,
        trainer: lightning.Trainer,
        module: Any,
        record: BatchRecord | None,
        *,
        updated: bool = False,
    ) -> NoReturn:
        """Raise NonFiniteError about this batch; with several processes, which call it together,
        about the first bad batch of all."""
        own = self._diagnosed(trainer, module, record, updated) if record else None
        found = [bad for bad in all_gather(own) if bad]
        found = [bad for bad in found if bad.certain] or found
        first = min(found, key=lambda bad: (bad.epoch, bad.batch))
        message, saved = first.text(trainer.max_epochs), None
        if first.tensors and trainer.is_global_zero:
            try:
                save(self.file, module, first)
                saved = str(self.file)
                message += f"; to reproduce it: {saved}"
            except Exception as failure:  # such as a full disk
                reason = getattr(failure, "strerror", None) or str(failure).partition("\n")[0]
                message += f"; {self.file} could not be written: {reason}"
        details = {name: json_number(value) for name, value in first.facts().items()}
        details |= {"reason": first.cause, "indices": [*first.indices], "saved": saved}
        raise NonFiniteError(message, {"not_finite": details})

    def _diagnosed(
        self, trainer: lightning.Trainer, module: Any, record: BatchRecord, updated: bool
    ) -> BatchRecord:
        tensors, indices = self.batch if record.stage == "train" else None, []
        cause: dict[str, Any]
        try:
            loader = loader_of(trainer, record.stage)
            rows = loader.indices(record.epoch, record.batch).numpy()
            positions = self.positions.get(record.stage)
            indices = (rows if positions is None else positions[rows]).tolist()
            tensors = tensors or loader.batch(record.epoch, record.batch)
            cause = cause_of(trainer, module, replace(record, tensors=tensors), updated)
        except Exception as failure:  # must not hide what is known already
            message = str(failure).partition("\n")[0]
            cause = {"cause": f"looking for the layer failed: {type(failure).__name__}: {message}"}
        if tensors:
            tensors = tensors[0].detach().cpu().clone(), tensors[1].cpu().clone()  # no views
        known = {"rank": module.global_rank, "tensors": tensors, "indices": indices}
        return replace(record, loss=float(record.loss), **known, **cause)


def loader_of(trainer: lightning.Trainer, stage: Stage) -> Any:
    if stage == "train":
        return trainer.train_dataloader
    return trainer.val_dataloaders if stage == "val" else trainer.test_dataloaders


def finite(tensors: Iterable[Any]) -> bool:
    """Whether all numbers in the tensors among `tensors` are finite."""
    all_finite = [t.isfinite().all() for t in tensors if isinstance(t, Tensor)]
    return not all_finite or bool(torch.stack(all_finite).all())


def non_finite_flag(tensors: Iterable[Tensor]) -> Tensor:
    """1.0 if a number in `tensors` is NaN or Inf, else 0.0, without synchronisation. A sum is four
    times as fast as `isfinite().all()`."""
    sums = [(torch.view_as_real(t) if t.is_complex() else t).sum() for t in tensors]
    return 1 - torch.stack(sums).sum().isfinite().float()


def repeat(
    trainer: lightning.Trainer, module: Any, record: BatchRecord
) -> tuple[float, tuple[str, nn.Module] | None, dict[str, Tensor]]:
    """Loss, the first layer with a non-finite output, and the gradients of a batch, run again in
    the mode of its stage and with the same random numbers.

    Buffers and modes are restored; nothing is compiled.
    """
    training = record.stage == "train"
    network: nn.Module = module.network
    assert record.tensors
    images, labels = record.tensors
    first: list[tuple[str, nn.Module]] = []

    def check(name: str, layer: nn.Module, _: Any, output: Any) -> None:
        outputs = output if isinstance(output, (tuple, list)) else [output]
        if not first and not finite(outputs):
            first.append((name, layer))

    with _restored(module), ExitStack() as hooks:
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in network.named_modules():
            hooks.callback(layer.register_forward_hook(partial(check, name)).remove)
        module.train(training)
        if training:
            module.reseed(record.epoch, record.batch)
        with trainer.precision_plugin.forward_context(), torch.set_grad_enabled(training):
            loss = module.loss(network(images), labels)
        gradients = {}
        if training and not first and loss.isfinite():
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            wanted = {name: p for name, p in network.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(
                scaler.scale(loss) if scaler else loss, list(wanted.values()), allow_unused=True
            )
            gradients = {n: g for n, g in zip(wanted, found, strict=True) if g is not None}
    return float(loss.detach()), first[0] if first else None, gradients


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Restores all buffers, such as running statistics, and the modes of all layers."""
    modes = [(layer, layer.training) for layer in module.modules()]
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode
        for name, buffer in module.named_buffers():
            buffer.detach().copy_(buffers[name])


def cause_of(
    trainer: lightning.Trainer, module: Any, record: BatchRecord, updated: bool
) -> dict[str, Any]:
    """Where the first non-finite number of a batch, or of the update after it, came from: the last
    fields of a BatchRecord."""
    network: nn.Module = module.network
    images, _ = record.tensors or (None, None)

    def of_parameter(name: str, text: str) -> dict[str, Any]:
        layer = name.rpartition(".")[0]
        kind = type(network.get_submodule(layer)).__name__
        cause = f"{text} {name} ({kind})"
        return {"cause": cause, "layer": layer, "layer_type": kind, "parameter": name}

    if updated:
        name = next(name for name, p in network.named_parameters() if not finite([p]))
        return of_parameter(name, "its gradient is finite, but not the updated")
    loss, first, gradients = repeat(trainer, module, record)
    if first:
        name, layer = first
        kind = type(layer).__name__
        text = f"the first layer with a non-finite output is {f'{name} ({kind})' if name else kind}"
        own: dict[str, Tensor] = dict(layer.named_parameters())
        if record.stage != "train":  # in training the batch itself has changed them
            own |= dict(layer.named_buffers())
        bad = next(
            (f"{name}.{tensor}".strip(".") for tensor in own if not finite([own[tensor]])), None
        )
        if not finite([images]):
            text += ", and the images are not finite"
        elif bad:
            text += f", whose {bad.rpartition('.')[2]} is not finite"
        return {"cause": text, "layer": name, "layer_type": kind, "parameter": bad}
    if not math.isfinite(loss):
        kind = type(module.loss).__name__
        return {"cause": f"every output is finite, but the loss of {kind} is not"}
    if bad_gradients := [name for name in gradients if not finite([gradients[name]])]:
        layer_name = bad_gradients[-1].rpartition(".")[0]  # which the backward reaches first
        name = next(n for n in bad_gradients if n.rpartition(".")[0] == layer_name)
        return of_parameter(name, "every output is finite, but not the gradient of")
    return {"cause": "when the batch is repeated, all numbers are finite"}


def save(file: Path, module: Any, record: BatchRecord) -> None:
    """Write what reproduces a batch, as plain containers for `torch.load(weights_only=True)`."""
    assert record.tensors
    module.reseed(record.epoch, record.batch, record.rank)
    content = record.facts() | {
        "torch_seed": torch.initial_seed(),
        "indices": torch.tensor(record.indices),
        "images": record.tensors[0],
        "labels": record.tensors[1],
        "state_dict": {name: t.cpu() for name, t in module.network.state_dict().items()},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(file) as to:
        to.write(buffer.getvalue())


def json_number(value: Any) -> Any:
    """JSON has no NaN and no Inf: they become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
