"""What is timed: convolutions, each with the size of the input that it sees, in named sets."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.config import ConfigError
from cnntrain.config.errors import first_line, unknown
from cnntrain.conv import Geometry

_PARAMETERS = inspect.signature(nn.Conv2d).parameters
_OPTIONS = [*(name for name in _PARAMETERS if name not in ("device", "dtype")), "size"]
_NEEDED = ["in_channels", "out_channels", "kernel_size", "size"]
_EXAMPLE = "shape='{in_channels: 64, out_channels: 128, kernel_size: 3, size: 32}'"


@dataclass(frozen=True)
class Layer:
    """A convolution and the input that it sees.

    Attributes:
        name: its name in a network, or its shape.
        options: keyword arguments of ``nn.Conv2d``; what is usual is left out.
        size: (H, W) of the input.
        count: how many layers like it the network has.
    """

    name: str
    options: tuple[tuple[str, Any], ...]
    size: tuple[int, int]
    count: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d, size: Sequence[int], name: str = "") -> Layer:
        """The layer that a module is."""
        usual = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        usual |= {"bias": True, "padding_mode": "zeros"}
        own = {key: getattr(conv, key) for key in ("in_channels", "out_channels", "kernel_size")}
        said = {**{key: getattr(conv, key) for key in usual}, "bias": conv.bias is not None}
        own |= {key: value for key, value in said.items() if value != usual[key]}
        layer = cls(name, tuple(own.items()), (size[0], size[1]))
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
        """For people: `64->128 3x3 s2 p1 on 32x32`."""
        conv = self._meta
        text = f"{conv.in_channels}->{conv.out_channels} {'x'.join(map(str, conv.kernel_size))}"
        for key in ("stride", "padding", "dilation", "groups"):
            if key in dict(self.options):
                text += f" {_short(key, getattr(conv, key))}"
        text += "" if conv.padding_mode == "zeros" else f" {conv.padding_mode}"
        text += " no bias" if conv.bias is None else ""
        return f"{text} on {self.size[0]}x{self.size[1]}"

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image, as `Geometry.macs` counts them."""
        conv, (out_channels, *output_size) = self._meta, self.out_shape
        geometry = Geometry.of(conv)
        return geometry.macs(conv.in_channels, out_channels, conv.kernel_size, tuple(output_size))


@dataclass(frozen=True)
class LayerSet:
    """Layers that are timed one by one and summed. `batch_sizes`: its own, if it has any."""

    name: str
    layers: tuple[Layer, ...]
    batch_sizes: tuple[int, ...] | None = None


def layer_sets(described: Mapping[str, Any], in_shape: tuple[int, int, int]) -> list[LayerSet]:
    """The sets that a config or a program describes, each layer once, with its count.

    A set is a network, whose convolutions are found by showing it an image of `in_shape` (C, H,
    W); a list of shapes, each as `layer` takes it; or a mapping with `layers`, such a list, and
    `batch_sizes`. Raises ConfigError with all that is wrong.
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


def layer(shape: Any, option: str = "shape") -> Layer:
    """The layer that a mapping describes: arguments of ``nn.Conv2d``, and `size`: H, or [H, W].

    Raises ConfigError, which calls it `option`, if a key, a value or the geometry is wrong.
    """
    if not isinstance(shape, Mapping):
        raise ConfigError([f"{option}={shape}: must be a mapping, in quotes: {_EXAMPLE}"])
    foreign = [str(key) for key in shape if key not in _OPTIONS]
    problems = [f"{option}: {unknown('it has', 'key', key, _OPTIONS)}" for key in foreign]
    missing = [key for key in _NEEDED if key not in shape]
    if missing:
        problems.append(f"{option}: has no {', '.join(missing)}; an example: {_EXAMPLE}")
    values: dict[str, Any] = {k: tuple(v) if _listed(v) else v for k, v in shape.items()}
    for key, value in values.items():
        if wrong := _wrong(key, value):
            problems.append(f"{option}.{key}={shape[key]}: {wrong}")
    if problems:
        raise ConfigError(problems)
    size = values.pop("size")
    size = size if isinstance(size, tuple) else (size, size)
    try:
        conv = nn.Conv2d(**values, device="meta")
        conv(torch.empty(1, conv.in_channels, *size, device="meta"))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError([f"{option}: {first_line(error)}"]) from None
    return Layer.of(conv, size)


def layers_of(network: nn.Module, in_shape: tuple[int, int, int]) -> list[Layer]:
    """Every ``nn.Conv2d`` in a network, as often as an image (C, H, W) passes it, with its input.

    The network is left as it was. Raises ConfigError if it cannot take the image.
    """
    found: list[Layer] = []
    names = {module: name for name, module in network.named_modules()}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        found.append(Layer.of(module, inputs[0].shape[-2:], names[module]))

    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    hooks = [conv.register_forward_pre_hook(record) for conv in convolutions]
    modes = {module: module.training for module in network.modules()}
    like = next(network.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, *in_shape, device=like.device, dtype=like.dtype))
    except (RuntimeError, ValueError) as error:
        raise ConfigError([f"in_shape={list(in_shape)}: {first_line(error)}"]) from error
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    return found


def _layer_set(name: str, value: Any, in_shape: tuple[int, int, int]) -> LayerSet:
    if isinstance(value, nn.Module):
        if layers := layers_of(value, in_shape):
            return LayerSet(name, _counted(layers))
        raise ConfigError([f"model: {name} has no nn.Conv2d to time"])
    option, batch_sizes = f"layers.{name}", None
    if isinstance(value, Mapping):
        names = ["layers", "batch_sizes"]
        if foreign := [str(key) for key in value if key not in names]:
            raise ConfigError([f"{option}: {unknown('it has', 'key', foreign[0], names)}"])
        batch_sizes, value = value.get("batch_sizes"), value.get("layers")
        if batch_sizes is not None and not (_listed(batch_sizes) and all(map(_whole, batch_sizes))):
            said = "must be a list of whole numbers from 1"
            raise ConfigError([f"{option}.batch_sizes={batch_sizes}: {said}"])
        option += ".layers"
    if not _listed(value):
        raise ConfigError([f"{option}: must be a list of layers, each as {_EXAMPLE[6:]}"])
    layers = [
        shape if isinstance(shape, Layer) else layer(shape, f"{option}[{i}]")
        for i, shape in enumerate(value)
    ]
    return LayerSet(name, _counted(layers), None if batch_sizes is None else tuple(batch_sizes))


def _counted(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Equal layers as one, under the first one's name."""
    counts = Counter((layer.options, layer.size) for layer in layers)
    first = {(layer.options, layer.size): layer.name for layer in reversed(layers)}
    return tuple(Layer(first[key], *key, count) for key, count in counts.items())


def _wrong(key: str, value: Any) -> str | None:
    if key == "bias":
        return None if isinstance(value, bool) else "must be true or false"
    if (
        key == "padding_mode"
        or key not in _OPTIONS
        or (key == "padding" and isinstance(value, str))
    ):
        return None  # nn.Conv2d itself has the words for it
    least = 0 if key == "padding" else 1
    if key in ("in_channels", "out_channels", "groups"):
        return None if _whole(value, least) else f"must be a whole number from {least}"
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) == 2 and all(_whole(number, least) for number in pair):
        return None
    return f"must be a whole number from {least}, or two, [down, right]"


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def _short(key: str, value: Any) -> str:
    """s2 for a stride of (2, 2), p0x1 for a padding of (0, 1), same for itself."""
    if isinstance(value, str):
        return value
    numbers = value if isinstance(value, tuple) else (value,)
    return key[0] + "x".join(map(str, numbers[:1] if len(set(numbers)) == 1 else numbers))
