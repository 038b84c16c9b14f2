"""Private names of torch: these tests fail if a release of torch changes what they do."""

import torch
from torch import nn

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


def test_constructed_padding_is_that_of_nn_conv2d():
    conv = nn.Conv2d(1, 1, (3, 2), padding="same", padding_mode="circular")
    assert torch_compat.constructed_padding(conv) == (0, 1, 1, 1), (
        "nn.Conv2d._reversed_padding_repeated_twice has changed"
    )
    conv.padding = (0, 0)
    assert conv(torch.zeros(1, 1, 4, 5)).shape[2:] == (4, 5)
