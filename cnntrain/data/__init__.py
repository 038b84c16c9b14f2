"""Data sets, their download, the in-memory loader and augmentation."""

from cnntrain.data.augment import Augment
from cnntrain.data.dataset import DataError, ImageData
from cnntrain.data.drawings import Drawings, Strokes, TwoSigns
from cnntrain.data.fashion_mnist import FashionMNIST, FashionMNISTMini
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
