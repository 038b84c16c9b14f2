"""The networks. Each receives its convolution and never imports one."""

from cnntrain.models.lenet5 import LeNet5
from cnntrain.models.shallow import Shallow
from cnntrain.models.summary import Layer, layer_table, summarise

__all__ = ["Layer", "LeNet5", "Shallow", "layer_table", "summarise"]
