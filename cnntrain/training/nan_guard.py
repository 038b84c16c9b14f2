"""NaN/Inf guard: stops training before a non-finite loss or gradient reaches the weights, and
repeats the batch with forward hooks to find the layer."""

import copy
import math
from collections.abc import Iterable
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
from cnntrain.training.distributed import all_gather, any_rank
from cnntrain.training.step_graph import is_fused


class NonFiniteError(NoTraceback, Exception):
    """A loss, gradient or weight is NaN or Inf; the message names the batch and the layer.

    Attributes:
        details: The same for result.json, as {"not_finite": {...}}. Epoch and batch count from 1.
    """

    def __init__(self, message: str, details: dict[str, Any]):
        super().__init__(message)
        self.details = details


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
        self.file, self.positions = directory / "not_finite.pt", positions
        self.always_deferred = deferred
        self.unchecked: list[dict[str, Any]] = []  # batches since the last check, as in `details`
        self.batch: tuple[Tensor, Tensor] | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        optimizer = trainer.optimizers[0]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.flag = torch.zeros((), device=module.device)  # 1 from the first bad batch on
        self.bad_batches = torch.zeros((), device=module.device)  # since the flag is 1
        skips = is_fused(optimizer) or hasattr(optimizer, "found_inf")
        self.deferred = skips and (self.always_deferred or module.device.type == "cuda")
        if self.deferred:
            optimizer.found_inf = self.flag  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = None if self.deferred else batch

    def on_before_backward(self, trainer: lightning.Trainer, module: Any, loss: Tensor) -> None:
        record = {
            "stage": "train",
            "epoch": trainer.current_epoch + 1,
            "batch": trainer.fit_loop.batch_idx + 1,
            "loss": module.last_loss,  # a tensor: no synchronisation
            "step": trainer.global_step,
            "lr": learning_rate(trainer),
        }
        self.unchecked = [*self.unchecked, record] if self.deferred else [record]

    def on_after_backward(self, trainer: lightning.Trainer, module: Any) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        bad = ~get_total_norm(gradients, math.inf).isfinite()
        bad |= ~module.last_loss.isfinite()
        self.flag.copy_(torch.maximum(self.flag, bad.float()))
        if self.deferred:
            self.bad_batches += self.flag
        elif any_rank(bool(self.flag)):
            self._stop(trainer, module, self.unchecked[-1])

    def check_now(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        """Synchronise, and raise if a weight, or a batch since the last check, is not finite."""
        if not self.unchecked:
            return
        bad_batches = int(self.bad_batches) if self.deferred else 0
        if self.deferred and any_rank(bad_batches > 0):
            self._stop(trainer, module, self.unchecked[-bad_batches] if bad_batches else None)
        if not finite(self.parameters):
            self._stop(trainer, module, self.unchecked[-1], updated=True)
        self.unchecked.clear()

    on_validation_start = on_train_epoch_end = check_now  # type: ignore[assignment]
    on_save_checkpoint = check_now  # type: ignore[assignment]

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self.check_now(trainer, module)

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        if any_rank(not math.isfinite(module.running[module.stage].loss)):
            epoch = f"the validation loss of epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            name = epoch if module.stage == "val" else "the test loss"
            raise NonFiniteError(f"{name} is not finite", {"not_finite": {"stage": module.stage}})

    on_test_epoch_end = on_validation_epoch_end  # type: ignore[assignment]

    @torch.inference_mode(False)  # on_validation_start is called in inference mode
    def _stop(
        self, trainer: Any, module: Classifier, record: dict[str, Any] | None, updated: bool = False
    ) -> NoReturn:
        """Raise NonFiniteError, on all ranks, for the first bad batch of any; `updated` if the
        update after the batch has made a weight non-finite."""
        own = record and self._diagnosed(trainer, module, record, updated)

        def order(bad: dict[str, Any]) -> tuple[bool, int, int]:
            # DDP averages gradients: a non-finite one alone may come from another rank.
            uncertain = bad["layer"] is None and math.isfinite(bad["loss"])
            return uncertain, bad["epoch"], bad["batch"]

        first: dict[str, Any] = min(filter(None, all_gather(own)), key=order).copy()
        tensors = {name: first.pop(name) for name in ("images", "labels")}
        position = first["epoch"] - 1, first["batch"] - 1, first.pop("rank")
        message = (
            "epoch {epoch}/{epochs}, batch {batch}, step {step}, lr {lr:.3g}: the loss of {count} "
            "images is {loss:.4g}; {reason}"
        ).format(epochs=trainer.max_epochs, count=len(first["indices"]), **first)
        if not math.isfinite(first["loss"]):
            first["loss"] = str(first["loss"])  # JSON has no such number
        saved = None
        if trainer.is_global_zero:
            module.reseed(*position)
            weights = {name: t.cpu() for name, t in module.network.state_dict().items()}
            content = first | tensors | {"torch_seed": torch.initial_seed(), "state_dict": weights}
            content["indices"] = torch.tensor(content["indices"])
            try:
                with replacing(self.file) as file:
                    torch.save(content, file)
                saved = str(self.file)
                message += f"; to reproduce it: {saved}"
            except OSError as failure:
                message += f"; {self.file} could not be written: {failure.strerror}"
        raise NonFiniteError(message, {"not_finite": first | {"saved": saved}})

    def _diagnosed(
        self, trainer: Any, module: Classifier, record: dict[str, Any], updated: bool
    ) -> dict[str, Any]:
        """The record with the cause, and the batch on the CPU."""
        loader, at = trainer.train_dataloader, (record["epoch"] - 1, record["batch"] - 1)
        batch = self.batch or loader.batch(*at)
        try:
            layer, parameter, reason = find_cause(trainer, module, record, batch, updated)
        except Exception as failure:  # must not hide what is already known
            reason = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
            layer, parameter, reason = None, None, f"looking for the layer failed: {reason}"
        images, labels = (part.detach().cpu().clone() for part in batch)  # not views
        return {
            **record,
            "loss": float(record["loss"]),
            "layer": layer,
            "parameter": parameter,
            "reason": reason,
            "indices": self.positions[loader.indices(*at).numpy()].tolist(),
            "images": images,
            "labels": labels,
            "rank": module.global_rank,
        }


def finite(tensors: Iterable[Any]) -> bool:
    """Whether all numbers in the tensors among `tensors` are finite. Synchronises."""
    all_finite = [t.isfinite().all() for t in tensors if isinstance(t, Tensor)]
    return not all_finite or bool(torch.stack(all_finite).all())


def find_cause(
    trainer: Any, module: Classifier, record: dict[str, Any], batch: Any, updated: bool
) -> tuple[str | None, str | None, str]:
    """Repeat a batch, with the same random numbers, on a copy of the network with hooks.

    Returns the names of the layer and the parameter, and the cause.
    """
    images, labels = batch
    network, criterion = copy.deepcopy((module.network, module.loss))  # a copy is not compiled
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}

    def parameter(name: str, text: str) -> tuple[str, str, str]:
        layer = name.rpartition(".")[0]
        return layer, name, f"{text} {name} ({type(network.get_submodule(layer)).__name__})"

    if updated:
        name = next(name for name, p in parameters.items() if not finite([p]))
        return parameter(name, "its gradient is finite, but not the updated")

    first: list[tuple[str, nn.Module]] = []

    def check(name: str, layer: nn.Module, _: Any, output: Any) -> None:
        if not first and not finite(output if isinstance(output, (tuple, list)) else [output]):
            first.append((name, layer))

    for name, layer in network.named_modules():
        layer.register_forward_hook(partial(check, name))
    network.train()
    criterion.train()
    module.reseed(record["epoch"] - 1, record["batch"] - 1)
    with trainer.precision_plugin.forward_context(), torch.enable_grad():
        loss = criterion(network(images), labels)
    if first:
        name, layer = first[0]
        kind = type(layer).__name__
        text = f"the first layer with a non-finite output is {f'{name} ({kind})' if name else kind}"
        bad = next((p for p, t in layer.named_parameters(name) if not finite([t])), None)
        if not finite([images]):
            text += ", and the images are not finite"
        elif bad:
            text += f", whose {bad.rpartition('.')[2]} is not finite"
        return name, bad, text
    if not loss.isfinite():
        kind = type(criterion).__name__
        return None, None, f"every output is finite, but the loss of {kind} is not"
    found = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
    if bad_gradients := [n for n, g in zip(parameters, found, strict=True) if not finite([g])]:
        last = bad_gradients[-1].rpartition(".")[0]  # the first one in backward order
        name = next(n for n in bad_gradients if n.rpartition(".")[0] == last)
        return parameter(name, "every output is finite, but not the gradient of")
    return None, None, "when the batch is repeated, all numbers are finite"


def learning_rate(trainer: lightning.Trainer) -> float:
    """The current learning rate."""
    return float(trainer.optimizers[0].param_groups[0]["lr"])
