"""Data sets, their download, the in-memory loader and augmentation."""

from cnntrain.data.augment import Augment as Augment
from cnntrain.data.dataset import DataError as DataError
from cnntrain.data.dataset import ImageData as ImageData
from cnntrain.data.drawings import Drawings as Drawings
from cnntrain.data.drawings import Strokes as Strokes
from cnntrain.data.drawings import TwoSigns as TwoSigns
from cnntrain.data.fashion_mnist import FashionMNIST as FashionMNIST
from cnntrain.data.fashion_mnist import FashionMNISTMini as FashionMNISTMini
from cnntrain.data.loader import Loader as Loader
