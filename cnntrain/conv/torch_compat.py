"""Private name of torch that the convolutions use, and the public API that is missing."""

from __future__ import annotations

from typing import Any

import torch


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
