"""Every classification network of torchvision, on any convolution."""

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.conv import convert


class TorchVision(nn.Module):
    """The network that torchvision calls `name`, with random weights, for images of any channels.

    Images (N, *in_shape) in, logits (N, num_classes) out. The first convolution is made anew if
    images have not three channels. With `small_images` it also becomes a 3x3 one of stride 1, and
    the first max pooling is left out: a ResNet then has the stem that is usual for CIFAR, and its
    first stage sees 28x28 pixels of a 28x28 image instead of 7x7, which is 16 times the work. This
    one rule suits all families but vision transformers. VGG, which has no stem, loses the pooling
    of its first stage.

    `conv` is a class derived from `nn.Conv2d` or a `functools.partial` of one. GoogLeNet and
    Inception come without their auxiliary classifiers. ValueError if there is no such network, or
    if it cannot take the images: many need 32x32 or more without `small_images`. Sources:
    https://docs.pytorch.org/vision/stable/models.html; He et al. 2015, arXiv:1512.03385, 4.2.
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
        import torchvision.models  # here: no other network need wait a second for it

        names = torchvision.models.list_models(module=torchvision.models)
        if name not in names:
            near = difflib.get_close_matches(name, names)
            raise ValueError(
                f"model.name={name}: torchvision has no such classification network; "
                + (f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names)}")
            )
        if small_images and "vit" in name:
            raise ValueError(
                f"model.small_images=true: {name} cuts images into patches, whose size is fixed; "
                "take model.small_images=false"
            )
        try:
            self.network = _made(name, in_shape, num_classes)
            _adapt_stem(self.network, in_shape[0], small_images)
            _pass_one(self.network, in_shape)
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


def _made(name: str, in_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    import torchvision.models

    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):  # else they return several logits in training
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": in_shape[1]}
    elif name.startswith("maxvit_"):
        options = {"input_size": in_shape[1:]}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def _adapt_stem(network: nn.Module, in_channels: int, small_images: bool) -> None:
    """Exchange the first convolution for one of `in_channels`; `small_images` as above."""
    layers = list(network.named_modules())
    name, stem = next((name, layer) for name, layer in layers if isinstance(layer, nn.Conv2d))
    if in_channels == stem.in_channels and not small_images:
        return
    geometry: dict[str, Any] = {
        name: getattr(stem, name) for name in ("kernel_size", "stride", "padding")
    }
    if small_images:
        geometry = {"kernel_size": 3, "stride": 1, "padding": 1}
        pooling = [name for name, layer in layers if isinstance(layer, nn.MaxPool2d)]
        for first in pooling[:1]:
            network.set_submodule(first, nn.Identity())
    adapted = nn.Conv2d(in_channels, stem.out_channels, **geometry, bias=stem.bias is not None)
    # Each family draws its weights in its own way: what all keep is the scale of the outputs.
    fan_in, adapted_fan_in = stem.weight[0].numel(), adapted.weight[0].numel()
    std = stem.weight.std().item() * (fan_in / adapted_fan_in) ** 0.5
    nn.init.normal_(adapted.weight, std=std)
    adapted.bias = stem.bias
    network.set_submodule(name, adapted)


def _pass_one(network: nn.Module, in_shape: tuple[int, int, int]) -> None:
    """Show the network an image, which raises where an image is too small to pass."""
    with torch.no_grad():
        network.eval()(torch.zeros(1, *in_shape))
    network.train()
