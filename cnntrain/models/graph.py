"""A network as a graph: layers, and what is done to their outputs between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cnntrain.models.inside import evaluating


@dataclass(frozen=True)
class Node:
    """A layer, or a function of torch that is called outside of all layers."""

    name: str  # its place, with slashes: features/0.Im2colConv2d
    kind: str  # the class, or the function
    inputs: tuple[str, ...]  # names of nodes
    shape: tuple[int, ...]  # of the output, without the batch


def layer_graph(network: nn.Module, in_shape: Sequence[int]) -> list[Node]:
    """What an image (C, H, W) passes, in order; the first node is `images`, the last `logits`.

    A layer, which is a module without children, is one node whatever it computes with. Found by
    showing the network a black image in evaluation.
    """
    tracer = _Tracer(network)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    images = torch.zeros(1, *in_shape, device=device)
    tracer.add("images", "input", (), images)
    hooks = [hook for module in network.modules() for hook in tracer.hooks(module)]
    try:
        with evaluating(network), tracer:
            logits = network.forward(images)  # not as it may be compiled
    finally:
        for hook in hooks:
            hook.remove()
    tracer.add("logits", "output", (logits,), logits)
    return tracer.nodes


class _Tracer(TorchFunctionMode):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.names = {module: name for name, module in network.named_modules()}
        self.nodes: list[Node] = []
        self.made_by: dict[int, str] = {}  # which node has made a tensor, by its id
        self.kept: list[Tensor] = []  # so that no other tensor gets the same id
        self.scope: list[str] = []  # the containers that the image is in
        self.layer: nn.Module | None = None  # the layer that it is in
        self.calls: dict[str, int] = {}

    def hooks(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, with_kwargs=True),
        ]

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.layer is None:
            if not list(module.children()):
                self.layer = module
            else:
                self.scope.append(self.names[module])

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.layer is module:
            self.layer, kind = None, type(module).__name__
            place = self.names[module].replace(".", "/")
            self.add(f"{place}.{kind}", kind, (*args, *kwargs.values()), output)
        elif self.layer is None:
            self.scope.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.layer is None and _tensors([output]):
            kind = getattr(func, "__name__", "function")
            place = self.scope[-1].replace(".", "/") if self.scope else ""
            self.add(f"{place}/{kind}".strip("/"), kind, (*args, *(kwargs or {}).values()), output)
        return output

    def add(self, name: str, kind: str, given: Sequence[Any], output: Any) -> None:
        """`output` is made of the tensors in `given`."""
        inputs = dict.fromkeys(
            self.made_by[id(t)] for t in _tensors(given) if id(t) in self.made_by
        )
        self.calls[name] = self.calls.get(name, 0) + 1
        name = name if self.calls[name] == 1 else f"{name}_{self.calls[name]}"
        made = _tensors([output])
        shape = tuple(made[0].shape[1:]) if made else ()
        self.nodes.append(Node(name, kind, tuple(inputs), shape))
        self.kept += made
        self.made_by |= {id(tensor): name for tensor in made}


def _tensors(things: Sequence[Any]) -> list[Tensor]:
    """The tensors in arguments, in lists and tuples as well."""
    found = []
    for thing in things:
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, (list, tuple)):
            found += _tensors(thing)
    return found
