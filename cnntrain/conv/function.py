"""What torch.autograd.Function leaves to its authors: precision, ownership, no idle work."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

ACCUMULATION_DTYPES = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex32: torch.complex64,
}


def upcast(t: Tensor) -> Tensor:
    """t in the dtype that its products are added in: float32 for half types, else its own."""
    return t.to(ACCUMULATION_DTYPES.get(t.dtype, t.dtype))


def run(method: Callable[..., Tensor], a: Tensor, b: Tensor, *how: Any) -> Tensor:
    """What an algorithm computes, in the dtype of its inputs, as a tensor of its own.

    The next layer may write in place, which autograd allows if a Function's output is no view, and
    which nothing notices if it is an input: that of a 1 x 1 convolution with weight one, say.
    """
    if autocasts(a.device.type):  # a backward may be called in its region
        with torch.autocast(a.device.type, enabled=False):
            result = method(a, b, *how)
    else:
        result = method(a, b, *how)
    if is_compiling():
        return result
    return result.clone() if _share_memory(result, a, b) else result.data


def autocasts(device: str) -> bool:
    """Whether torch.autocast is on for this type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _share_memory(result: Tensor, *inputs: Tensor) -> bool:
    try:
        storage = result.untyped_storage().data_ptr()
        return any(t.untyped_storage().data_ptr() == storage for t in inputs)
    except RuntimeError:  # a tensor subclass without storage of its own: it cannot be known
        return True


def keep(ctx: Any, a: Tensor, b: Tensor) -> None:
    ctx.save_for_backward(a, b)
    ctx.save_for_forward(a, b)
    ctx.set_materialize_grads(False)  # no product with a zero gradient that nobody gave


def wanted(ctx: Any, i: int) -> bool:
    """Whether this backward has to compute the gradient of input i.

    ctx.needs_input_grad tells what requires grad. torch.autograd.grad may ask for less: then the
    engine tells what it will execute. Where it does not (a leaf that is asked for, a call from
    outside the engine, a torch without this function), the answer is yes.
    """
    if is_compiling() or not ctx.needs_input_grad[i]:
        return ctx.needs_input_grad[i]
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[i][0])
    except (RuntimeError, AttributeError):
        return True


def signed(forward: Callable) -> Callable:
    """Spares torch the search for the signature, at every call as long as a small product takes."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward
