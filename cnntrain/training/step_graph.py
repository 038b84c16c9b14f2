"""Forward and backward of a training step in one launch: CUDA graphs."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from cnntrain.config import ConfigError

WARMUP = 3  # batches before the recorded one: libraries choose kernels and make room for them


class Recorder(Protocol):
    """Keeps the kernels that a function launches, and launches them again, on the same memory."""

    def record(self, work: Callable[[], None]) -> None:
        """Calls `work` and keeps its kernels. They have not run when this returns."""

    def replay(self) -> None:
        """Runs what was recorded."""


class CUDAGraph:
    """Records on the current CUDA device."""

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None  # which cannot be copied, as this can

    def record(self, work: Callable[[], None]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            work()

    def replay(self) -> None:
        assert self.graph is not None
        self.graph.replay()


class StepGraph:
    """Loss and gradients of a training batch by one launch, for which a small network on a GPU
    waits a fraction of the time that it takes to launch each kernel.

    The first batches are not computed here. The next one of their size is recorded, and from then
    on all of this size are replayed; those of another size, such as the last of an epoch, are not
    computed here either. The numbers are the same, bit for bit: dropout is drawn by the seed that
    the generator of the device has when a batch begins.

    Args:
        step: Computes the mean loss of a batch, of images (B, C, H, W) and labels (B,). It may
            change tensors in place, as batch normalisation does, and must not wait for the device.
        backward: Computes the gradients of that loss.
        parameters: Whose gradients they are.
        recorder: That of the device.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        backward: Callable[[Tensor], None],
        parameters: Sequence[nn.Parameter],
        recorder: Recorder,
    ):
        self.step, self.backward, self.recorder = step, backward, recorder
        self.parameters = parameters
        self.inputs: tuple[Tensor, Tensor] | None = None  # where a batch goes
        self.waited = 0  # batches of this size, before one was recorded
        self.loss: Tensor | None = None  # where the graph leaves it
        self.gradients: list[Tensor | None] = []  # the same

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """The loss of a batch, detached; its gradients are then in the parameters.

        None, and nothing has been done, for a batch that has to be computed without a graph.
        """
        fits = self.inputs is not None and images.shape == self.inputs[0].shape
        if self.loss is None:
            if not fits:
                self.inputs, self.waited = (images.clone(), labels.clone()), 0
            self.waited += 1
            if self.waited <= WARMUP:
                return None
            self._record()
        elif not fits:
            return None
        assert self.inputs is not None
        assert self.loss is not None
        for there, here in zip(self.inputs, (images, labels), strict=True):
            there.copy_(here)
        self.recorder.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient  # whatever has been there since
        return self.loss.clone()  # as that of the next batch will be in its place

    def _record(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None  # so that new ones are made, in the graph's own memory
        try:
            self.recorder.record(self._work)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                [
                    f"trainer.cuda_graphs=true: a step of this run cannot be recorded ({reason}); "
                    "take trainer.cuda_graphs=false"
                ]
            ) from error
        self.gradients = [parameter.grad for parameter in self.parameters]

    def _work(self) -> None:
        assert self.inputs is not None
        loss = self.step(*self.inputs)
        self.backward(loss)
        self.loss = loss.detach()
