"""What a network consists of and costs, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from cnntrain.conv import Geometry
from cnntrain.models.inside import evaluating, leaves, watching


@dataclass(frozen=True)
class Layer:
    """One layer as one image passes it."""

    name: str
    kind: str  # the class; of a convolution this is the backend
    shape: tuple[int, ...]  # of the output, without the batch
    parameters: int
    macs: int  # multiply-accumulate operations per image


def summarise(network: nn.Module, in_shape: tuple[int, int, int]) -> list[Layer]:
    """Every layer without children, in the order in which an image (C, H, W) meets them.

    MACs: of a convolution kw*kh * c_in/groups * c_out * ow*oh, of a fully connected layer
    in*out, bias not counted; other layers count as none.
    """
    found: list[Layer] = []
    names = leaves(network)

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        parameters = sum(p.numel() for p in module.parameters())
        shape = tuple(output.shape[1:])
        found.append(
            Layer(names[module], type(module).__name__, shape, parameters, _macs(module, shape))
        )

    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    with evaluating(network), watching(names, record):
        network(torch.zeros(1, *in_shape, device=device))
    return found


def uncounted(network: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """The layers with parameters that `summarise` has not met: as in attention, something else
    computes with these, and their work is in no row."""
    met = {layer.name for layer in layers}
    return [name for m, name in leaves(network).items() if list(m.parameters()) and name not in met]


def layer_table(network: nn.Module, in_shape: tuple[int, int, int]) -> Table:
    """`summarise` as a table for the terminal, with totals; of many rows those with parameters."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    rows = summarise(network, in_shape)
    parameters = sum(p.numel() for p in network.parameters())
    more = "> " if uncounted(network, rows) else ""
    table.add_column("layer", "total")
    table.add_column("type")
    for title, footer in [
        ("output", ""),
        ("parameters", f"{parameters:,}"),
        ("MACs / image", f"{more}{sum(row.macs for row in rows):,}"),
    ]:
        table.add_column(title, footer, justify="right")
    for row in rows if len(rows) <= 30 else [row for row in rows if row.parameters]:
        shape = "x".join(map(str, row.shape))
        counts = [f"{count:,}" if count else "" for count in (row.parameters, row.macs)]
        table.add_row(row.name, row.kind, shape, *counts)
    return table


def _macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    if isinstance(module, nn.Conv2d):
        channels = module.in_channels, module.out_channels
        return Geometry.of(module).macs(*channels, module.kernel_size, shape[1:])
    if isinstance(module, nn.Linear):
        positions = torch.Size(shape[:-1]).numel()
        return module.in_features * module.out_features * positions
    return 0
