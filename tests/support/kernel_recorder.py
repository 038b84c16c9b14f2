"""CUDA graphs on the CPU: operators are captured and replayed on the same memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

# Operators that synchronise with the device, which a CUDA graph cannot capture.
SYNCHRONISING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2"}


class KernelRecorder:
    """A recorder for `StepGraph`. A replay repeats only operators on tensors."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.graphs.append(graph := Graph())
        with torch.random.fork_rng(devices=[]), _Recording(graph):  # recording draws nothing
            work()
        return graph.replay

    @property
    def replays(self) -> list[int]:
        """Number of replays of each graph."""
        return [graph.replays for graph in self.graphs]


class Graph:
    def __init__(self) -> None:
        self.kernels: list[tuple[Any, Any, Any, Any]] = []  # operator, arguments, results
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        # What was recorded is below autocast, which may be on where it is replayed.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for operator, args, kwargs, results in self.kernels:
                again = operator(*args, **kwargs)
                for kept, new in zip(tree_flatten(results)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)


class _Recording(TorchDispatchMode):
    """Runs operators, as later ones need their results, and restores what they change: on CUDA, a
    capture computes nothing."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph
        self.changed: list[tuple[Tensor, Tensor]] = []  # with what was in them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in SYNCHRONISING:
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name.startswith("running_"):  # of which schemas say nothing
                for tensor in tree_flatten(value)[0]:
                    if isinstance(tensor, Tensor):
                        self.changed.append((tensor, tensor.clone()))
        results = func(*args, **kwargs)
        # Detached, so that no graph of autograd is kept, at the same addresses.
        args, kwargs, kept = tree_map_only(Tensor, _same_memory, (args, kwargs, results))
        self.graph.kernels.append((func, args, kwargs, kept))
        return results

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        with torch.no_grad():
            for tensor, before in reversed(self.changed):
                tensor.copy_(before)


def _same_memory(tensor: Tensor) -> Tensor:
    return tensor.detach()
