"""Networks. A network receives its convolution and never imports one."""

from cnntrain.models.introspection import (
    GraphNode,
    LayerSummary,
    layer_graph,
    layer_table,
    summarise,
    uncalled_layers,
)
from cnntrain.models.lenet5 import LeNet5
from cnntrain.models.shallow import Shallow
from cnntrain.models.torchvision import TorchVision

__all__ = [
    "GraphNode",
    "LayerSummary",
    "LeNet5",
    "Shallow",
    "TorchVision",
    "layer_graph",
    "layer_table",
    "summarise",
    "uncalled_layers",
]
