"""CUDA graph capture of the training step: one graph of forward and backward, one of the update."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from cnntrain.config import ConfigError
from cnntrain.training.optim import Muon

WARMUP = 3  # eager batches before the capture, in which libraries choose kernels and allocate

# Captures the kernels that a function launches, without running them, and returns a function that
# replays them on the same memory.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


class CUDAGraphs:
    """Captures graphs on the current CUDA device. They share one memory pool, so that no two of
    them may run at the same time."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            work()
        self.pool = graph.pool()
        return graph.replay


@dataclass
class Capture:
    """The graphs for one shape of a batch, and the memory that they read and write."""

    inputs: tuple[Tensor, Tensor]
    seen: int = 0  # batches of this shape before the capture
    replay: Callable[[], None] | None = None
    loss: Tensor | None = None
    gradients: tuple[Tensor | None, ...] = ()
    update: Callable[[], None] | None = None
    settings: Any = None  # of the optimizer when `update` was captured


class StepGraph:
    """Replays training steps as two CUDA graphs, between which gradients can be read or clipped.

    For a small network on a GPU a replay takes a fraction of the time to launch each kernel. The
    first batches of each size are not computed here, the next one is captured, and all further ones
    are replayed. Results are bitwise those of eager steps, except that learning rates are float32,
    read from the device, which Muon rounds differently. Dropout uses the seed that the generator of
    the device has at the start of a batch.

    Args:
        step: Returns the mean loss of images (B, C, H, W) and labels. It may change tensors in
            place, as batch normalisation does, and must not synchronise with the device.
        backward: Computes the gradients of that loss.
        optimizer: Its `step` is replaced by `update` if it is Muon or a fused one of PyTorch. Then
            updates in which only learning rates change are captured as well, with `updates`.
        recorder: Captures kernels.
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
        # By the shapes of images and labels: mixed labels are (B, classes).
        self.captures: dict[tuple[torch.Size, torch.Size], Capture] = {}
        self.current: Capture | None = None  # that of the last batch
        known = isinstance(optimizer, Adam | SGD) and is_fused(optimizer)
        if updates and (known or isinstance(optimizer, Muon)):
            device = self.parameters[0].device
            self.rates = [torch.zeros((), device=device) for _ in self.groups]
            self.rates_on_device: list[float] = []
            self.eager_update = optimizer.step
            update = functools.partial(self.update)
            optimizer.step = functools.update_wrapper(update, optimizer.step)  # type: ignore

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """The detached loss of a batch, with its gradients in the parameters; None, without any
        effect, for a batch that is to be computed eagerly."""
        self.current = None
        shapes = images.shape, labels.shape
        capture = self.captures.get(shapes)
        if capture is None:
            capture = self.captures[shapes] = Capture((images.clone(), labels.clone()))
        if capture.replay is None:
            capture.seen += 1
            if capture.seen <= WARMUP:
                return None
            self._capture_step(capture)
        assert capture.replay is not None
        assert capture.loss is not None
        for static, tensor in zip(capture.inputs, (images, labels), strict=True):
            static.copy_(tensor)
        capture.replay()
        for parameter, gradient in zip(self.parameters, capture.gradients, strict=True):
            parameter.grad = gradient  # an eager batch may have replaced it
        self.current = capture
        return capture.loss.clone()  # the next batch overwrites it

    def update(self, closure: Callable[[], Any] | None = None) -> Any:
        """Replaces `Optimizer.step`."""
        loss = closure() if closure else None
        rates = [float(group["lr"]) for group in self.groups]
        if rates != self.rates_on_device:
            for static, rate in zip(self.rates, rates, strict=True):
                static.fill_(rate)
            self.rates_on_device = rates
        settings = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.groups]
        capture = self.current
        if capture and any(map(is_not, (p.grad for p in self.parameters), capture.gradients)):
            capture = None
        if capture and capture.update is None:
            capture.update, capture.settings = self._record(self._update), settings
        if capture and capture.update and settings == capture.settings:
            capture.update()
        else:
            self._update()
        return loss

    def _capture_step(self, capture: Capture) -> None:
        def work() -> None:
            loss = self.step(*capture.inputs)
            self.backward(loss)
            capture.loss = loss.detach()

        for parameter in self.parameters:
            parameter.grad = None  # so that gradients are allocated in the pool of the graph
        capture.replay = self._record(work)
        capture.gradients = tuple(parameter.grad for parameter in self.parameters)

    def _record(self, work: Callable[[], None]) -> Callable[[], None]:
        try:
            return self.recorder(work)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            problem = f"trainer.cuda_graphs=true: a step of this run cannot be captured ({reason})"
            raise ConfigError([f"{problem}; use trainer.cuda_graphs=false"]) from error

    def _update(self) -> None:
        """The optimizer's own step, with learning rates read from the device."""
        before = [dict(group) for group in self.groups]
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:  # checked by Adam; it changes nothing if fused
                group["capturable"] |= capturing
        try:
            self.eager_update()
        finally:
            for group, settings in zip(self.groups, before, strict=True):
                group.update(settings)


def is_fused(optimizer: Optimizer) -> bool:
    """Whether `step` is fused: it then reads `grad_scale` and `found_inf` on the device, and skips
    the update where the latter is 1."""
    return all(group.get("fused") for group in optimizer.param_groups)
