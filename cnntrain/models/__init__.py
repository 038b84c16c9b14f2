"""Networks. A network receives its convolution and never imports one."""

from cnntrain.models.introspection import GraphNode as GraphNode
from cnntrain.models.introspection import LayerSummary as LayerSummary
from cnntrain.models.introspection import head as head
from cnntrain.models.introspection import layer_graph as layer_graph
from cnntrain.models.introspection import layer_table as layer_table
from cnntrain.models.introspection import summarise as summarise
from cnntrain.models.introspection import uncalled_layers as uncalled_layers
from cnntrain.models.lenet5 import LeNet5 as LeNet5
from cnntrain.models.pretrained import deferred_weights as deferred_weights
from cnntrain.models.resnet import ResNet as ResNet
from cnntrain.models.shallow import Shallow as Shallow
from cnntrain.models.torchvision import TorchVision as TorchVision
