"""Data sets, their download, the in-memory loader and augmentation."""

from cnntrain.data.arrays import Arrays as Arrays
from cnntrain.data.augment import Augment as Augment
from cnntrain.data.dataset import DataError as DataError
from cnntrain.data.dataset import ImageData as ImageData
from cnntrain.data.decoded import DecodedData as DecodedData
from cnntrain.data.decoding import Decoder as Decoder
from cnntrain.data.drawings import Drawings as Drawings
from cnntrain.data.drawings import Strokes as Strokes
from cnntrain.data.drawings import TwoSigns as TwoSigns
from cnntrain.data.entries import Entry as Entry
from cnntrain.data.fashion_mnist import FashionMNIST as FashionMNIST
from cnntrain.data.fashion_mnist import FashionMNISTMini as FashionMNISTMini
from cnntrain.data.image_folder import ImageFolder as ImageFolder
from cnntrain.data.loader import Loader as Loader
from cnntrain.data.torchvision_sets import TorchVisionData as TorchVisionData
