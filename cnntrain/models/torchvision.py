"""Classification networks of torchvision on any convolution.

Sources: https://docs.pytorch.org/vision/stable/models.html; for the stem of small images He et al.
2015, arXiv:1512.03385, section 4.2.
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.conv import convert
from cnntrain.models import pretrained
from cnntrain.models.introspection import evaluation_mode, head

AUXILIARY = ("googlenet", "inception_v3")  # have auxiliary classifiers, for training only


class TorchVision(nn.Module):
    """A network of torchvision, for images with any number of channels.

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
            stem, loses the pooling of its first stage; vision transformers are rejected, as are
            weights whose first convolution has another size.
        weights: None: random. Otherwise a name in torchvision, such as DEFAULT or IMAGENET1K_V1,
            or a local file with a state_dict, saved by `torch.save`. A head with another number
            of classes is newly initialised; see `pretrained.load` for other channels. Position
            embeddings of vision transformers are interpolated.
        freeze: Train the last layer only. All others stay in evaluation mode.

    Attributes:
        normalisation: Mean and standard deviation of each channel, in images of 0 to 1, that
            weights of torchvision expect; None for others.

    Raises:
        ValueError: There is no such network, the images are too small for it, or the weights
            cannot be read or are of another network.
    """

    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __init__(
        self,
        in_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        *,
        conv: Callable[..., nn.Conv2d] = nn.Conv2d,
        name: str = "resnet18",
        small_images: bool = False,
        weights: str | None = None,
        freeze: bool = False,
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
        if name in AUXILIARY:  # otherwise several outputs in training
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
        self.name, self.weights, self.freeze = name, weights, freeze
        self.published: Any = models.get_model_weights(name).__members__.get(weights)
        if self.published:
            preset = self.published.transforms()
            self.normalisation = tuple(preset.mean), tuple(preset.std)
            if name in AUXILIARY:  # torchvision changes this one to that in the forward pass
                self.normalisation = (0.5,) * 3, (0.5,) * 3
        if freeze:
            self.requires_grad_(False)
            head(self)[1].requires_grad_()
            self.train()
        if not pretrained.deferred.get():
            self.load_initial_weights()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def train(self, mode: bool = True) -> "TorchVision":
        super().train(mode)
        if self.freeze:
            self.network.eval()
            head(self)[1].train(mode)
        return self

    def load_initial_weights(self) -> None:
        """Load the pretrained weights, if `weights` names any. A run calls it at its start."""
        if self.weights is None:
            return
        from torchvision.models import get_model_weights
        from torchvision.models.vision_transformer import interpolate_embeddings

        vit: Any = self.network
        try:
            if not self.published and not Path(self.weights).exists():
                names = ", ".join(get_model_weights(self.name).__members__)
                raise ValueError(f"there is no such file; {self.name} has the weights {names}")
            if self.published:
                state = pretrained.read_published(self.published)
            else:
                state = pretrained.read_file(Path(self.weights))
            if self.name in AUXILIARY:
                for key in [k for k in state if k.startswith(("aux", "AuxLogits."))]:
                    del state[key]
            elif "encoder.pos_embedding" in state and self.name.startswith("vit_"):
                state = interpolate_embeddings(vit.image_size, vit.patch_size, state)
            pretrained.load(self.network, state)
        except ValueError as error:
            raise ValueError(f"model.weights={self.weights}: {error}") from error


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
