"""Conversion of a network's ``nn.Conv2d`` layers to another backend, in place.

A layer changes its class and stays the same object, as PyTorch's lazy modules do, so that all
references to it stay valid: optimizers, shared layers, handles of hooks, plain lists.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from cnntrain.conv.geometry import Geometry, padding_amounts
from cnntrain.conv.im2col import Im2colConv2d
from cnntrain.conv.module import NativeConv2d
from cnntrain.conv.naive import NaiveConv2d
from cnntrain.conv.torch_compat import constructed_padding

BACKENDS = {"native": NativeConv2d, "im2col": Im2colConv2d, "naive": NaiveConv2d}

M = TypeVar("M", bound=nn.Module)

OTHERS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# A subclass may override these and still compute the same.
COSMETIC = {"__init__", "__repr__", "reset_parameters", "extra_repr", "__constants__"}
COSMETIC |= {"__annotate__", "__annotate_func__"}  # where annotations are computed late


def convert(model: M, backend: str | Callable[..., nn.Conv2d]) -> M:
    """Convert every ``nn.Conv2d`` in ``model``, of any backend, to ``backend``, in place.

    Parameters stay the same objects, with their device, dtype, memory format, gradients and ties;
    training mode, hooks and ``state_dict`` keys are kept. No random numbers are drawn, and at most
    one layer's weights exist twice at a time. Transposed, 1d and 3d convolutions are not converted,
    with a warning, nor are calls of ``F.conv2d``.

    Args:
        model: any network.
        backend: a name in ``BACKENDS``, a class derived from ``nn.Conv2d``, or a
            ``functools.partial`` of one with its options. Layers of this class are not changed,
            unless there are options.

    Returns:
        ``model``.

    Raises:
        ValueError: unknown backend; or a layer is uninitialised, parametrized, with a ``forward``
            of its own, or with options that the backend rejects. Then nothing is changed.
        TypeError: ``backend`` or ``model`` is of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be an nn.Module, not {type(model).__name__}")
    kind, options = _class_and_options(backend)
    before: list[tuple[nn.Conv2d, type, dict[str, Any]]] = []
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            for name, layer in list(model.named_modules()):
                if not isinstance(layer, nn.Conv2d) or (type(layer) is kind and not options):
                    continue
                reason = _obstacle(layer, kind)
                if reason is None:
                    before.append((layer, type(layer), dict(vars(layer))))
                    reason = _construct(layer, kind, options)
                if reason is not None:
                    raise ValueError(
                        f"cannot convert {name or 'the layer'} to {kind.__name__}, nothing was "
                        f"changed: {reason}"
                    )
    except BaseException:
        for layer, old_kind, attributes in before:
            layer.__class__ = old_kind
            vars(layer).clear()
            vars(layer).update(attributes)
        raise
    for layer, _, attributes in before:
        _restore_attributes(layer, attributes)
    others = {type(module).__name__ for module in model.modules() if isinstance(module, OTHERS)}
    if others:
        warnings.warn(f"not converted: {', '.join(sorted(others))}", stacklevel=2)
    return model


def _class_and_options(backend: Any) -> tuple[type[nn.Conv2d], dict[str, Any]]:
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: choose from {', '.join(BACKENDS)}")
        return BACKENDS[backend], {}
    kind, options = backend, {}
    if isinstance(backend, partial) and not backend.args:
        kind, options = backend.func, backend.keywords
    if not (isinstance(kind, type) and issubclass(kind, nn.Conv2d)):
        raise TypeError(
            f"backend={backend!r}: must be a name, a class derived from nn.Conv2d, or a "
            "functools.partial of one with keywords"
        )
    return kind, options


def _obstacle(conv: Any, kind: type[nn.Conv2d]) -> str | None:
    """The reason why a layer cannot be converted, or None."""
    if isinstance(conv, nn.LazyConv2d):
        return "is an nn.LazyConv2d without weights yet; show the network a batch first"
    if parametrize.is_parametrized(conv):
        names = ", ".join(conv.parametrizations)
        return f"is parametrized ({names}); convert first, parametrize then"
    if own := _own_methods(conv, kind):
        return (
            f"{type(conv).__name__} has its own {', '.join(own)}; derive it from the backend's "
            "class, or convert only the modules without it"
        )
    return None


def _own_methods(conv: nn.Conv2d, kind: type[nn.Conv2d]) -> list[str]:
    """Names of ``nn.Conv2d`` that a layer or its class overrides, and ``kind`` does not."""
    known = {base for other in (kind, *BACKENDS.values()) for base in other.__mro__}
    state = {"weight", "bias", *nn.Conv2d.__constants__}
    own = [name for name in vars(conv) if callable(getattr(type(conv), name, None))]
    own += [
        name
        for base in type(conv).__mro__
        if base not in known
        for name, value in vars(base).items()
        if name in state or hasattr(nn.Conv2d, name)
        if not name.startswith("__") or isinstance(value, FunctionType)
    ]
    return [name for name in dict.fromkeys(own) if name not in COSMETIC]


def _construct(conv: nn.Conv2d, kind: type[nn.Conv2d], options: dict[str, Any]) -> str | None:
    """Construct a layer again, as a ``kind`` without weight and bias. Returns the error, if any."""
    try:
        weight, wanted = conv.weight, _properties(conv)
        if conv.padding_mode != "zeros" and constructed_padding(conv) != wanted["padding"]:
            return (
                "its padding was changed after it was made, but it pads by the old one; replace it"
            )
        arguments = _arguments(conv)
        conv.__class__ = kind
        vars(conv).clear()
        # On the layer itself: the constructor may keep references to `self`.
        kind.__init__(conv, **{**options, **arguments})
        made = _properties(conv)
        for name in ("weight", "bias"):
            if hasattr(conv, name):
                delattr(conv, name)
        conv.to(weight)  # other tensors of the class
    except Exception as error:
        return str(error).strip().split("\n")[0] or type(error).__name__
    for name, value in made.items():
        if value != wanted[name]:
            return f"{kind.__name__} makes its {name} {value}, not {wanted[name]}"
    return None


def _properties(conv: nn.Conv2d) -> dict[str, Any]:
    """Options that a layer computes with; padding as pixels at (left, right, top, bottom)."""
    geometry = Geometry.of(conv)
    return {
        "weight": tuple(conv.weight.shape),
        "bias": conv.bias is not None,
        **vars(geometry),  # stride, dilation, groups
        "padding": padding_amounts(conv.padding, conv.weight.shape[2:], geometry.dilation),
        "padding_mode": conv.padding_mode,
    }


def _arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """Constructor arguments of a layer."""
    # From the weight, as F.conv2d does: a replaced weight may not match `in_channels`.
    out_channels, depth, *kernel_size = conv.weight.shape
    sizes: dict[str, Any] = {"out_channels": out_channels, "kernel_size": tuple(kernel_size)}
    # Without defaults: a user's class need not accept options that its network does not use.
    usual = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "bias": True}
    usual |= {"padding": (0, 0), "padding_mode": "zeros"}
    own = {**_properties(conv), "padding": conv.padding}
    changed = {name: own[name] for name in usual if own[name] != usual[name]}
    return {"in_channels": depth * conv.groups, **sizes, **changed}


def _restore_attributes(conv: nn.Conv2d, attributes: dict[str, Any]) -> None:
    """Restore a layer's parameters, hooks, mode and user attributes."""
    made, module_state = vars(conv), vars(nn.Module())
    for name, value in attributes.items():
        if name in module_state:
            if isinstance(value, (dict, set)):  # the same object: handles of hooks refer to it
                value.update(made[name])
            made[name] = value
        elif name not in made and name != "algorithm":  # of the previous backend
            made[name] = value
