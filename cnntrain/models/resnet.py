"""Residual networks for small images.

Source: He, Zhang, Ren and Sun 2015, arXiv:1512.03385, section 4.2.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from cnntrain.models import layers


class ResNet(nn.Module):
    """ResNet-20, 32, 44, 56, 110, ...: a 3x3 convolution and three stages of residual blocks.

    The second and third stage halve height and width, rounded up, and double the channels. With
    the defaults, ResNet-20 has 269,722 parameters, ResNet-56 853,018, ResNet-110 1,727,962. Maps
    images (N, *in_shape) to logits (N, num_classes).

    Args:
        in_shape: Channels, height and width, of any size.
        num_classes: Number of classes.
        conv: Called like `nn.Conv2d`.
        depth: Layers with weights, 6n + 2 with at least 8.
        width: Channels of the first stage.
        shortcut: Where the shape changes. A: every second position, zeros as new channels; B: 1x1
            convolution with stride 2.

    Raises:
        ValueError: `depth` is not 6n + 2.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int] = (3, 32, 32),
        num_classes: int = 10,
        *,
        conv: Callable[..., nn.Conv2d] = nn.Conv2d,
        depth: int = 20,
        width: PositiveInt = 16,
        shortcut: Literal["A", "B"] = "A",
    ):
        super().__init__()
        blocks = max(1, (depth - 2) // 6)
        if depth != 6 * blocks + 2:
            allowed = f"{6 * blocks + 2} or {6 * blocks + 8}"
            raise ValueError(f"model.depth={depth}: must be 6n + 2, such as {allowed}")
        channels = [width] * (blocks + 1) + [2 * width] * blocks + [4 * width] * blocks
        self.stem = nn.Sequential(*_conv_norm(conv, in_shape[0], width), nn.ReLU())
        self.blocks = nn.Sequential(*(_Block(conv, *pair, shortcut) for pair in pairwise(channels)))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(4 * width, num_classes)
        layers.initialise(self, "kaiming_normal")

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.stem(images))))


class _Block(nn.Module):
    """Two convolutions, whose output is added to the input (N, C, H, W)."""

    def __init__(self, conv: Callable[..., nn.Conv2d], c_in: int, c_out: int, shortcut: str):
        super().__init__()
        stride = 1 if c_in == c_out else 2
        self.residual = nn.Sequential(
            *_conv_norm(conv, c_in, c_out, stride), nn.ReLU(), *_conv_norm(conv, c_out, c_out)
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2 and shortcut == "A":
            self.shortcut = _Subsample(c_out - c_in)
        elif stride == 2:
            self.shortcut = nn.Sequential(*_conv_norm(conv, c_in, c_out, stride, kernel_size=1))
        self.activation = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(self.residual(input) + self.shortcut(input))


class _Subsample(nn.Module):
    """Every second position of (N, C, H, W), followed by channels of zeros."""

    def __init__(self, zeros: int):
        super().__init__()
        self.zeros = zeros

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.pad(input[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.zeros))


def _conv_norm(
    conv: Callable[..., nn.Conv2d], c_in: int, c_out: int, stride: int = 1, kernel_size: int = 3
) -> tuple[nn.Module, nn.Module]:
    geometry = {"stride": stride, "padding": kernel_size // 2}
    return conv(c_in, c_out, kernel_size, **geometry, bias=False), layers.BatchNorm2d(c_out)
