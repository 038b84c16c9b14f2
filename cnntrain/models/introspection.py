"""Layer table, layer graph, feature maps and penultimate features of a network."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cnntrain.conv import Geometry


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the network is in its previous mode."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)


@contextmanager
def forward_hooks(layers: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Call `hook(layer, inputs, output)` after the forward pass of each of these layers."""
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def leaf_modules(network: nn.Module) -> dict[nn.Module, str]:
    """Modules without children, with their names."""
    return {module: name for name, module in network.named_modules() if not list(module.children())}


def named_convolutions(network: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    """All convolutions with their names, in the order of registration."""
    layers = network.named_modules()
    return [(name, layer) for name, layer in layers if isinstance(layer, nn.Conv2d)]


def feature_maps(network: nn.Module, images: Tensor) -> list[tuple[str, Tensor]]:
    """Name and output (N, O, OH, OW) of each convolution for images (N, C, H, W)."""
    names: dict[nn.Module, str] = {layer: name for name, layer in named_convolutions(network)}
    maps: list[tuple[str, Tensor]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        maps.append((names[layer], output.float()))

    with evaluation_mode(network), forward_hooks(names, keep):
        network.forward(images)  # not the compiled version of the network, which skips hooks
    return maps


def penultimate_features(network: nn.Module, images: Tensor) -> Tensor:
    """Input of the last layer with parameters, (N, features), for images (N, C, H, W).

    If that layer is a convolution, its input is averaged over all positions.
    """
    features: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        features[:] = inputs[:1]

    layers = [layer for layer in leaf_modules(network) if list(layer.parameters())]
    with evaluation_mode(network), forward_hooks(layers, keep):
        network.forward(images)
    return (features[0].mean((2, 3)) if features[0].ndim == 4 else features[0]).float()


def black_image(network: nn.Module, in_shape: Sequence[int]) -> Tensor:
    """Zeros (1, C, H, W) on the device of the network."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    return torch.zeros(1, *in_shape, device=device)


@dataclass(frozen=True)
class LayerSummary:
    """One layer in the forward pass of one image."""

    name: str
    kind: str  # class; of a convolution this is the backend
    shape: tuple[int, ...]  # of the output, without the batch
    parameters: int
    macs: int  # multiply-accumulate operations per image


def summarise(network: nn.Module, in_shape: tuple[int, int, int]) -> list[LayerSummary]:
    """Layers without children, in the order in which an image (C, H, W) passes them.

    MACs are counted for convolutions, kh*kw * C_in/groups * C_out * OH*OW, and fully connected
    layers, in*out, without bias.
    """
    layers: list[LayerSummary] = []
    names = leaf_modules(network)

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        parameters = sum(p.numel() for p in module.parameters())
        shape, kind = tuple(output.shape[1:]), type(module).__name__
        layers.append(LayerSummary(names[module], kind, shape, parameters, _macs(module, shape)))

    with evaluation_mode(network), forward_hooks(names, record):
        network(black_image(network, in_shape))
    return layers


def _macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    if isinstance(module, nn.Conv2d):
        channels = module.in_channels, module.out_channels
        return Geometry.of(module).macs(*channels, module.kernel_size, shape[1:])
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features * torch.Size(shape[:-1]).numel()
    return 0


def uncalled_layers(network: nn.Module, layers: Sequence[LayerSummary]) -> list[str]:
    """Layers with parameters that are not called: attention uses those of its projections itself.

    Their MACs are missing in `layers`.
    """
    called = {layer.name for layer in layers}
    named = leaf_modules(network).items()
    return [name for layer, name in named if list(layer.parameters()) and name not in called]


def layer_table(network: nn.Module, in_shape: tuple[int, int, int]) -> Table:
    """`summarise` as a table with totals; of more than 30 layers those with parameters."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    rows = summarise(network, in_shape)
    parameters = sum(p.numel() for p in network.parameters())
    at_least = "> " if uncalled_layers(network, rows) else ""
    table.add_column("layer", "total")
    table.add_column("type")
    for title, footer in [
        ("output", ""),
        ("parameters", f"{parameters:,}"),
        ("MACs / image", f"{at_least}{sum(row.macs for row in rows):,}"),
    ]:
        table.add_column(title, footer, justify="right")
    for row in rows if len(rows) <= 30 else [row for row in rows if row.parameters]:
        shape = "x".join(map(str, row.shape))
        counts = [f"{count:,}" if count else "" for count in (row.parameters, row.macs)]
        table.add_row(row.name, row.kind, shape, *counts)
    return table


@dataclass(frozen=True)
class GraphNode:
    """A layer, or a torch function called outside of all layers."""

    name: str  # module path with slashes: features/0.Im2colConv2d
    kind: str  # class or function
    inputs: tuple[str, ...]  # names of nodes
    shape: tuple[int, ...]  # of the output, without the batch


def layer_graph(network: nn.Module, in_shape: Sequence[int]) -> list[GraphNode]:
    """Layers and functions in the order of execution, from `images` (C, H, W) to `logits`.

    A module without children is one node, whatever it computes. The graph is traced with a black
    image in evaluation mode.
    """
    tracer = _Tracer(network)
    images = black_image(network, in_shape)
    tracer.add("images", "input", (), images)
    handles = [
        handle
        for module in network.modules()
        for handle in (
            module.register_forward_pre_hook(tracer.enter),
            module.register_forward_hook(tracer.leave, with_kwargs=True),
        )
    ]
    try:
        with evaluation_mode(network), tracer:
            logits = network.forward(images)  # not the compiled version of the network
    finally:
        for handle in handles:
            handle.remove()
    tracer.add("logits", "output", (logits,), logits)
    return tracer.nodes


class _Tracer(TorchFunctionMode):
    """Adds a node after each layer, and after each torch function outside of layers."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.paths = {module: name.replace(".", "/") for name, module in network.named_modules()}
        self.nodes: list[GraphNode] = []
        self.sources: dict[int, str] = {}  # id of a tensor -> node that computed it
        self.kept: list[Tensor] = []  # keeps the ids of tensors unique
        self.scope: list[str] = [""]  # paths of the current containers
        self.layer: nn.Module | None = None  # current layer
        self.calls: dict[str, int] = {}

    def enter(self, module: nn.Module, args: Any) -> None:
        if self.layer is None and not list(module.children()):
            self.layer = module
        elif self.layer is None:
            self.scope.append(self.paths[module])

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.layer is module:
            self.layer, kind = None, type(module).__name__
            self.add(f"{self.paths[module]}.{kind}", kind, (*args, *kwargs.values()), output)
        elif self.layer is None:
            self.scope.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.layer is None and _tensors([output]):
            kind = getattr(func, "__name__", "function")
            name = f"{self.scope[-1]}/{kind}".strip("/")
            self.add(name, kind, (*args, *(kwargs or {}).values()), output)
        return output

    def add(self, name: str, kind: str, inputs: Sequence[Any], output: Any) -> None:
        names = [self.sources[id(t)] for t in _tensors(inputs) if id(t) in self.sources]
        self.calls[name] = self.calls.get(name, 0) + 1
        name = name if self.calls[name] == 1 else f"{name}_{self.calls[name]}"
        outputs = _tensors([output])
        shape = tuple(outputs[0].shape[1:]) if outputs else ()
        self.nodes.append(GraphNode(name, kind, tuple(dict.fromkeys(names)), shape))
        self.kept += outputs
        self.sources |= {id(tensor): name for tensor in outputs}


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    """Tensors in arguments, in nested lists and tuples as well."""
    found = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += _tensors(argument)
    return found
