"""Convolutions: first and second derivatives, and what they cost."""

import itertools

import pytest
import torch
from test_conv import GRID, our_backend, randn, twin
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

from cnntrain.conv import Im2colConv2d, NaiveConv2d
from cnntrain.conv.autograd import Forward
from cnntrain.conv.columns import column_bytes
from cnntrain.conv.geometry import Geometry
from cnntrain.conv.im2col import Im2col
from cnntrain.conv.naive import Naive

algorithms = pytest.mark.parametrize("algorithm", [Im2col(), Naive()], ids=["im2col", "naive"])
GEOMETRIES = [
    Geometry(),
    Geometry(stride=(2, 1), dilation=(1, 2)),
    Geometry(stride=(1, 2), dilation=(2, 1), groups=2),
    Geometry(stride=(3, 2), groups=4),
]


@our_backend
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_gradients_are_nn_conv2ds_over_the_grid(backend):
    for case in GRID[::7]:  # 7 divides no length of the grid's axes, so all their values occur
        reference = nn.Conv2d(4, 8, **case, dtype=torch.float64)
        ours = twin(backend, reference, 4, 8, **case)
        x, x_ours = (randn(2, 4, 7, 8).requires_grad_() for _ in range(2))
        y = reference(x)
        g = randn(*y.shape, seed=1)
        y.backward(g)
        ours(x_ours).backward(g)
        for name, mine, theirs in [
            ("input", x_ours.grad, x.grad),
            ("weight", ours.weight.grad, reference.weight.grad),
            ("bias", ours.bias.grad, reference.bias.grad),
        ]:
            torch.testing.assert_close(mine, theirs, msg=lambda m, c=(name, case): f"{c}: {m}")


@our_backend
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_gradients_through_padding_modes(backend, mode):
    options = {"padding": (2, 1), "padding_mode": mode}
    reference = nn.Conv2d(3, 2, 3, **options, dtype=torch.float64)
    ours, x = twin(backend, reference, 3, 2, 3, **options), randn(2, 3, 5, 6).requires_grad_()
    g = randn(2, 2, 7, 6, seed=1)
    (mine,) = torch.autograd.grad(ours(x), x, g)
    (theirs,) = torch.autograd.grad(reference(x), x, g)
    torch.testing.assert_close(mine, theirs)


@algorithms
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_first_and_second_derivatives(algorithm, geometry, needs):
    x = randn(2, 4, 4, 5).requires_grad_(needs[0])
    w = randn(4, 4 // geometry.groups, 2, 3, seed=1).requires_grad_(needs[1])

    def y(x, w):
        return Forward.apply(x, w, geometry, algorithm)

    assert gradcheck(y, (x, w))
    assert gradgradcheck(y, (x, w))


@our_backend
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_every_subset_of_gradients(backend, needs):
    conv = backend(2, 3, 3, padding=1, dtype=torch.float64)
    reference, x = twin(nn.Conv2d, conv, 2, 3, 3, padding=1), randn(2, 2, 4, 4)

    def grads(module):
        wanted = [x.clone(), module.weight, module.bias]
        for tensor, need in zip(wanted, needs, strict=True):
            tensor.requires_grad_(need)
        y = module(wanted[0])
        assert y.requires_grad == any(needs)
        if any(needs):
            y.square().sum().backward()
        return [tensor.grad for tensor in wanted]

    for mine, theirs, need in zip(grads(conv), grads(reference), needs, strict=True):
        assert (mine is not None) == need
        if need:
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", [Im2colConv2d, NaiveConv2d])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)))
def test_nothing_is_computed_that_nobody_asked_for(backend, needs):
    calls = []

    class Counting(type(backend(1, 1, 1).algorithm)):
        def grad_input(self, *args):
            calls.append("input")
            return super().grad_input(*args)

        def grad_weight(self, *args):
            calls.append("weight")
            return super().grad_weight(*args)

    conv = backend(2, 3, 3)
    conv.algorithm = Counting()
    conv.weight.requires_grad_(needs[1])
    conv(torch.ones(2, 2, 5, 5, requires_grad=needs[0])).sum().backward()
    assert calls == [name for name, need in zip(["input", "weight"], needs, strict=True) if need]


@our_backend
def test_small_integer_gradients_are_exact(backend):
    generator = torch.Generator().manual_seed(2)
    reference = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        reference.weight.copy_(torch.randint(-3, 4, (4, 3, 3, 3), generator=generator))
    ours = backend(3, 4, 3, stride=2, padding=1, bias=False)
    ours.load_state_dict(reference.state_dict())
    x = torch.randint(-3, 4, (5, 3, 7, 7), generator=generator).float().requires_grad_()
    exact = x.detach().double().requires_grad_()
    g = torch.randint(-3, 4, (5, 4, 4, 4), generator=generator).float()
    ours(x).backward(g)
    reference(exact).backward(g.double())
    assert torch.equal(x.grad.double(), exact.grad)
    assert torch.equal(ours.weight.grad.double(), reference.weight.grad)


@our_backend
@pytest.mark.parametrize("groups", [1, 2])
def test_empty_batch_backward(backend, groups):
    conv, x = backend(4, 6, 3, groups=groups), torch.zeros(0, 4, 5, 5, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad.shape == (0, 4, 5, 5)
    assert torch.equal(conv.weight.grad, torch.zeros_like(conv.weight))
    assert torch.equal(conv.bias.grad, torch.zeros(6))


@our_backend
def test_backward_keeps_the_input_and_the_weight_only(backend):
    conv, x = backend(2, 3, 3, bias=False), torch.ones(2, 2, 6, 6, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        conv(x)
    assert kept == [x.data_ptr(), conv.weight.data_ptr()]


def test_a_large_batch_is_worked_off_in_parts():
    x, w = randn(7, 16, 34, 34), randn(8, 16, 3, 3, seed=1)
    whole, parts = Im2col(), Im2col(max_column_mib=1)
    image = column_bytes(x.shape, (3, 3), Geometry(), 8)
    sizes = [len(range(7)[part]) for part in parts._parts(x, (3, 3), Geometry())]
    assert sum(sizes) == 7
    assert max(sizes) == max(1, 2**20 // image)
    y = whole.forward(x, w, Geometry())
    torch.testing.assert_close(parts.forward(x, w, Geometry()), y)
    torch.testing.assert_close(y, nn.functional.conv2d(x, w))
    torch.testing.assert_close(
        parts.grad_weight(y, x, (3, 3), Geometry()), whole.grad_weight(y, x, (3, 3), Geometry())
    )


@our_backend
def test_gradient_of_each_sample_and_of_each_model(backend):
    options = {"groups": 2, "padding": 1, "stride": (1, 2)}
    reference = nn.Conv2d(4, 6, 3, **options, dtype=torch.float64)
    x = randn(3, 4, 5, 6)

    def losses(module):
        weights = {name: value.detach() for name, value in module.named_parameters()}
        models = {name: torch.stack([v, -v, v + 1]) for name, v in weights.items()}

        def loss(weights, x):
            return functional_call(module, weights, (x,)).square().sum()

        each_sample = vmap(grad(loss, argnums=(0, 1)), (None, 0))(weights, x)
        each_model = vmap(grad(loss, argnums=(0, 1)), (0, None))(models, x)
        return each_sample, each_model

    torch.testing.assert_close(
        losses(twin(backend, reference, 4, 6, 3, **options)), losses(reference)
    )
