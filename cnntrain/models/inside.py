"""What a network makes of images on the way: feature maps, and what its last layer is given."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropout and gradients, with a batch normalisation that learns nothing."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)


def leaves(network: nn.Module) -> dict[nn.Module, str]:
    """The layers, which are modules without children, and their names."""
    return {module: name for name, module in network.named_modules() if not list(module.children())}


def convolutions(network: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    """All of them with their names, in the order in which they were put in."""
    layers = network.named_modules()
    return [(name, layer) for name, layer in layers if isinstance(layer, nn.Conv2d)]


def feature_maps(network: nn.Module, images: Tensor) -> list[tuple[str, Tensor]]:
    """What each convolution makes of images (N, C, H, W), by its name: (N, O, OH, OW)."""
    names: dict[nn.Module, str] = {layer: name for name, layer in convolutions(network)}
    made: list[tuple[str, Tensor]] = []

    def keep(layer: nn.Module, _: Any, maps: Tensor) -> None:
        made.append((names[layer], maps.float()))

    with evaluating(network), watching(names, keep):
        network.forward(images)  # not as it may be compiled
    return made


def penultimate(network: nn.Module, images: Tensor) -> Tensor:
    """What the last layer with parameters is given, of each image a vector (N, features).

    Of a convolution, which some networks end with, the mean over all positions.
    """
    given: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        given[:] = inputs[:1]

    layers = [layer for layer in leaves(network) if list(layer.parameters())]
    with evaluating(network), watching(layers, keep):
        network.forward(images)
    return (given[0].mean((2, 3)) if given[0].ndim == 4 else given[0]).float()


@contextmanager
def watching(layers: Iterable[nn.Module], look: Callable[..., None]) -> Iterator[None]:
    """`look` is called after each of these layers with it, its inputs and its output."""
    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
