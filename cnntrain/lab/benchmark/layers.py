"""Layer sets of a benchmark: convolutions, each with the size of its input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from annotated_types import Len
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from cnntrain.config import ConfigError
from cnntrain.config.checks import mismatch
from cnntrain.config.errors import first_line, unknown
from cnntrain.conv import Geometry
from cnntrain.models.introspection import (
    black_image,
    evaluation_mode,
    forward_hooks,
    named_convolutions,
)

_INTEGER = PositiveInt, "must be an integer from 1"
_PAIR = PositiveInt | tuple[PositiveInt, PositiveInt], f"{_INTEGER[1]}, or two, [height, width]"
_PADDING = NonNegativeInt | tuple[NonNegativeInt, NonNegativeInt] | str
TYPES: dict[str, tuple[Any, str]] = {  # of the keys of a shape, and what an error says
    "in_channels": _INTEGER,
    "out_channels": _INTEGER,
    "kernel_size": _PAIR,
    "size": _PAIR,
    "stride": _PAIR,
    "padding": (_PADDING, "must be an integer from 0, or two, [height, width]"),
    "dilation": _PAIR,
    "groups": _INTEGER,
    "bias": (bool, "must be true or false"),
    "padding_mode": (str, "must be a string"),
}
REQUIRED = ("in_channels", "out_channels", "kernel_size", "size")
DEFAULTS = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
DEFAULTS |= {"bias": True, "padding_mode": "zeros"}
EXAMPLE = "'{in_channels: 64, out_channels: 128, kernel_size: 3, size: 32}'"


@dataclass(frozen=True)
class ConvLayer:
    """A convolution and the size of its input.

    Attributes:
        name: its name in a network, or its shape.
        options: keyword arguments of ``nn.Conv2d`` that are not the defaults.
        size: (H, W) of the input.
        count: the number of equal layers in the network.
    """

    name: str
    options: tuple[tuple[str, Any], ...]
    size: tuple[int, int]
    count: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d, size: Sequence[int], name: str = "") -> ConvLayer:
        """The layer of a module for inputs of this size; by default named by its shape."""
        keys = ("in_channels", "out_channels", "kernel_size", *DEFAULTS)
        options = {key: getattr(conv, key) for key in keys} | {"bias": conv.bias is not None}
        options = {k: v for k, v in options.items() if k not in DEFAULTS or v != DEFAULTS[k]}
        layer = cls(name, tuple(options.items()), (size[0], size[1]))
        return layer if name else cls(layer.shape, layer.options, layer.size)

    @cached_property
    def _meta(self) -> nn.Conv2d:
        return nn.Conv2d(**dict(self.options), device="meta")

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self._meta.in_channels, *self.size

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """(O, OH, OW)"""
        y = self._meta(torch.empty(1, *self.in_shape, device="meta"))
        return y.shape[1], y.shape[2], y.shape[3]

    @property
    def shape(self) -> str:
        """In words: `64->128 3x3 s2 p1 on 32x32`."""
        conv = self._meta
        text = f"{conv.in_channels}->{conv.out_channels} {'x'.join(map(str, conv.kernel_size))}"
        for key in ("stride", "padding", "dilation", "groups"):
            if key in dict(self.options):
                text += f" {_abbreviation(key, getattr(conv, key))}"
        text += "" if conv.padding_mode == "zeros" else f" {conv.padding_mode}"
        text += " no bias" if conv.bias is None else ""
        return f"{text} on {self.size[0]}x{self.size[1]}"

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations for one image."""
        conv, (out_channels, *output_size) = self._meta, self.out_shape
        geometry = Geometry.of(conv)
        return geometry.macs(conv.in_channels, out_channels, conv.kernel_size, tuple(output_size))


@dataclass(frozen=True)
class LayerSet:
    """Layers that are timed one by one and summed; `batch_sizes` are its own, if it has any."""

    name: str
    layers: tuple[ConvLayer, ...]
    batch_sizes: tuple[int, ...] | None = None


def layer_sets(described: Mapping[str, Any], in_shape: tuple[int, int, int]) -> list[LayerSet]:
    """Layer sets from their descriptions, equal layers counted.

    Args:
        described: by name a network, a list of shapes as `layer` takes them, or a mapping with
            `layers`, such a list, and `batch_sizes`.
        in_shape: (C, H, W) of the image that is passed through networks to find their layers.

    Raises:
        ConfigError: with all problems found.
    """
    sets, problems = [], []
    for name, value in described.items():
        try:
            sets.append(_layer_set(str(name), value, in_shape))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return sets


def layer(shape: Any, option: str = "shape") -> ConvLayer:
    """The layer of a mapping with arguments of ``nn.Conv2d`` and `size`, H or [H, W].

    Raises:
        ConfigError: an unknown key, a wrong value or an impossible geometry; names `option`.
    """
    if not isinstance(shape, Mapping):
        raise ConfigError([f"{option}={shape}: must be a mapping, in quotes: shape={EXAMPLE}"])
    values: dict[str, Any] = {key: list(v) if _is_list(v) else v for key, v in shape.items()}
    problems = [f"{option}: {unknown('it has', 'key', str(key), [*TYPES])}"
                for key in values if key not in TYPES]  # fmt: skip
    if missing := [key for key in REQUIRED if key not in values]:
        problems.append(f"{option}: has no {', '.join(missing)}; an example: shape={EXAMPLE}")
    for key, value in values.items():
        kind, wrong = TYPES.get(key, (Any, ""))
        if mismatch(kind, value):
            problems.append(f"{option}.{key}={value}: {wrong}")
    if problems:
        raise ConfigError(problems)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    size = values.pop("size")
    size = size if isinstance(size, tuple) else (size, size)
    try:
        conv = nn.Conv2d(**values, device="meta")
        conv(torch.empty(1, conv.in_channels, *size, device="meta"))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError([f"{option}: {first_line(error)}"]) from None
    return ConvLayer.of(conv, size)


def layers_of(network: nn.Module, in_shape: tuple[int, int, int]) -> list[ConvLayer]:
    """Every call of an ``nn.Conv2d`` in the forward pass of an image (C, H, W).

    Raises:
        ConfigError: the network does not accept the image.
    """
    layers: list[ConvLayer] = []
    names: dict[nn.Module, str] = {conv: name for name, conv in named_convolutions(network)}

    def record(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layers.append(ConvLayer.of(conv, inputs[0].shape[-2:], names[conv]))

    try:
        with evaluation_mode(network), forward_hooks(names, record):
            network(black_image(network, in_shape))
    except (RuntimeError, ValueError) as error:
        raise ConfigError([f"in_shape={list(in_shape)}: {first_line(error)}"]) from error
    return layers


def _layer_set(name: str, value: Any, in_shape: tuple[int, int, int]) -> LayerSet:
    if isinstance(value, nn.Module):
        if layers := layers_of(value, in_shape):
            return LayerSet(name, _counted(layers))
        raise ConfigError([f"model: {name} has no nn.Conv2d to time"])
    option, batch_sizes = f"layers.{name}", None
    if isinstance(value, Mapping):
        keys = ["layers", "batch_sizes"]
        if extra := [str(key) for key in value if key not in keys]:
            raise ConfigError([f"{option}: {unknown('it has', 'key', extra[0], keys)}"])
        batch_sizes, value = value.get("batch_sizes"), value.get("layers")
        if batch_sizes is not None:
            batch_sizes = list(batch_sizes) if _is_list(batch_sizes) else batch_sizes
            if mismatch(Annotated[list[PositiveInt], Len(1)], batch_sizes):
                problem = "must be a list of integers from 1"
                raise ConfigError([f"{option}.batch_sizes={batch_sizes}: {problem}"])
        option += ".layers"
    if not _is_list(value):
        raise ConfigError([f"{option}: must be a list of layers, each as {EXAMPLE}"])
    layers = [
        shape if isinstance(shape, ConvLayer) else layer(shape, f"{option}[{i}]")
        for i, shape in enumerate(value)
    ]
    return LayerSet(name, _counted(layers), None if batch_sizes is None else tuple(batch_sizes))


def _counted(layers: Sequence[ConvLayer]) -> tuple[ConvLayer, ...]:
    """Equal layers as one with a count, under the first one's name."""
    counts = Counter((layer.options, layer.size) for layer in layers)
    first = {(layer.options, layer.size): layer.name for layer in reversed(layers)}
    return tuple(ConvLayer(first[key], *key, count) for key, count in counts.items())


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def _abbreviation(key: str, value: Any) -> str:
    """s2 for a stride of (2, 2), p0x1 for a padding of (0, 1), same for padding='same'."""
    if isinstance(value, str):
        return value
    numbers = value if isinstance(value, tuple) else (value,)
    return key[0] + "x".join(map(str, numbers[:1] if len(set(numbers)) == 1 else numbers))
