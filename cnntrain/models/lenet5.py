"""LeNet-5 with batch normalisation and dropout.

Source: LeCun, Bottou, Bengio and Haffner 1998, doi:10.1109/5.726791.
"""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cnntrain.models import layers


class LeNet5(nn.Module):
    """LeNet-5: three 5x5 convolutions, two 2x2 poolings, two fully connected layers.

    Unlike the paper, with max pooling, full connections between feature maps and batch
    normalisation. 65,886 parameters with the defaults. Maps images (N, *in_shape) to logits
    (N, num_classes).

    Kernels and poolings larger than the feature maps of a small image shrink to them. After the
    last convolution, maps of a large image are average-pooled to at most 4x4 (1x1 for 28x28).

    Args:
        in_shape: Channels, height and width, of any size.
        num_classes: Number of classes.
        conv: Called like `nn.Conv2d`.
        channels: Of the three convolutions.
        hidden: Units of the first fully connected layer.
        dropout: Probability of a unit to be dropped.
        norm: Whether a batch normalisation follows each convolution.
        activation: relu, leaky_relu, sigmoid or tanh.
        pooling: max or avg.
        init: Initialisation of the weights.

    Raises:
        ValueError: The images are too small for a convolution with dilation.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        *,
        conv: Callable[..., nn.Conv2d] = nn.Conv2d,
        channels: tuple[PositiveInt, PositiveInt, PositiveInt] = (6, 16, 128),
        hidden: PositiveInt = 84,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3,
        norm: bool = True,
        activation: layers.Activation = "tanh",
        pooling: layers.Pooling = "max",
        init: layers.Init = "xavier_uniform",
    ):
        super().__init__()
        act = layers.ACTIVATIONS[activation]
        pool = layers.POOLINGS[pooling]
        c1, c2, c3 = channels
        maps = layers.MapSize(in_shape[1:])

        def block(c_in: int, c_out: int, padding: int) -> list[nn.Module]:
            normalised = [layers.BatchNorm2d(c_out)] if norm else []
            kernel = maps.window(5, padding=padding)
            return [conv(c_in, c_out, kernel, padding=padding), *normalised]

        def downsample() -> list[nn.Module]:
            # Activations increase: max pooling first gives the same for a quarter of the work.
            window = maps.window(2, stride=2)
            return [pool(window), act()] if pooling == "max" else [act(), pool(window)]

        self.features = nn.Sequential(
            *block(in_shape[0], c1, padding=2),  # (N, 6, 28, 28)
            *downsample(),  # (N, 6, 14, 14)
            *block(c1, c2, padding=0),  # (N, 16, 10, 10)
            *downsample(),  # (N, 16, 5, 5)
            *block(c2, c3, padding=0),  # (N, 128, 1, 1)
            act(),
            *maps.limit(4),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(layers.flat_features(self.features, in_shape), hidden),
            nn.Dropout(dropout),
            act(),
            nn.Linear(hidden, num_classes),
        )
        layers.initialise(self, init)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
