"""Convolutions: first and second derivatives, and what they cost."""

import gc
import itertools
import weakref

import pytest
import torch
from convolutions import GRID, OperatorNames, every_backend, layer_like, our_backend, randn
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.grad import conv2d_input, conv2d_weight

from cnntrain.conv import Conv2d, Im2colConv2d, NaiveConv2d
from cnntrain.conv.autograd import convolve
from cnntrain.conv.geometry import Geometry
from cnntrain.conv.im2col import Im2col
from cnntrain.conv.module import Algorithm
from cnntrain.conv.naive import Naive


class Own(Algorithm):
    """As a user would write one: here on PyTorch's three functions, that differentiate nothing."""

    def forward(self, x, w, geometry):
        return nn.functional.conv2d(x, w, None, *self.options(geometry))

    def grad_input(self, g, w, input_size, geometry):
        size = g.shape[0], w.shape[1] * geometry.groups, *input_size
        return conv2d_input(size, w, g, *self.options(geometry))

    def grad_weight(self, g, x, kernel_size, geometry):
        size = g.shape[1], x.shape[1] // geometry.groups, *kernel_size
        return conv2d_weight(x, size, g, *self.options(geometry))

    def options(self, geometry):
        return geometry.stride, 0, geometry.dilation, geometry.groups


class OwnConv2d(Conv2d):
    algorithm = Own()


ALGORITHMS = {"im2col": Im2col(), "naive": Naive(), "own": Own()}
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
own_too = pytest.mark.parametrize(
    "backend", [Im2colConv2d, NaiveConv2d, OwnConv2d], ids=["im2col", "naive", "own"]
)
SUBSETS = list(itertools.product([True, False], repeat=3))  # of input, weight and bias
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
        ours = layer_like(backend, reference, 4, 8, **case)
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
    ours, x = layer_like(backend, reference, 3, 2, 3, **options), randn(2, 3, 5, 6).requires_grad_()
    g = randn(2, 2, 7, 6, seed=1)
    (mine,) = torch.autograd.grad(ours(x), x, g)
    (theirs,) = torch.autograd.grad(reference(x), x, g)
    torch.testing.assert_close(mine, theirs)


@algorithms
@pytest.mark.parametrize("kernel", [(2, 3), (1, 1), (4, 5)], ids=str)  # and a pixel, and the image
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_first_and_second_derivatives_of_every_subset(algorithm, geometry, kernel):
    if min(geometry.output_size((4, 5), kernel)) < 1:
        kernel = (2, 2)

    def y(x, w, bias):
        return convolve(x, w, bias, geometry, algorithm, (0, 0, 0, 0))

    for needs in SUBSETS[:-1]:  # the last one has none
        sizes = (2, 4, 4, 5), (4, 4 // geometry.groups, *kernel), (4,)
        inputs = [randn(*size, seed=seed) for seed, size in enumerate(sizes)]
        for tensor, need in zip(inputs, needs, strict=True):
            tensor.requires_grad_(need)
        assert gradcheck(y, inputs, fast_mode=True, check_forward_ad=True)
        assert gradgradcheck(y, inputs, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("algorithm", [Im2col(), Naive()], ids=["im2col", "naive"])
def test_every_number_of_the_second_derivatives(algorithm):
    geometry, sizes = Geometry((1, 2), (2, 1), 2), [(2, 2, 3, 3), (2, 1, 2, 2), (2,)]
    inputs = [randn(*size, seed=i).requires_grad_() for i, size in enumerate(sizes)]

    def y(x, w, bias):
        return convolve(x, w, bias, geometry, algorithm, (1, 0, 0, 2))

    assert gradcheck(y, inputs)
    assert gradgradcheck(y, inputs)


@every_backend
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(2, 1), "same"])
def test_second_derivatives_through_padding_modes(backend, mode, padding):
    conv = backend(2, 2, 3, padding=padding, padding_mode=mode, dtype=torch.float64)
    x = randn(1, 2, 4, 5).requires_grad_()

    def y(x, weight, bias):
        return functional_call(conv, {"weight": weight, "bias": bias}, (x,))

    assert gradgradcheck(y, (x, *conv.parameters()), fast_mode=True)


@our_backend
@pytest.mark.parametrize("needs", SUBSETS)
def test_every_subset_of_gradients(backend, needs):
    conv = backend(2, 3, 3, padding=1, dtype=torch.float64)
    reference, x = layer_like(nn.Conv2d, conv, 2, 3, 3, padding=1), randn(2, 2, 4, 4)

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


def counting(backend):
    """A small convolution of the backend, and the list of what its algorithm is called for."""
    calls = []

    class Counting(type(backend(1, 1, 1).algorithm)):
        def padded_forward(self, *args):
            calls.append("y")
            return super().padded_forward(*args)

        def padded_grad_input(self, *args):
            calls.append("dx")
            return super().padded_grad_input(*args)

        def padded_grad_weight(self, *args):
            calls.append("dw")
            return super().padded_grad_weight(*args)

    conv = backend(2, 3, 3, dtype=torch.float64)
    conv.algorithm = Counting()
    return conv, calls


@own_too
@pytest.mark.parametrize("needs", SUBSETS)
def test_only_required_gradients_are_computed(backend, needs):
    conv, calls = counting(backend)
    leaves = [randn(2, 2, 5, 5), conv.weight, conv.bias]
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    y = conv(leaves[0])
    assert calls == ["y"]
    if any(needs):
        calls.clear()
        g = torch.ones_like(y)
        with OperatorNames() as seen:
            y.backward(g)
        assert calls == [name for name, need in zip(["dx", "dw"], needs, strict=False) if need]
        if backend is not Im2colConv2d:  # whose weight gradient is a sum, too
            assert ("aten::sum" in seen.names) == needs[2]


@own_too
@pytest.mark.parametrize("asked", range(3), ids=["input", "weight", "bias"])
def test_autograd_grad_computes_only_its_inputs(backend, asked):
    conv, calls = counting(backend)
    leaves = [randn(2, 2, 5, 5).requires_grad_(), *conv.parameters()]
    for inputs in (leaves, [2 * leaf for leaf in leaves]):
        y = functional_call(conv, dict(zip(("weight", "bias"), inputs[1:], strict=True)), inputs[0])
        for wanted in {inputs[asked], leaves[asked]}:
            calls.clear()
            torch.autograd.grad(y.sum(), wanted, retain_graph=True)
            assert calls == [["dx"], ["dw"], []][asked]
    calls.clear()
    y.sum().backward(inputs=[leaves[asked]])
    assert calls == [["dx"], ["dw"], []][asked]


@own_too
def test_all_gradients_are_computed_outside_of_the_engine(backend, monkeypatch):
    conv, calls = counting(backend)
    x = randn(2, 2, 5, 5).requires_grad_()
    y = conv(x)
    outside = y.grad_fn.apply(torch.ones_like(y))
    assert calls == ["y", "dx", "dw"]
    monkeypatch.delattr(torch._C, "_will_engine_execute_node")  # a private name of PyTorch's
    y.sum().backward()
    assert calls == ["y", *["dx", "dw"] * 2]
    torch.testing.assert_close(outside[:3], (x.grad, *(p.grad for p in conv.parameters())))


@own_too
def test_second_derivatives_compute_only_required_gradients(backend):
    conv, calls = counting(backend)
    x = randn(2, 2, 5, 5).requires_grad_()
    (dx,) = torch.autograd.grad(conv(x).sum(), x, create_graph=True)
    calls.clear()
    torch.autograd.grad(dx.square().sum(), conv.weight)  # dx = grad_input(1, w)
    assert calls == ["dw"]
    conv.weight.requires_grad_(False)
    conv.bias.requires_grad_(False)
    (dx,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
    calls.clear()
    dx.square().sum().backward()  # dx = grad_input(2 y, w), y = forward(x, w): back through both
    assert calls == ["y", "dx"]


@own_too
def test_forward_mode_computes_only_given_tangents(backend):
    conv, calls = counting(backend)
    x = randn(2, 2, 5, 5)
    y, dy = torch.func.jvp(conv, (x,), (2 * x,))
    assert calls == ["y", "y"]  # x * w and dx * w; w has no tangent
    torch.testing.assert_close(dy, 2 * (y - conv.bias.view(-1, 1, 1)))


@own_too
def test_input_is_released_after_the_backward(backend):
    conv, leaf = backend(2, 3, 3), torch.ones(2, 2, 6, 6, requires_grad=True)
    x = leaf * 2
    gone = weakref.ref(x)
    y = conv(x)
    y.sum().backward()
    del x
    gc.collect()
    assert gone() is None
    assert y.grad_fn is not None
