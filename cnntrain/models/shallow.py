"""The smallest network that convolves."""

from collections.abc import Callable

from pydantic import PositiveInt
from torch import Tensor, nn

from cnntrain.models.choices import (
    ACTIVATIONS,
    POOLINGS,
    Activation,
    Pooling,
    choose,
    flat_features,
)


class Shallow(nn.Module):
    """Convolution 3x3, activation, 2x2 pooling, one fully connected layer.

    Images (N, *in_shape), at least 4x4, in, logits (N, num_classes) out; ValueError if the images
    are smaller. `conv` is called like `nn.Conv2d`.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        *,
        conv: Callable[..., nn.Conv2d] = nn.Conv2d,
        channels: PositiveInt = 16,
        activation: Activation = "relu",
        pooling: Pooling = "max",
    ):
        super().__init__()
        self.features = nn.Sequential(
            conv(in_shape[0], channels, 3),  # (N, 16, 26, 26)
            choose("activation", activation, ACTIVATIONS)(),
            choose("pooling", pooling, POOLINGS)(2),  # (N, 16, 13, 13)
            nn.Flatten(),
        )
        self.classifier = nn.Linear(flat_features(self.features, in_shape), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
