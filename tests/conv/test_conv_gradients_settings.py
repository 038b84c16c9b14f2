"""The derivatives of a convolution under autocast and compilation, in place, and bit for bit."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convolutions import every_backend, layer_like, our_backend, randn
from torch import nn
from torch.func import functional_call, grad, vmap

from cnntrain.conv import BACKENDS, Conv2d, Im2colConv2d, NaiveConv2d
from cnntrain.conv.naive import Naive


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
def test_output_that_is_the_input_is_copied(alias, bias):
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
def test_next_layer_may_write_in_place(backend, bias):
    reference, x = nn.Conv2d(2, 3, 2, bias=bias, dtype=torch.float64), randn(2, 2, 3, 3)
    ours = layer_like(backend, reference, 2, 3, 2, bias=bias)
    given = []
    traced = not bias and torch.__version__ >= "2.15"
    for function in (reference, ours, *([compiled(ours)] if traced else [])):
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


@pytest.mark.skipif(torch.__version__ < "2.15", reason="is not traced by older versions")
@our_backend
def test_compiled_with_a_frozen_weight(backend):
    conv = backend(2, 4, 2, groups=2)
    conv.weight.requires_grad_(False)
    x = randn(4, 2, 3, 3, dtype=torch.float32).requires_grad_()
    assert_compiled_is_eager(conv, compiled(conv), x)


@pytest.mark.skipif(torch.__version__ < "2.15", reason="is not traced by older versions")
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
    code = (
        "import sys, torch; sys.path[:0] = ['..', '../support'];"
        "import conftest, test_conv_gradients_settings as t; print(t.bits())"
    )
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
        losses(layer_like(backend, reference, 4, 6, 3, **options)), losses(reference)
    )
