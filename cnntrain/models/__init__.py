"""The networks. Each receives its convolution and never imports one."""

from cnntrain.models.graph import Node, layer_graph
from cnntrain.models.lenet5 import LeNet5
from cnntrain.models.shallow import Shallow
from cnntrain.models.summary import Layer, layer_table, summarise, uncounted
from cnntrain.models.torchvision import TorchVision

__all__ = [
    "Layer",
    "LeNet5",
    "Node",
    "Shallow",
    "TorchVision",
    "layer_graph",
    "layer_table",
    "summarise",
    "uncounted",
]
