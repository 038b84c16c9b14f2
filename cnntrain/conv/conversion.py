"""Any network on another convolution.

A layer is not exchanged for a new one: it changes its class and stays the same object, as
PyTorch's own lazy modules do. So whatever else knows the layer goes on being right: an optimizer
its parameters, a second place in the network, the handle of a hook, a plain list, a checkpoint.
"""

from __future__ import annotations

import difflib
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from cnntrain.conv.geometry import Geometry, padding_amounts
from cnntrain.conv.torch_compat import constructed_padding

M = TypeVar("M", bound=nn.Module)

OTHERS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# A subclass may have these of its own and still compute what its base class does.
COSMETIC = {"__init__", "__repr__", "reset_parameters", "extra_repr", "__constants__"}
COSMETIC |= {"__annotate__", "__annotate_func__"}  # where annotations are computed late


def convert(model: M, backend: str | Callable[..., nn.Conv2d]) -> M:
    """Have every ``nn.Conv2d`` in ``model`` computed by ``backend``, in place; returns ``model``.

    Layers on another backend are converted as well, and so is ``model`` if it is a layer itself.
    The parameters stay the same objects: values, device, dtype, memory format, ``requires_grad``,
    gradients and ties are kept, and an optimizer made before goes on. Training mode, hooks and
    ``state_dict`` keys are kept too. No random number is drawn, and no more than one layer's
    weights exist twice at a time.

    Transposed convolutions and those of one or three dimensions stay as they are, with a warning.
    A call of ``F.conv2d`` within a ``forward`` belongs to no layer and cannot be seen.

    Args:
        model: any network.
        backend: a name in ``BACKENDS``, a class derived from ``nn.Conv2d``, or a
            ``functools.partial`` of one with its options. A layer that is of this class already
            stays as it is, unless there are options.

    Raises:
        ValueError: there is no backend of this name; or layers cannot be converted, with the
            reasons, and nothing has been changed: uninitialised ones (``nn.LazyConv2d``),
            parametrized ones, those compiled by TorchScript, those with a ``forward`` of their
            own, and those whose geometry the backend refuses.
        TypeError: ``backend`` is nothing of the kind, or ``model`` no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be an nn.Module, not {type(model).__name__}")
    kind, options = _class_and_options(backend)
    refused: defaultdict[str, list[str]] = defaultdict(list)
    before: list[tuple[nn.Conv2d, type, dict[str, Any]]] = []
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            for name, layer in list(model.named_modules()):
                if not _is_conv2d(layer) or (type(layer) is kind and not options):
                    continue
                reason = _obstacle(layer, kind)
                if reason is None:
                    before.append((layer, type(layer), dict(vars(layer))))
                    reason = _construct(layer, kind, options)
                if reason is not None:
                    refused[reason].append(name or "the layer")
        if refused:
            raise ValueError(
                f"cannot convert to {kind.__name__}, nothing was changed: {_few(refused)}"
            )
    except BaseException:
        for layer, old_kind, attributes in before:
            layer.__class__ = old_kind
            vars(layer).clear()
            vars(layer).update(attributes)
        raise
    for layer, _, attributes in before:
        _give_back(layer, attributes)
    others = defaultdict(list)
    for name, module in model.named_modules():
        if _stays(module):
            others[f"{type(module).__name__} is no nn.Conv2d"].append(name or "the layer")
    if others:
        warnings.warn(f"not converted: {_few(others)}", stacklevel=2)
    return model


def _few(layers: dict[str, list[str]]) -> str:
    """Reasons, each with the number of its layers and the first of their names."""
    return "; ".join(
        f"{reason} ({len(names)} layer{'s' * (len(names) > 1)}: {', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''})"
        for reason, names in layers.items()
    )


def _class_and_options(backend: Any) -> tuple[type[nn.Conv2d], dict[str, Any]]:
    from cnntrain.conv import BACKENDS  # which imports this file

    if isinstance(backend, str):
        if backend not in BACKENDS:
            near = difflib.get_close_matches(backend, BACKENDS, n=1)
            way_out = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(BACKENDS)}"
            raise ValueError(f"backend={backend!r}: {way_out}")
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


def _is_conv2d(module: nn.Module) -> bool:
    scripted = isinstance(module, torch.jit.ScriptModule)
    return isinstance(module, nn.Conv2d) or (
        scripted and str(module.original_name).endswith("Conv2d")
    )


def _stays(module: nn.Module) -> bool:
    """Whether it is some other convolution: torchvision's deformable one, a quantised one. A block
    without parameters of its own, around layers that were converted, is none."""
    named_so = "Conv" in type(module).__name__ and hasattr(module, "kernel_size")
    own = next(module.parameters(recurse=False), None)
    block = own is None and any(_is_conv2d(child) for child in module.modules())
    return isinstance(module, OTHERS) or (
        named_so and not isinstance(module, nn.Conv2d) and not block
    )


def _obstacle(conv: Any, kind: type[nn.Conv2d]) -> str | None:
    """Why a layer may compute something else than its weight, bias and geometry say, if so."""
    if isinstance(conv, torch.jit.ScriptModule):
        return "is compiled by TorchScript; convert the network before that"
    if isinstance(conv, nn.LazyConv2d):
        return "is an nn.LazyConv2d without weights yet; show the network a batch first"
    if parametrize.is_parametrized(conv):
        names = ", ".join(conv.parametrizations)
        return f"is parametrized ({names}); convert first, parametrize then"
    own = [name for name in vars(conv) if callable(getattr(type(conv), name, None))]
    if type(conv) is not kind:
        own += _overrides(type(conv))
    if own := [name for name in dict.fromkeys(own) if name not in COSMETIC]:
        return (
            f"{type(conv).__name__} has its own {', '.join(own)}; derive it from the backend's "
            "class, or convert only the modules without it"
        )
    return None


def _overrides(kind: type) -> list[str]:
    """What a class has of its own in place of what ``nn.Conv2d`` and the backends have."""
    from cnntrain.conv import BACKENDS

    known = {base for backend in BACKENDS.values() for base in backend.__mro__}
    state = {"weight", "bias", *nn.Conv2d.__constants__}
    return [
        name
        for base in kind.__mro__
        if base not in known
        for name, value in vars(base).items()
        if name in state or hasattr(nn.Conv2d, name)
        if not name.startswith("__") or isinstance(value, FunctionType)
    ]


def _construct(conv: nn.Conv2d, kind: type[nn.Conv2d], options: dict[str, Any]) -> str | None:
    """Make a layer anew, of class ``kind``, without weight and bias; why that fails, if so."""
    try:
        weight, wanted = conv.weight, _properties(conv)
        if conv.padding_mode != "zeros" and constructed_padding(conv) != wanted["padding"]:
            return (
                "its padding was changed after it was made, but it pads by the old one; replace it"
            )
        arguments = _arguments(conv)
        conv.__class__ = kind
        vars(conv).clear()
        # On the layer itself, so that whatever the constructor ties to `self` is tied to it.
        kind.__init__(conv, **{**options, **arguments})
        made = _properties(conv)
        for name in ("weight", "bias"):
            if hasattr(conv, name):
                delattr(conv, name)
        conv.to(weight)  # what else the class may have made
    except Exception as error:
        return str(error).strip().split("\n")[0] or type(error).__name__
    for name, value in made.items():
        if value != wanted[name]:
            return f"{kind.__name__} makes its {name} {value}, not {wanted[name]}"
    return None


def _properties(conv: nn.Conv2d) -> dict[str, Any]:
    """What a layer computes with; of padding, the pixels at (left, right, top, bottom)."""
    geometry = Geometry.of(conv)
    return {
        "weight": tuple(conv.weight.shape),
        "bias": conv.bias is not None,
        "stride": geometry.stride,
        "dilation": geometry.dilation,
        "groups": geometry.groups,
        "padding": padding_amounts(conv.padding, conv.weight.shape[2:], geometry.dilation),
        "padding_mode": conv.padding_mode,
    }


def _arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """What to call a constructor with, for a layer like this one."""
    # From the weight, as F.conv2d does: who exchanges a weight may forget `in_channels`.
    out_channels, in_channels, *kernel_size = conv.weight.shape
    # Nothing that is usual: a class of a user's own may not know what its network never needs.
    usual = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "bias": True}
    usual |= {"padding": (0, 0), "padding_mode": "zeros"}
    own = {**_properties(conv), "padding": conv.padding}
    return {
        "in_channels": in_channels * conv.groups,
        "out_channels": out_channels,
        "kernel_size": tuple(kernel_size),
        **{name: own[name] for name in usual if own[name] != usual[name]},
    }


def _give_back(conv: nn.Conv2d, attributes: dict[str, Any]) -> None:
    """Put a layer's parameters, hooks and mode, and what users attached to it, into it again."""
    made, module_state = vars(conv), vars(nn.Module())
    for name, value in attributes.items():
        if name in module_state:
            if isinstance(value, (dict, set)):  # the same object: handles of hooks refer to it
                value.update(made[name])
            made[name] = value
        elif name not in made and name != "algorithm":  # which is the former backend's
            made[name] = value
