"""Layer table, layer graph, feature maps and penultimate features of a network."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

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


def head(network: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the last leaf module with parameters, in the order of registration.

    In a classifier this is the layer that computes the logits; all others are its backbone.
    """
    return [(n, m) for m, n in leaf_modules(network).items() if list(m.parameters())][-1]


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
    macs = f"{at_least}{sum(row.macs for row in rows):,}"
    totals = {"output": "", "parameters": f"{parameters:,}", "MACs / image": macs}
    for title, footer in totals.items():
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

    A module without children is one node, whatever it computes. The graph is traced by torch.fx, in
    evaluation mode.

    Raises:
        ValueError: The forward pass cannot be traced, as it branches on sizes or values of tensors.
    """
    with evaluation_mode(network):
        try:
            graph = _Tracer().trace(network)
        except Exception as error:  # of many classes, as the network computes with proxies
            raise ValueError(f"torch.fx cannot trace the network: {error}") from error
        images = black_image(network, in_shape)
        ShapeProp(torch.fx.GraphModule(network, graph)).propagate(images)
    nodes: list[GraphNode] = []
    names: dict[torch.fx.Node, str] = {}
    calls = Counter[str]()
    for node in graph.nodes:
        shape = _shape(node.meta.get("tensor_meta"))
        if shape is None or node.op == "get_attr":  # sizes and parameters
            continue
        name, kind = _name_and_kind(node, network)
        calls[name] += 1
        names[node] = name if calls[name] == 1 else f"{name}_{calls[name]}"
        inputs = (names[i] for i in node.all_input_nodes if i in names)
        nodes.append(GraphNode(names[node], kind, tuple(inputs), shape))
    return nodes


class _Tracer(torch.fx.Tracer):
    """Does not trace into modules without children, such as convolutions of any backend."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children()) or super().is_leaf_module(m, module_qualified_name)


def _shape(meta: Any) -> tuple[int, ...] | None:
    """Shape of the first tensor in a node's output, without the batch."""
    if isinstance(meta, TensorMetadata):
        return tuple(meta.shape[1:])
    shapes = map(_shape, meta if isinstance(meta, (list, tuple)) else ())
    return next((shape for shape in shapes if shape is not None), None)


def _name_and_kind(node: torch.fx.Node, network: nn.Module) -> tuple[str, str]:
    if node.op in ("placeholder", "output"):
        return ("images", "input") if node.op == "placeholder" else ("logits", "output")
    if node.op == "call_module":
        kind = type(network.get_submodule(str(node.target))).__name__
        return f"{str(node.target).replace('.', '/')}.{kind}", kind
    kind = getattr(node.target, "__name__", str(node.target))
    scope = next(reversed(node.meta.get("nn_module_stack", {})), "")
    return f"{scope.replace('.', '/')}/{kind}".strip("/"), kind
