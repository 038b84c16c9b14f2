"""The layers that networks choose by name."""

from collections.abc import Mapping
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

T = TypeVar("T")

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
    """`nn.BatchNorm2d` that also trains on a single value per channel.

    A batch of one whose feature map is 1x1 has no variance, where `nn.BatchNorm2d` raises. Such a
    batch (often the last one of an epoch) is normalised by the running statistics and leaves them
    as they are. Shapes: (N, C, H, W) in and out; on a GPU channels_last while it trains, for which
    cuDNN has kernels that share a channel among all multiprocessors: four times as fast with the
    few channels of LeNet-5, whatever made the input. Source: Ioffe and Szegedy, arXiv:1502.03167.
    """

    def forward(self, input: Tensor) -> Tensor:
        # What is exported for batches of any size must not ask for it: in training only.
        if self.training and input.is_cuda and input.dim() == 4 and input.shape[2:].numel() > 1:
            input = input.contiguous(memory_format=torch.channels_last)
        if not (self.training and input.dim() == 4 and input.numel() == input.shape[1]):
            return super().forward(input)
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def choose(option: str, name: str, choices: Mapping[str, T]) -> T:
    """The choice called `name`; ValueError with all of them if there is none."""
    if name not in choices:
        raise ValueError(f"{option}={name!r}: choose from {', '.join(choices)}")
    return choices[name]


def initialise(network: nn.Module, init: Init) -> None:
    """Draw the weights of all convolutions and fully connected layers anew, biases zero.

    Sources: Glorot and Bengio 2010 (xavier), He et al. 2015 (kaiming). `default` keeps PyTorch's.
    """
    draws = {name: getattr(nn.init, f"{name}_", None) for name in get_args(Init)}
    draw = choose("init", init, draws)
    if draw is None:  # default
        return
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def flat_features(features: nn.Module, in_shape: tuple[int, ...]) -> int:
    """How many numbers `features` makes of one image (C, H, W), found by showing it one.

    Raises ValueError, with the layer's reason, if it cannot pass: it may be too small.
    """
    training = features.training
    try:
        with torch.no_grad():
            return features.eval()(torch.zeros(1, *in_shape)).numel()
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"images of shape {tuple(in_shape)} do not fit: {reason}") from error
    finally:
        features.train(training)
