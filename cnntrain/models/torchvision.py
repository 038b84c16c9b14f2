"""Classification networks of torchvision on any convolution.

Sources: https://docs.pytorch.org/vision/stable/models.html; for the stem of small images He et al.
2015, arXiv:1512.03385, section 4.2.
"""

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.conv import convert
from cnntrain.models.introspection import evaluation_mode


class TorchVision(nn.Module):
    """A network of torchvision with random weights, for images with any number of channels.

    Maps images (N, *in_shape) to logits (N, num_classes). The first convolution is replaced if the
    images do not have three channels. GoogLeNet and Inception have no auxiliary classifiers.

    Args:
        in_shape: Channels, height and width; many networks need 32x32 without `small_images`.
        num_classes: Number of classes.
        conv: Class derived from `nn.Conv2d`, or a `functools.partial` of one.
        name: Name in torchvision.
        small_images: Whether the first convolution becomes 3x3 with stride 1, and the first max
            pooling is removed. This is the usual stem of a ResNet for CIFAR: its first stage has
            28x28 instead of 7x7 positions for a 28x28 image, 16 times the work. VGG, which has no
            stem, loses the pooling of its first stage; vision transformers are rejected.

    Raises:
        ValueError: There is no such network, or the images are too small for it.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        *,
        conv: Callable[..., nn.Conv2d] = nn.Conv2d,
        name: str = "resnet18",
        small_images: bool = False,
    ):
        super().__init__()
        from torchvision import models  # takes a second, which other networks should not cost

        names = models.list_models(module=models)
        if name not in names:
            near = difflib.get_close_matches(name, names) or names
            raise ValueError(
                f"model.name={name}: torchvision has no such classification network; choose from "
                f"{', '.join(near)}"
            )
        options: dict[str, Any] = {"weights": None, "num_classes": num_classes}
        if name in ("googlenet", "inception_v3"):  # otherwise several outputs in training
            options |= {"aux_logits": False, "init_weights": True}
        elif name.startswith("vit_"):
            options["image_size"] = in_shape[1]
        elif name.startswith("maxvit_"):
            options["input_size"] = in_shape[1:]
        try:
            self.network = models.get_model(name, **options)
            _adapt_stem(self.network, in_shape[0], small_images)
            with evaluation_mode(self.network):  # raises if the images are too small
                self.network(torch.zeros(1, *in_shape))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).strip().split("\n")[0]
            hint = "" if small_images or "vit" in name else "; try model.small_images=true"
            shape = "x".join(map(str, in_shape))
            raise ValueError(
                f"model.name={name}: does not take images of shape {shape} ({reason}){hint}"
            ) from error
        convert(self.network, conv)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def _adapt_stem(network: nn.Module, in_channels: int, small_images: bool) -> None:
    """Replace the first convolution by one with `in_channels`; see `small_images` above."""
    layers = list(network.named_modules())
    name, stem = next((name, layer) for name, layer in layers if isinstance(layer, nn.Conv2d))
    if in_channels == stem.in_channels and not small_images:
        return
    geometry: dict[str, Any] = {k: getattr(stem, k) for k in ("kernel_size", "stride", "padding")}
    if small_images:
        geometry = {"kernel_size": 3, "stride": 1, "padding": 1}
        pooling = [name for name, layer in layers if isinstance(layer, nn.MaxPool2d)]
        for first in pooling[:1]:
            network.set_submodule(first, nn.Identity())
    adapted = nn.Conv2d(in_channels, stem.out_channels, **geometry, bias=stem.bias is not None)
    # The families have different initialisations; the scale of the outputs is kept.
    fan_in, adapted_fan_in = stem.weight[0].numel(), adapted.weight[0].numel()
    std = stem.weight.std().item() * (fan_in / adapted_fan_in) ** 0.5
    nn.init.normal_(adapted.weight, std=std)
    adapted.bias = stem.bias
    network.set_submodule(name, adapted)
