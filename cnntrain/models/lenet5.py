"""LeNet-5, with batch normalisation and dropout."""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from cnntrain.models.choices import (
    ACTIVATIONS,
    POOLINGS,
    Activation,
    BatchNorm2d,
    Init,
    Pooling,
    choose,
    flat_features,
    initialise,
)


class LeNet5(nn.Module):
    """LeNet-5: three 5x5 convolutions, two 2x2 poolings, two fully connected layers.

    Images (N, *in_shape) in, logits (N, num_classes) out. 65,886 parameters with the defaults.
    Images must be at least 28x28; ValueError if they are smaller or a choice is unknown. `conv` is
    called like `nn.Conv2d`. Source: LeCun, Bottou, Bengio and Haffner 1998, doi:10.1109/5.726791;
    here with max pooling, full connections between feature maps and, where `norm`, batch
    normalisation.
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
        activation: Activation = "tanh",
        pooling: Pooling = "max",
        init: Init = "xavier_uniform",
    ):
        super().__init__()
        act = choose("activation", activation, ACTIVATIONS)
        pool = choose("pooling", pooling, POOLINGS)
        c1, c2, c3 = channels

        def block(c_in: int, c_out: int, padding: int) -> list[nn.Module]:
            layers: list[nn.Module] = [conv(c_in, c_out, 5, padding=padding)]
            return [*layers, *([BatchNorm2d(c_out)] if norm else [])]

        def halved() -> list[nn.Module]:
            # Activations rise, so that of the largest is the largest: for a quarter of the work.
            return [pool(2), act()] if pooling == "max" else [act(), pool(2)]

        self.features = nn.Sequential(
            *block(in_shape[0], c1, padding=2),  # (N, 6, 28, 28)
            *halved(),  # (N, 6, 14, 14)
            *block(c1, c2, padding=0),  # (N, 16, 10, 10)
            *halved(),  # (N, 16, 5, 5)
            *block(c2, c3, padding=0),  # (N, 128, 1, 1)
            act(),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(flat_features(self.features, in_shape), hidden),
            nn.Dropout(dropout),
            act(),
            nn.Linear(hidden, num_classes),
        )
        initialise(self, init)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
