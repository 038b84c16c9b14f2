"""Convolution backends, each a subclass of ``nn.Conv2d``."""

from cnntrain.conv.conversion import BACKENDS, convert
from cnntrain.conv.geometry import Geometry
from cnntrain.conv.im2col import Im2colConv2d
from cnntrain.conv.module import Conv2d, NativeConv2d
from cnntrain.conv.naive import NaiveConv2d

__all__ = [
    "BACKENDS",
    "Conv2d",
    "Geometry",
    "Im2colConv2d",
    "NaiveConv2d",
    "NativeConv2d",
    "convert",
]
