"""Layers and initialisations that the options of a network name."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cnntrain.models.introspection import evaluation_mode

Activation = Literal["relu", "leaky_relu", "sigmoid", "tanh"]
Pooling = Literal["max", "avg"]
Init = Literal["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "default"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
POOLINGS: dict[str, type[nn.Module]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that accepts a single value per channel in training.

    `nn.BatchNorm2d` raises for one image with a 1x1 feature map, often the last batch of an epoch,
    as it has no variance. Here such a batch is normalised by the running statistics and does not
    update them. Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    def forward(self, input: Tensor) -> Tensor:
        # With few channels, cuDNN's training kernels for channels_last are four times as fast. Not
        # in evaluation: an exported graph must not depend on the batch size.
        if self.training and input.is_cuda and input.dim() == 4 and input.shape[2:].numel() > 1:
            input = input.contiguous(memory_format=torch.channels_last)
        if not (self.training and input.dim() == 4 and input.numel() == input.shape[1]):
            return super().forward(input)
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def initialise(network: nn.Module, init: Init) -> None:
    """Initialise the weights of all convolutions and fully connected layers, biases with zero.

    Sources: Glorot and Bengio 2010 (xavier), He et al. 2015 (kaiming). `default`: PyTorch's.
    """
    for layer in network.modules():
        if init != "default" and isinstance(layer, (nn.Conv2d, nn.Linear)):
            getattr(nn.init, f"{init}_")(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class MapSize:
    """Height and width of feature maps from layer to layer, for images of any size."""

    def __init__(self, size: Sequence[int]):
        self.size = size

    def window(self, most: int, stride: int = 1, padding: int = 0) -> tuple[int, int]:
        """Kernel size of the next layer, a convolution or pooling: `most`, or what fits."""
        height, width = (size + 2 * padding for size in self.size)
        window = min(most, height), min(most, width)
        self.size = (height - window[0]) // stride + 1, (width - window[1]) // stride + 1
        return window

    def limit(self, most: int) -> list[nn.Module]:
        """Average pooling to at most `most` x `most`; no layer if the maps are not larger.

        `nn.AdaptiveAvgPool2d` has no deterministic gradient on CUDA.
        """
        window = [-(-size // most) for size in self.size]
        return [nn.AvgPool2d((window[0], window[1]), ceil_mode=True)] if max(window) > 1 else []


def flat_features(features: nn.Module, in_shape: tuple[int, ...]) -> int:
    """Number of outputs of `features` for an image (C, H, W); ValueError if it is too small."""
    try:
        with evaluation_mode(features):
            return features(torch.zeros(1, *in_shape)).numel()
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"images of shape {tuple(in_shape)} do not fit: {reason}") from error
