"""Network with a single convolution."""

from collections.abc import Callable

from pydantic import PositiveInt
from torch import Tensor, nn

from cnntrain.models import layers


class Shallow(nn.Module):
    """Convolution, activation, 2x2 pooling, one fully connected layer.

    Maps images (N, *in_shape) to logits (N, num_classes). A kernel or pooling larger than the
    feature maps shrinks to them; above 28x28, they are average-pooled to at most that at the end.

    Args:
        in_shape: Channels, height and width, of any size.
        num_classes: Number of classes.
        conv: Called like `nn.Conv2d`.
        channels: Of the convolution.
        kernel_size: Of the convolution.
        activation: relu, leaky_relu, sigmoid or tanh.
        pooling: max, avg, or None for no pooling.
        one_output: For two classes, one output z whose sigmoid is the probability of the second
            class. The logits are (0, z), which have the same softmax.

    Raises:
        ValueError: `one_output` without two classes, or images too small for a dilation.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        *,
        conv: Callable[..., nn.Conv2d] = nn.Conv2d,
        channels: PositiveInt = 16,
        kernel_size: PositiveInt = 3,
        activation: layers.Activation = "relu",
        pooling: layers.Pooling | None = "max",
        one_output: bool = False,
    ):
        super().__init__()
        if one_output and num_classes != 2:
            raise ValueError(f"model.one_output=true: is for two classes, not {num_classes}")
        maps = layers.MapSize(in_shape[1:])
        self.features = nn.Sequential(
            conv(in_shape[0], channels, maps.window(kernel_size)),  # (N, 16, 26, 26)
            layers.ACTIVATIONS[activation](),
            # (N, 16, 13, 13)
            *([layers.POOLINGS[pooling](maps.window(2, stride=2))] if pooling else []),
            *maps.limit(28),
            nn.Flatten(),
        )
        self.one_output = one_output
        outputs = 1 if one_output else num_classes
        self.classifier = nn.Linear(layers.flat_features(self.features, in_shape), outputs)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.classifier(self.features(images))
        return nn.functional.pad(logits, (1, 0)) if self.one_output else logits
