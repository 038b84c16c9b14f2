"""Implementations that a benchmark compares: backends, classes, and reference implementations."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import unfold

from cnntrain.config import ConfigError, Root, as_config_error, build, check
from cnntrain.config.errors import collect, unknown
from cnntrain.conv import BACKENDS, Geometry
from cnntrain.conv.geometry import pad, padding_amounts
from cnntrain.conv.naive import conv2d_reference

MakeConv: TypeAlias = Callable[..., nn.Conv2d]


class UnfoldConv2d(nn.Conv2d):
    """``F.unfold`` and a matrix product; autograd's backward of it is ``F.fold``.

    Padding must be zeros, given in pixels, as ``F.unfold`` supports no other.
    """

    unfold = staticmethod(unfold)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            raise RuntimeError("unfold pads with zeros only, and by a number of pixels")
        options = {"dilation": self.dilation, "padding": self.padding, "stride": self.stride}
        columns = self.unfold(input, self.kernel_size, **options)  # (N, C * kh * kw, OH * OW)
        columns = columns.unflatten(1, (self.groups, -1))  # (N, groups, K, OH * OW)
        filters = weight.view(self.groups, -1, columns.shape[2])  # (groups, O/groups, K)
        y = (filters @ columns).flatten(1, 2)  # (N, O, OH * OW)
        if bias is not None:
            y = y + bias.view(-1, 1)
        padded = tuple(n + 2 * int(p) for n, p in zip(input.shape[2:], self.padding, strict=True))
        return y.unflatten(2, Geometry.of(self).output_size(padded, self.kernel_size))


class UnfoldNdConv2d(UnfoldConv2d):
    """The same with `unfoldNd.unfoldNd`, which unfolds by a convolution with one-hot filters.

    Needs `pip install unfoldNd`. Source: https://github.com/f-dangel/unfoldNd
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from unfoldNd import unfoldNd

        self.unfold = unfoldNd


class SevenLoopsConv2d(nn.Conv2d):
    """The definition in pure Python. Its output has no gradient."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        geometry = Geometry.of(self)
        amounts = padding_amounts(self.padding, self.kernel_size, geometry.dilation)
        with torch.no_grad():
            y = conv2d_reference(pad(input, amounts, self.padding_mode), weight, bias, geometry)
        return torch.tensor(y, dtype=input.dtype, device=input.device)


REFERENCES = {"unfold": UnfoldConv2d, "unfoldNd": UnfoldNdConv2d, "seven_loops": SevenLoopsConv2d}


def implementations(entries: Sequence[str | Mapping[str, Any] | MakeConv]) -> dict[str, MakeConv]:
    """Constructors for the entries of the option `backends`, by their labels.

    Args:
        entries: each a name in `BACKENDS`, a name in `REFERENCES`, the dotted name of a class
            derived from ``nn.Conv2d``, a mapping with such a name as `_target_` and options, or
            a callable with the arguments of ``nn.Conv2d``.

    Raises:
        ConfigError: with all problems found.
    """
    makers: dict[str, MakeConv] = {}
    problems = [] if entries else ["backends=[]: must name at least one, such as native"]
    for entry in entries:
        with collect(problems):
            label, make = _implementation(entry)
            if label in makers:
                problems.append(f"backends: {label} is there twice")
            makers[label] = make
    if problems:
        raise ConfigError(problems)
    return makers


def _implementation(entry: Any) -> tuple[str, MakeConv]:
    if callable(entry):
        return getattr(entry, "__name__", str(entry)), entry
    if not isinstance(entry, Mapping):
        known: dict[Any, MakeConv] = {**BACKENDS, **REFERENCES}
        if entry == "unfoldNd" and importlib.util.find_spec("unfoldNd") is None:
            raise ConfigError(["backends: unfoldNd is a package of its own: pip install unfoldNd"])
        if entry in known:
            return entry, known[entry]
        if "." not in str(entry):
            problem = unknown("there is", "choice", str(entry), [*known])
            raise ConfigError([f"backends=[{entry}]: {problem}, or a class, as mypkg.MyConv2d"])
        entry = {"_target_": entry}
    if "_target_" not in entry:
        raise ConfigError([f"backends={dict(entry)}: must have a _target_, the class's name"])
    options = {k: v for k, v in entry.items() if k not in ("_target_", "_partial_")}
    label = str(entry["_target_"]).rpartition(".")[2]
    label += f"({', '.join(f'{k}={v}' for k, v in options.items())})" if options else ""
    cfg = OmegaConf.create({"backend": {"_partial_": True, **entry}})
    if problems := check(cfg, Root(["backend"])):  # as in every command
        raise ConfigError([problem.replace("backend", "backends", 1) for problem in problems])
    with as_config_error("backends"):
        return label, build(cfg.backend)
