"""Data sets in memory: where they come from, how they become batches."""

from cnntrain.data.augment import Augment
from cnntrain.data.drawings import Drawings, Strokes, TwoSigns
from cnntrain.data.fashion_mnist import FashionMNIST, FashionMNISTMini
from cnntrain.data.idx import DataError
from cnntrain.data.images import ImageData
from cnntrain.data.loader import Loader

__all__ = [
    "Augment",
    "DataError",
    "Drawings",
    "FashionMNIST",
    "FashionMNISTMini",
    "ImageData",
    "Loader",
    "Strokes",
    "TwoSigns",
]
