"""Private name of torch: this test fails if a release of torch changes what it does."""

import torch

from cnntrain.conv import torch_compat


class Asks(torch.autograd.Function):
    """a + b, whose backward asks which gradients are needed."""

    @staticmethod
    def forward(ctx, a, b):
        return a + b

    @staticmethod
    def backward(ctx, g):
        Asks.needed = [torch_compat.gradient_is_needed(ctx, i) for i in range(2)]
        return g, g


def test_engine_reports_which_gradients_are_needed():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    torch.autograd.grad(Asks.apply(2 * a, 3 * b).sum(), a)
    assert Asks.needed == [True, False], "torch._C._will_engine_execute_node has changed"
    Asks.apply(2 * a, 3 * b).sum().backward()
    assert Asks.needed == [True, True]
