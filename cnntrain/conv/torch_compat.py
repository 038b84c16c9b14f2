"""Private names of torch that the convolutions use, each with the public API that is missing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def gradient_is_needed(ctx: Any, i: int) -> bool:
    """Whether the running backward pass has to compute the gradient of input i of a Function.

    ``ctx.needs_input_grad`` is public, but true for all inputs that require a gradient, also if
    ``torch.autograd.grad`` is called for others: a penalty on the input gradient would compute a
    weight gradient, a third of a convolution's work, in vain. Where the engine has no answer (a
    leaf that is asked for, a call from outside the engine), the result is true.
    """
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[i][0])
    except (RuntimeError, AttributeError):
        return True


def constructed_padding(conv: nn.Conv2d) -> tuple[int, ...]:
    """The padding (left, right, top, bottom) that ``nn.Conv2d`` uses in padding modes other than
    zeros: computed by its constructor and not public, unlike ``padding``, which may have changed.
    """
    return tuple(conv._reversed_padding_repeated_twice)
