"""Convolution backends, each a subclass of ``nn.Conv2d``."""

from cnntrain.conv.conversion import BACKENDS as BACKENDS
from cnntrain.conv.conversion import convert as convert
from cnntrain.conv.geometry import Geometry as Geometry
from cnntrain.conv.im2col import Im2colConv2d as Im2colConv2d
from cnntrain.conv.module import Conv2d as Conv2d
from cnntrain.conv.module import NativeConv2d as NativeConv2d
from cnntrain.conv.naive import NaiveConv2d as NaiveConv2d
