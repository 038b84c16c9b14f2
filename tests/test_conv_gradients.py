"""Convolutions: first and second derivatives, and what they cost."""

import gc
import itertools
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from test_conv import GRID, OperatorNames, every_backend, our_backend, randn, twin
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn.grad import conv2d_input, conv2d_weight

from cnntrain.conv import BACKENDS, Conv2d, Im2colConv2d, NaiveConv2d
from cnntrain.conv.autograd import Algorithm, convolve
from cnntrain.conv.geometry import Geometry
from cnntrain.conv.im2col import Im2col
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


@algorithms
def test_every_number_of_the_second_derivatives(algorithm):
    geometry, sizes = Geometry((1, 2), (2, 1), 2), [(2, 4, 4, 4), (4, 2, 2, 2), (4,)]
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
def test_nothing_is_computed_that_nobody_asked_for(backend, needs):
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
def test_what_requires_grad_and_is_not_asked_for_is_not_computed(backend, asked):
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
def test_all_is_computed_where_the_engine_does_not_say_what_is_asked_for(backend, monkeypatch):
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
def test_second_derivatives_compute_only_what_is_asked_for(backend):
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
def test_forward_mode_computes_only_the_tangents_there_are(backend):
    conv, calls = counting(backend)
    x = randn(2, 2, 5, 5)
    y, dy = torch.func.jvp(conv, (x,), (2 * x,))
    assert calls == ["y", "y"]  # x * w and dx * w; w has no tangent
    torch.testing.assert_close(dy, 2 * (y - conv.bias.view(-1, 1, 1)))


@own_too
def test_nothing_is_kept_when_the_graph_is_gone(backend):
    conv, leaf = backend(2, 3, 3), torch.ones(2, 2, 6, 6, requires_grad=True)
    x = leaf * 2
    gone = weakref.ref(x)
    y = conv(x)
    y.sum().backward()
    del x
    gc.collect()
    assert gone() is None
    assert y.grad_fn is not None


@our_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_under_autocast_computes_in_the_forwards_precision(backend, dtype):
    exact, x = backend(4, 6, 3), randn(2, 4, 5, 5, dtype=torch.float32).requires_grad_()
    y = exact(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    with torch.autocast("cpu", dtype):
        with torch.autocast("cpu", enabled=False):
            y = exact(x)
        (mine,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(mine, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@our_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_a_gpu(backend, dtype):
    reference, x = nn.Conv2d(4, 6, 3, padding=1, device="cuda"), randn(2, 4, 7, 7).float().cuda()
    ours = backend(4, 6, 3, padding=1, device="cuda")
    ours.load_state_dict(reference.state_dict())
    given = []
    for conv in (ours, reference):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", dtype):
            y = conv(leaf)
            with torch.autocast("cuda", enabled=False):
                assert conv(leaf).dtype == torch.float32
        (y.float() ** 2).sum().backward()
        given.append([y, leaf.grad, conv.weight.grad, conv.bias.grad])
    for mine, theirs in zip(*given, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


@pytest.mark.parametrize("alias", [lambda x: x, lambda x: x[:], lambda x: x[:1].expand(x.shape)])
@pytest.mark.parametrize("bias", [True, False])
def test_an_output_that_is_the_input_is_not_written_to(alias, bias):
    class Identity(Naive):  # one way to compute a 1 x 1 convolution with the unit matrix
        def forward(self, x, w, geometry):
            return alias(x)

    class IdentityConv2d(Conv2d):
        algorithm = Identity()

    conv, x = IdentityConv2d(3, 3, 1, bias=bias), randn(1, 3, 2, 2, dtype=torch.float32)
    before, shift = x.clone(), conv.bias.view(-1, 1, 1) if bias else 0
    for given in (x, x.clone().requires_grad_()):
        y = conv(given)
        torch.testing.assert_close(y, before + shift)
        y.mul_(2)
        assert torch.equal(given, before)


def compiled(conv, compiler="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(conv, fullgraph=True, backend=compiler)


@every_backend
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_behind_may_write_in_place(backend, bias):
    reference, x = nn.Conv2d(2, 3, 2, bias=bias, dtype=torch.float64), randn(2, 2, 3, 3)
    ours = twin(backend, reference, 2, 3, 2, bias=bias)
    given = []
    for function in (reference, ours, *([] if bias else [compiled(ours)])):
        leaf = x.clone().requires_grad_()
        nn.ReLU(inplace=True)(function(leaf)).square().sum().backward()
        given.append(leaf.grad)
    for other in given[1:]:
        torch.testing.assert_close(other, given[0])


def assert_compiled_is_eager(conv, function, x):
    wanted = [leaf for leaf in (x, *conv.parameters()) if leaf.requires_grad]
    y, expected = function(x), conv(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
    )


@our_backend
def test_compiled_with_a_frozen_weight(backend):
    conv = backend(2, 4, 2, groups=2)
    conv.weight.requires_grad_(False)
    x = randn(4, 2, 3, 3, dtype=torch.float32).requires_grad_()
    assert_compiled_is_eager(conv, compiled(conv), x)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs C++")
def test_compiled_by_inductor():
    model = nn.Sequential(Im2colConv2d(2, 2, 2, groups=2), NaiveConv2d(2, 2, (1, 2), bias=False))
    x = randn(3, 2, 2, 3, dtype=torch.float32).requires_grad_()
    assert_compiled_is_eager(model, compiled(model, "inductor"), x)


@our_backend
def test_compiled_autograd(backend):
    conv, x = backend(2, 4, 2), randn(2, 2, 3, 3, dtype=torch.float32).requires_grad_()
    expected = torch.autograd.grad(conv(x).square().sum(), (x, *conv.parameters()))
    loss = conv(x).square().sum()
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    torch.testing.assert_close((x.grad, *(p.grad for p in conv.parameters())), expected)


def bits():
    """Output and gradients of every backend, to the last bit."""
    values = []
    for backend in BACKENDS.values():
        conv = backend(4, 6, 3, padding=1, groups=2)
        with torch.no_grad():
            for seed, parameter in enumerate(conv.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=seed))
        x = randn(5, 4, 9, 8, seed=7, dtype=torch.float32).requires_grad_()
        y = conv(x)
        y.square().sum().backward()
        values += [y, x.grad, *(p.grad for p in conv.parameters())]
    return "".join(v.detach().contiguous().numpy().tobytes().hex() for v in values)


def test_bitwise_the_same_in_this_process_and_in_another():
    first = bits()
    torch.use_deterministic_algorithms(True)
    try:
        assert bits() == first
    finally:
        torch.use_deterministic_algorithms(False)
    code = "import torch, conftest, test_conv_gradients as t; print(t.bits())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == first


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
    conv = backend(2, 3, 3, padding=1, bias=False)
    x = torch.ones(2, 2, 6, 6, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        conv(x)
    assert kept == [x.data_ptr(), conv.weight.data_ptr()]


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
