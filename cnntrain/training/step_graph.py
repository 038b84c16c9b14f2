"""A training step in two launches: CUDA graphs of its forward and backward, and of its update."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from cnntrain.config import ConfigError
from cnntrain.training.muon import Muon

WARMUP = 3  # batches before the recorded one: libraries choose kernels and make room for them

# Calls a function and keeps the kernels that it launches, which have not run when this returns.
# What it gives launches them again, on the same memory.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


class CUDAGraphs:
    """Records on the current CUDA device. No two of its graphs may be at work at the same time:
    what one needs for itself, the next one takes as well."""

    def __init__(self) -> None:
        self.memory: Any = None  # where all of them compute

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            work()
        self.memory = graph.pool()
        return graph.replay


@dataclass
class Recorded:
    """A step for batches of one size."""

    inputs: tuple[Tensor, Tensor]  # where a batch goes
    waited: int = 0  # batches of this size, before one was recorded
    replay: Callable[[], None] | None = None
    loss: Tensor | None = None  # where it leaves it
    gradients: tuple[Tensor | None, ...] = ()  # the same
    update: Callable[[], None] | None = None  # by these gradients
    settings: Any = None  # of the optimizer, as of then


class StepGraph:
    """Computes training batches by one launch for the loss and the gradients, and one for the
    update, for which a small network on a GPU waits a fraction of the time that it takes to launch
    each kernel. In between, whoever has to can look at the gradients, or clip them.

    The first batches of a size are not computed here. The next one is recorded, and from then on
    all of this size are replayed. The numbers are the same, bit for bit, but that learning rates
    are float32, which the kernels read from the device, and that Muon rounds otherwise by these.
    Dropout is drawn by the seed that the generator of the device has when a batch begins.

    Args:
        step: Computes the mean loss of a batch, of images (B, C, H, W) and labels (B,). It may
            change tensors in place, as batch normalisation does, and must not wait for the device.
        backward: Computes the gradients of that loss.
        optimizer: Of the parameters whose gradients they are. Its `step` becomes `update`.
        recorder: That of the device.
        updates: Whether updates may be recorded. They are where the optimizer is a fused one of
            PyTorch, or Muon, and nothing but its learning rates has changed since.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        backward: Callable[[Tensor], None],
        optimizer: Optimizer,
        recorder: Recorder,
        *,
        updates: bool = True,
    ):
        self.step, self.backward, self.recorder = step, backward, recorder
        self.groups = optimizer.param_groups
        self.parameters = [p for group in self.groups for p in group["params"] if p.requires_grad]
        self.recorded: dict[torch.Size, Recorded] = {}  # by the shape of the images
        self.now: Recorded | None = None  # what the last batch was computed by
        if updates and recordable(optimizer):
            device = self.parameters[0].device
            self.rates = [torch.zeros((), device=device) for _ in self.groups]
            self.rates_there: list[float] = []  # what they are
            self.eager_update = optimizer.step
            step_there = functools.partial(self.update)
            optimizer.step = functools.update_wrapper(step_there, optimizer.step)  # type: ignore

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """The loss of a batch, detached; its gradients are then in the parameters.

        None, and nothing has been done, for a batch that has to be computed without a graph.
        """
        self.now = None
        now = self.recorded.get(images.shape)
        if now is None:
            now = self.recorded[images.shape] = Recorded((images.clone(), labels.clone()))
        if now.replay is None:
            now.waited += 1
            if now.waited <= WARMUP:
                return None
            self._record(now)
        assert now.replay is not None
        assert now.loss is not None
        for there, here in zip(now.inputs, (images, labels), strict=True):
            there.copy_(here)
        now.replay()
        for parameter, gradient in zip(self.parameters, now.gradients, strict=True):
            parameter.grad = gradient  # whatever has been there since
        self.now = now
        return now.loss.clone()  # as that of the next batch will be in its place

    def update(self, closure: Callable[[], Any] | None = None) -> Any:
        """What `Optimizer.step` does."""
        loss = closure() if closure else None
        rates = [float(group["lr"]) for group in self.groups]
        if rates != self.rates_there:
            for there, rate in zip(self.rates, rates, strict=True):
                there.fill_(rate)
            self.rates_there = rates
        now = self.now
        gradients = tuple(p.grad for p in self.parameters)
        if now is None or any(a is not b for a, b in zip(gradients, now.gradients, strict=True)):
            self._update()
            return loss
        settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self.groups
        ]
        if now.update is None:
            with self._recorded_on_purpose():
                now.update, now.settings = self._kept(self._update), settings
        if settings == now.settings:
            now.update()
        else:
            self._update()
        return loss

    def _record(self, now: Recorded) -> None:
        def work() -> None:
            loss = self.step(*now.inputs)
            self.backward(loss)
            now.loss = loss.detach()

        for parameter in self.parameters:
            parameter.grad = None  # so that new ones are made, in the graph's own memory
        now.replay = self._kept(work)
        now.gradients = tuple(parameter.grad for parameter in self.parameters)

    def _kept(self, work: Callable[[], None]) -> Callable[[], None]:
        try:
            return self.recorder(work)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                [
                    f"trainer.cuda_graphs=true: a step of this run cannot be recorded ({reason}); "
                    "take trainer.cuda_graphs=false"
                ]
            ) from error

    def _update(self) -> None:
        """The optimizer's own, by the learning rates on the device."""
        rates = [group["lr"] for group in self.groups]
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate
        try:
            self.eager_update()
        finally:
            for group, rate in zip(self.groups, rates, strict=True):
                group["lr"] = rate

    @contextmanager
    def _recorded_on_purpose(self) -> Iterator[None]:
        """Adam wants to be told so; a fused one does nothing else then."""
        told = [group for group in self.groups if "capturable" in group]
        before = [group["capturable"] for group in told]
        for group in told:
            group["capturable"] = True
        try:
            yield
        finally:
            for group, value in zip(told, before, strict=True):
                group["capturable"] = value


def recordable(optimizer: Optimizer) -> bool:
    """Whether `step` launches kernels that read all that changes, learning rates included, from
    the device."""
    fused = isinstance(optimizer, Adam | SGD) and all(g["fused"] for g in optimizer.param_groups)
    return fused or isinstance(optimizer, Muon)
