"""Cause of a NaN or Inf: the layer, found by repeating the batch with forward hooks."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn

from cnntrain.atomic import replacing
from cnntrain.training.classifier import Classifier
from cnntrain.training.metrics import Stage


@dataclass(frozen=True)
class BatchRecord:
    """A batch with its loss and, once it was repeated, the cause of the non-finite number."""

    stage: Stage
    epoch: int  # from 0, as `batch`
    batch: int
    step: int  # optimizer steps before
    lr: float | None  # None in the test stage
    loss: Tensor | float
    rank: int = 0
    tensors: tuple[Tensor, Tensor] | None = None  # images (N, C, H, W), labels (N,)
    indices: Sequence[int] = ()  # positions of the images in the files of the data set
    cause: str = ""
    layer: str | None = None
    layer_type: str | None = None
    parameter: str | None = None

    @property
    def certain(self) -> bool:
        """Whether this rank's images are the cause: a non-finite gradient alone may come from
        another rank, as DDP averages gradients."""
        return self.layer is not None or not math.isfinite(self.loss)

    def text(self, epochs: int | None) -> str:
        epoch = f"epoch {self.epoch + 1}/{epochs}"
        stage = {"train": epoch, "val": f"validation of {epoch}", "test": "test"}[self.stage]
        lr = "" if self.lr is None else f", lr {self.lr:.3g}"
        loss = f"the loss of {len(self.indices)} images is {float(self.loss):.4g}"
        return f"{stage}, batch {self.batch + 1}, step {self.step}{lr}: {loss}; {self.cause}"

    def facts(self) -> dict[str, Any]:
        names = "stage", "step", "lr", "loss", "layer", "layer_type", "parameter"
        facts = {"epoch": self.epoch + 1, "batch": self.batch + 1}
        return facts | {name: getattr(self, name) for name in names}


def finite(tensors: Iterable[Any]) -> bool:
    """Whether all numbers in the tensors among `tensors` are finite. Synchronises."""
    all_finite = [t.isfinite().all() for t in tensors if isinstance(t, Tensor)]
    return not all_finite or bool(torch.stack(all_finite).all())


def cause_of(
    trainer: lightning.Trainer, module: Classifier, record: BatchRecord, updated: bool
) -> dict[str, str | None]:
    """Repeat a batch, with the random numbers of the first time, on a copy of the network with
    forward hooks. Returns the last fields of a BatchRecord."""
    assert record.tensors
    training, (images, labels) = record.stage == "train", record.tensors
    network, criterion = copy.deepcopy((module.network, module.loss))  # a copy is not compiled
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}

    def of_parameter(name: str, text: str) -> dict[str, str | None]:
        layer = name.rpartition(".")[0]
        kind = type(network.get_submodule(layer)).__name__
        cause = f"{text} {name} ({kind})"
        return {"cause": cause, "layer": layer, "layer_type": kind, "parameter": name}

    if updated:
        name = next(name for name, p in parameters.items() if not finite([p]))
        return of_parameter(name, "its gradient is finite, but not the updated")

    first: list[tuple[str, nn.Module]] = []

    def check(name: str, layer: nn.Module, _: Any, output: Any) -> None:
        if not first and not finite(output if isinstance(output, (tuple, list)) else [output]):
            first.append((name, layer))

    for name, layer in network.named_modules():
        layer.register_forward_hook(partial(check, name))
    network.train(training)
    criterion.train(training)
    module.reseed(record.epoch, record.batch)
    with trainer.precision_plugin.forward_context(), torch.set_grad_enabled(training):
        loss = criterion(network(images), labels)
    if first:
        name, layer = first[0]
        kind = type(layer).__name__
        text = f"the first layer with a non-finite output is {f'{name} ({kind})' if name else kind}"
        own: dict[str, Tensor] = dict(layer.named_parameters())
        if not training:  # in training the batch itself has changed them
            own |= dict(layer.named_buffers())
        bad = next((f"{name}.{n}".strip(".") for n, t in own.items() if not finite([t])), None)
        if not finite([images]):
            text += ", and the images are not finite"
        elif bad:
            text += f", whose {bad.rpartition('.')[2]} is not finite"
        return {"cause": text, "layer": name, "layer_type": kind, "parameter": bad}
    if not loss.isfinite():
        kind = type(criterion).__name__
        return {"cause": f"every output is finite, but the loss of {kind} is not"}
    if training:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = scaler.scale(loss) if scaler else loss
        found = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
        if bad_gradients := [n for n, g in zip(parameters, found, strict=True) if not finite([g])]:
            last = bad_gradients[-1].rpartition(".")[0]  # the first one in backward order
            name = next(n for n in bad_gradients if n.rpartition(".")[0] == last)
            return of_parameter(name, "every output is finite, but not the gradient of")
    return {"cause": "when the batch is repeated, all numbers are finite"}


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
