"""The networks. Each receives its convolution and never imports one."""

from cnntrain.models.layer_table import Layer, layer_table, layers
from cnntrain.models.lenet5 import LeNet5
from cnntrain.models.shallow import Shallow

__all__ = ["Layer", "LeNet5", "Shallow", "layer_table", "layers"]
