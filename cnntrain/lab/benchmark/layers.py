"""Layer sets of a benchmark: convolutions, each with the size of its input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Len
from omegaconf import OmegaConf
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from cnntrain.config import ConfigError, Root, check
from cnntrain.config.checks import mismatch
from cnntrain.config.errors import collect, first_line, unknown
from cnntrain.conv import Geometry
from cnntrain.models import introspection

SIZE = PositiveInt | tuple[PositiveInt, PositiveInt]
PADDING = NonNegativeInt | tuple[NonNegativeInt, NonNegativeInt] | str
EXAMPLE = "'{in_channels: 64, out_channels: 128, kernel_size: 3, size: 32}'"


@dataclass(frozen=True)
class ConvLayer:
    """A convolution on the meta device and the size (H, W) of its input."""

    name: str  # in a network, or the shape
    conv: nn.Conv2d
    size: tuple[int, int]
    count: int = 1  # equal layers of the network

    def make(self, kind: Callable[..., nn.Conv2d], **options: Any) -> nn.Conv2d:
        """A new layer of a class with the arguments of ``nn.Conv2d``."""
        conv = self.conv
        return kind(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                    conv.padding, conv.dilation, conv.groups, conv.bias is not None,
                    conv.padding_mode, **options)  # fmt: skip

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.conv.in_channels, *self.size

    @property
    def out_shape(self) -> torch.Size:
        """(O, OH, OW)"""
        return self.conv(torch.empty(1, *self.in_shape, device="meta")).shape[1:]

    @property
    def shape(self) -> str:
        """In words: `64->128 3x3 s2 p1 on 32x32`."""
        conv = self.conv
        text = f"{conv.in_channels}->{conv.out_channels} {'x'.join(map(str, conv.kernel_size))}"
        for key, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)):
            value = getattr(conv, key)
            numbers = value if isinstance(value, tuple) else (value,)
            if isinstance(value, str):
                text += f" {value}"
            elif set(numbers) != {default}:
                text += f" {key[0]}" + "x".join(map(str, dict.fromkeys(numbers)))
        text += "" if conv.padding_mode == "zeros" else f" {conv.padding_mode}"
        text += " no bias" if conv.bias is None else ""
        return f"{text} on {self.size[0]}x{self.size[1]}"

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for one image."""
        conv, (channels, *size) = self.conv, self.out_shape
        return Geometry.of(conv).macs(conv.in_channels, channels, conv.kernel_size, tuple(size))


@dataclass(frozen=True)
class LayerSet:
    """Layers that are timed one by one and summed; `batch_sizes` are its own, if it has any."""

    name: str
    layers: list[ConvLayer]
    batch_sizes: list[int] | None = None


def layer_sets(described: Mapping[str, Any], in_shape: tuple[int, int, int]) -> list[LayerSet]:
    """Layer sets from their descriptions, equal layers counted.

    Args:
        described: by name a network, a list of shapes as `layer` takes them, or a mapping with
            `layers`, such a list, and `batch_sizes`.
        in_shape: (C, H, W) of the image that is passed through networks to find their layers.

    Raises:
        ConfigError: with all problems found.
    """
    sets: list[LayerSet] = []
    problems: list[str] = []
    for name, value in described.items():
        with collect(problems):
            sets.append(_layer_set(str(name), value, in_shape))
    if problems:
        raise ConfigError(problems)
    return sets


def layer(shape: Any, option: str = "shape") -> ConvLayer:
    """The layer of a mapping with arguments of ``nn.Conv2d`` and `size`, H or [H, W].

    Raises:
        ConfigError: an unknown key, a wrong value or an impossible geometry; names `option`.
    """
    if not isinstance(shape, Mapping) or "size" not in shape:
        problem = "must be a mapping with a size, in quotes"
        raise ConfigError([f"{option}={shape}: {problem}: {option}={EXAMPLE}"])
    types = {"padding": PADDING}
    types |= dict.fromkeys(("kernel_size", "size", "stride", "dilation"), SIZE)
    if problems := check(OmegaConf.create(dict(shape)), Root([], "torch.nn.Conv2d", types)):
        raise ConfigError([f"{option}.{problem}" for problem in problems])
    options = dict(shape)
    size = options.pop("size")
    size = (size, size) if isinstance(size, int) else tuple(size)
    try:
        found = ConvLayer("", nn.Conv2d(**options, device="meta"), size)
        _ = found.out_shape  # raises where the window does not fit
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError([f"{option}: {first_line(error)}"]) from None
    return replace(found, name=found.shape)


def layers_of(network: nn.Module, in_shape: tuple[int, int, int]) -> list[ConvLayer]:
    """Every call of an ``nn.Conv2d`` in the forward pass of an image (C, H, W).

    Raises:
        ConfigError: the network does not accept the image.
    """
    layers: list[ConvLayer] = []
    names: dict[nn.Module, str] = {
        conv: name for name, conv in introspection.named_convolutions(network)
    }

    def record(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        height, width = inputs[0].shape[-2:]
        called = ConvLayer(names[conv], conv, (height, width))
        layers.append(replace(called, conv=called.make(nn.Conv2d, device="meta")))

    try:
        with introspection.evaluation_mode(network), introspection.forward_hooks(names, record):
            network(introspection.black_image(network, in_shape))
    except (RuntimeError, ValueError) as error:
        raise ConfigError([f"in_shape={list(in_shape)}: {first_line(error)}"]) from error
    return layers


def _layer_set(name: str, value: Any, in_shape: tuple[int, int, int]) -> LayerSet:
    if isinstance(value, nn.Module):
        if layers := layers_of(value, in_shape):
            return LayerSet(name, _counted(layers))
        raise ConfigError([f"model: {name} has no nn.Conv2d to time"])
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    option, batch_sizes = f"layers.{name}", None
    if isinstance(value, Mapping):
        keys = ["layers", "batch_sizes"]
        if extra := [str(key) for key in value if key not in keys]:
            raise ConfigError([f"{option}: {unknown('it has', 'key', extra[0], keys)}"])
        batch_sizes, value = value.get("batch_sizes"), value.get("layers")
        if wrong := mismatch(Annotated[list[PositiveInt], Len(1)] | None, batch_sizes):
            raise ConfigError([f"{option}.batch_sizes={batch_sizes}: {wrong}"])
        option += ".layers"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError([f"{option}: must be a list of layers, each as {EXAMPLE}"])
    layers = [shape if isinstance(shape, ConvLayer) else layer(shape, f"{option}[{i}]")
              for i, shape in enumerate(value)]  # fmt: skip
    return LayerSet(name, _counted(layers), batch_sizes)


def _counted(layers: Sequence[ConvLayer]) -> list[ConvLayer]:
    """Equal layers as one with a count, under the first one's name."""
    counts = Counter(layer.shape for layer in layers)
    first = {layer.shape: layer for layer in reversed(layers)}
    return [replace(first[shape], count=count) for shape, count in counts.items()]
