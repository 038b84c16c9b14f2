"""Half types are rounded once, and NaN and Inf reach only what their window reaches."""

import pytest
import torch
from convolutions import randn
from torch import nn

from cnntrain.conv import Im2colConv2d, NaiveConv2d

OURS = [Im2colConv2d, NaiveConv2d]
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # unit roundoff


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", HALF)
def test_long_sum_of_ones_is_exact(backend, dtype):
    conv = backend(1, 1, 1, bias=False).to(dtype)
    conv(torch.ones(1, 1, 64, 64, dtype=dtype)).sum().backward()
    assert conv.weight.grad.item() == 4096


# batch, in_channels, out_channels, kernel, stride, padding, dilation, groups, size
LAYERS = {
    "LeNet-5's first": (512, 1, 6, 5, 1, 2, 1, 1, 28),
    "many channels": (2, 256, 64, 3, 1, 1, 1, 1, 12),
    "many filters": (2, 16, 512, 3, 2, 1, 1, 1, 12),
    "1x1": (32, 64, 64, 1, 1, 0, 1, 1, 12),
    "whole input": (64, 32, 16, 7, 1, 0, 1, 1, 7),
    "groups": (16, 16, 16, 3, 1, 1, 2, 4, 14),
    "depthwise": (64, 16, 16, 5, 2, 2, 1, 16, 28),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", OURS)
def test_products_of_half_types_are_added_in_float32(backend, name, dtype, autocast):
    n, *arguments, size = LAYERS[name]
    conv = backend(*arguments)
    if backend is Im2colConv2d:
        conv = backend(*arguments, max_column_mib=1)  # in parts
    exact = nn.Conv2d(*arguments).double()
    exact.load_state_dict(conv.to(dtype).state_dict())
    x = randn(n, arguments[0], size, size).to(dtype)
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    if autocast:
        conv.float()
        mine = x.float().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = conv(mine)
    g = randn(*y.shape, seed=1).to(dtype)
    y.backward(g)
    exact_y = exact(theirs)
    exact_y.backward(g.double())
    pairs = [(y, exact_y), (mine.grad, theirs.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(conv.parameters(), exact.parameters(), strict=True)]
    assert y.dtype == dtype
    for found, right in pairs:
        rounded = HALF[dtype] * right.abs() + 1e-4 * right.abs().max()
        assert ((found.double() - right).abs() <= rounded).all()


# in_channels, out_channels, kernel, stride, padding, dilation, groups
WINDOWS = {
    "ordinary": (3, 4, 3, 1, 1, 1, 1),
    "strided": (3, 4, 2, 3, 0, 1, 1),
    "dilated": (32, 16, 3, 1, 2, 2, 1),
    "stride and dilation": (3, 4, (3, 2), (2, 1), 1, (2, 3), 1),
    "many channels": (64, 32, 3, 1, 1, 1, 1),
    "1x1, strided": (3, 4, 1, 2, 0, 1, 1),
    "groups": (4, 6, 3, 1, 1, 1, 2),
    "depthwise": (4, 4, 3, 1, 1, 1, 4),
    "depthwise, strided, two filters a channel": (4, 8, 3, 2, 1, 2, 4),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("backend", OURS)
def test_non_finite_value_affects_only_its_windows(backend, name, value):
    """The oracle: where a convolution of a mark with ones is not zero."""
    conv, ones = backend(*WINDOWS[name]).double(), nn.Conv2d(*WINDOWS[name], bias=False).double()
    nn.init.ones_(ones.weight)
    x = randn(2, conv.in_channels, 15, 16)
    mark = torch.zeros_like(x)
    mark[1, 1, 6, 8] = 1

    y = conv(torch.where(mark == 1, value, x))
    assert torch.equal(~y.isfinite(), ones(mark) != 0)

    x.requires_grad_()
    seen = ones(mark.requires_grad_())
    reached = torch.zeros_like(seen)
    reached[1, 2, seen.shape[2] // 2, seen.shape[3] // 2] = 1
    g = torch.where(reached == 1, value, randn(*reached.shape, seed=1))
    dx, dw = torch.autograd.grad(conv(x), (x, conv.weight), g)
    touched = torch.autograd.grad(seen, mark, reached)[0] != 0
    assert torch.equal(~dx.isfinite(), touched)
    assert torch.equal(~dw.isfinite(), (torch.arange(len(dw)) == 2).view(-1, 1, 1, 1).expand_as(dw))


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("backend", OURS)
def test_infinite_weight_affects_only_its_pixels(backend, name):
    conv, native = backend(*WINDOWS[name]).double(), nn.Conv2d(*WINDOWS[name]).double()
    with torch.no_grad():
        conv.weight.abs_()[0, 0, 0, 0] = float("inf")
    native.load_state_dict(conv.state_dict())
    x = randn(2, conv.in_channels, 15, 16).abs().requires_grad_()
    g = torch.ones_like(native(x))
    found, expected = (torch.autograd.grad(layer(x), x, g)[0] for layer in (conv, native))
    assert torch.equal(found.isfinite(), expected.isfinite())
