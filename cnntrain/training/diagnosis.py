"""Where a number that is not finite comes from, and what is kept to see it again."""

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cnntrain.atomic import replacing
from cnntrain.notebook import OneLine
from cnntrain.training.tally import Stage

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W), labels (N,)
Layer = tuple[str, nn.Module]  # its name in the network


class NotFinite(OneLine, Exception):
    """A loss, a gradient or a weight is not finite; the message says where, in one line.

    `details` holds the same for result.json, as {"not_finite": {...}}: epoch and batch count from
    1 as in metrics.csv, `step` is the number of updates made, `indices` are the places of the
    batch's images in the data set's own files.
    """

    def __init__(self, message: str, details: dict[str, Any]):
        super().__init__(message)
        self.details = details


@dataclass(frozen=True)
class Place:
    """A batch and its loss; epoch and batch count from 0, `step` is the number of updates made."""

    stage: Stage
    epoch: int
    batch: int
    step: int
    lr: float | None  # None in the test, which has no optimizer
    loss: Tensor | float

    def described(self, epochs: int | None) -> str:
        """For people, who count epochs and batches from 1."""
        epoch = f"epoch {self.epoch + 1}/{epochs}"
        stage = {"train": epoch, "val": f"validation of {epoch}", "test": "test"}[self.stage]
        lr = "" if self.lr is None else f", lr {self.lr:.3g}"
        return f"{stage}, batch {self.batch + 1}, step {self.step}{lr}"


@dataclass(frozen=True)
class Forward:
    """What came of a batch: the first layer whose output was not finite, the loss, gradients."""

    first: Layer | None
    loss: float
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the network's parameters


@dataclass(frozen=True)
class Cause:
    """A phrase, and the layer and the parameter that it names."""

    text: str
    layer: str | None = None
    type: str | None = None
    parameter: str | None = None


@dataclass(frozen=True)
class Finding:
    """What a process has found out about a batch, or its part of it, on the CPU."""

    place: Place
    rank: int
    batch: Batch | None
    indices: list[int]  # of the images, in the data set's own files
    cause: Cause

    @property
    def certain(self) -> bool:
        """Whether it is this batch: a gradient may have come from that of another process."""
        return self.cause.layer is not None or not math.isfinite(self.place.loss)


def finite(tensors: Iterable[Any]) -> bool:
    """Whether all numbers in them are finite; what is no tensor is taken to be."""
    all_finite = [t.isfinite().all() for t in tensors if isinstance(t, Tensor)]
    return not all_finite or bool(torch.stack(all_finite).all())


def first_not_finite(outputs: Iterable[tuple[str, nn.Module, Any]]) -> Layer | None:
    """The first layer with a non-finite number in what it returned."""
    for name, layer, output in outputs:
        if not finite(tree_leaves(output)):
            return name, layer
    return None


def repeat(trainer: lightning.Trainer, module: Any, place: Place, batch: Batch) -> Forward:
    """Run a batch once more, in the mode of the stage and with the same random numbers.

    Nothing is changed by it but the state of PyTorch's generators, and nothing is compiled.
    """
    training = place.stage == "train"
    network: nn.Module = module.network
    images, labels = batch
    first: list[Layer] = []

    def check(name: str, layer: nn.Module, _: Any, output: Any) -> None:
        if not first and first_not_finite([(name, layer, output)]):
            first.append((name, layer))

    with _unchanged(module), ExitStack() as during:
        if getattr(network, "_compiled_call_impl", None):
            during.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in network.named_modules():
            hook = layer.register_forward_hook(partial(check, name))
            during.callback(hook.remove)
        module.train(training)
        if training:
            module.reseed(place.epoch, place.batch)
        with trainer.precision_plugin.forward_context(), torch.set_grad_enabled(training):
            loss = module.loss(network(images), labels)
        gradients = {}
        if training and not first and finite([loss]):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            wanted = {name: p for name, p in network.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(
                scaler.scale(loss) if scaler else loss, list(wanted.values()), allow_unused=True
            )
            gradients = {n: g for n, g in zip(wanted, found, strict=True) if g is not None}
    return Forward(first[0] if first else None, float(loss.detach()), gradients)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Puts all buffers, such as running statistics, and the modes of all layers back."""
    modes = [(layer, layer.training) for layer in module.modules()]
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode
        for name, buffer in module.named_buffers():
            buffer.detach().copy_(buffers[name])


def explain(module: Any, stage: Stage, images: Tensor, forward: Forward) -> Cause:
    """Where the first number that was not finite came from."""
    if forward.first:
        name, layer = forward.first
        text = f"the first layer with a non-finite output is {label(name, layer)}"
        own: dict[str, Tensor] = dict(layer.named_parameters())
        if stage != "train":  # in training the batch itself has moved them
            own |= dict(layer.named_buffers())
        bad = next((tensor for tensor in own if not finite([own[tensor]])), None)
        if not finite([images]):
            text += ", and the images are not finite already"
        elif bad:
            text += f", whose {bad} is not finite already"
        return Cause(text, name, type(layer).__name__, f"{name}.{bad}".strip(".") if bad else None)
    if not math.isfinite(forward.loss):
        return Cause(f"every output is finite, but not what {label('', module.loss)} makes of it")
    gradients = {name: g for name, g in forward.gradients.items() if not finite([g])}
    if gradients:
        # The backward pass meets the last layer first.
        met = list(gradients)[-1].rpartition(".")[0]
        parameter = next(name for name in gradients if name.rpartition(".")[0] == met)
        return _parameter(module, parameter, "every output is finite, but not the gradient of")
    return Cause("repeated, the batch gives finite numbers")


def spoilt(module: Any) -> Cause:
    """The first parameter that an update has made non-finite."""
    name = next(name for name, p in module.network.named_parameters() if not finite([p]))
    return _parameter(module, name, "its gradient is finite, but not what the update made of")


def _parameter(module: Any, parameter: str, text: str) -> Cause:
    layer = parameter.rpartition(".")[0]
    kind = type(module.network.get_submodule(layer)).__name__
    return Cause(f"{text} {parameter} ({kind})", layer, kind, parameter)


def label(name: str, layer: nn.Module) -> str:
    """A layer's name and type; the network itself has no name."""
    return f"{name} ({type(layer).__name__})" if name else type(layer).__name__


def report(file: Path, trainer: lightning.Trainer, module: Any, finding: Finding) -> NotFinite:
    """Save what reproduces it, if that can be done, and say all of it in one line."""
    place, batch, indices, cause = finding.place, finding.batch, finding.indices, finding.cause
    loss = float(place.loss)
    facts: dict[str, Any] = {
        "stage": place.stage,
        "epoch": place.epoch + 1,
        "batch": place.batch + 1,
        "step": place.step,
        "lr": place.lr,
        "loss": loss,
        "layer": cause.layer,
        "layer_type": cause.type,
        "parameter": cause.parameter,
    }
    images = len(batch[1]) if batch else len(indices)
    where = place.described(trainer.max_epochs)
    said = f"{where}: the loss of {images} images is {loss:.4g}; {cause.text}"
    saved: str | None = None
    if batch and trainer.is_global_zero:
        try:
            module.reseed(place.epoch, place.batch, finding.rank)
            facts["torch_seed"] = torch.initial_seed()
            _save(file, module.network, batch, {**facts, "indices": torch.tensor(indices)})
            saved = str(file)
            said += f"; to reproduce it: {file}"
        except Exception as error:  # a full disk, say, must not hide the rest
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            said += f"; {file} could not be written: {reason}"
    details = {name: json_number(value) for name, value in facts.items()}
    details |= {"reason": cause.text, "indices": indices, "saved": saved}
    return NotFinite(said, {"not_finite": details})


def json_number(value: Any) -> Any:
    """JSON knows no nan and no inf: they become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _save(file: Path, network: nn.Module, batch: Batch, facts: dict[str, Any]) -> None:
    """Plain containers and tensors on the CPU, for `torch.load(weights_only=True)`."""
    images, labels = batch
    state = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({**facts, "images": images, "labels": labels, "state_dict": state}, buffer)
    with replacing(file) as to:
        to.write(buffer.getvalue())
