"""Convolutions: outputs against independent oracles."""

import itertools

import numpy as np
import pytest
import scipy.signal
import torch
from convolutions import GRID, OperatorNames, every_backend, layer_like, our_backend, randn
from torch import nn

from cnntrain.conv import Conv2d, Geometry, Im2colConv2d
from cnntrain.conv.geometry import pad, padding_amounts
from cnntrain.conv.module import Algorithm
from cnntrain.conv.naive import conv2d_reference


@our_backend
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_output_is_nn_conv2ds_over_the_grid(backend):
    x = randn(2, 4, 7, 8)
    for case in GRID:
        for bias in (True, False):
            reference = nn.Conv2d(4, 8, **case, bias=bias, dtype=torch.float64)
            y = layer_like(backend, reference, 4, 8, **case, bias=bias)(x)
            torch.testing.assert_close(y, reference(x), msg=lambda m, c=case: f"{c}: {m}")
            assert y.is_contiguous()


@our_backend
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same"])
@pytest.mark.parametrize("kernel", [3, (2, 4)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_padding_modes(backend, mode, padding, kernel):
    options = {"padding": padding, "padding_mode": mode, "dtype": torch.float64}
    reference, x = nn.Conv2d(3, 2, kernel, **options), randn(2, 3, 6, 5)
    ours = backend(3, 2, kernel, **options)
    ours.load_state_dict(reference.state_dict())
    torch.testing.assert_close(ours(x), reference(x))


@every_backend
@pytest.mark.parametrize(
    ("stride", "dilation", "groups", "bias"),
    [((1, 1), (1, 1), 1, True), ((2, 1), (1, 2), 2, False), ((1, 2), (2, 1), 4, True)],
)
def test_output_is_that_of_the_reference_implementation(backend, stride, dilation, groups, bias):
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
    conv = backend(4, 4, (2, 3), padding=(1, 2), **options, dtype=torch.float64)
    x = randn(2, 4, 5, 6)
    padded = torch.zeros(2, 4, 7, 10, dtype=torch.float64)
    padded[:, :, 1:-1, 2:-2] = x
    expected = conv2d_reference(padded, conv.weight, conv.bias, Geometry(stride, dilation, groups))
    torch.testing.assert_close(conv(x), torch.tensor(expected, dtype=torch.float64))


@every_backend
def test_output_is_scipys_correlation(backend):
    conv, x = backend(3, 2, (3, 4), bias=False, dtype=torch.float64), randn(2, 3, 7, 9)
    w = conv.weight.detach().numpy()
    for n, o in itertools.product(range(2), range(2)):
        expected = scipy.signal.correlate(x[n].numpy(), w[o], mode="valid")[0]
        np.testing.assert_allclose(conv(x)[n, o].detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_reference_implementation_by_hand():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    w = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert conv2d_reference(x, w) == [[[[27.0, 37.0], [57.0, 67.0]]]]
    assert conv2d_reference(x, w, torch.tensor([0.5]), Geometry(dilation=(2, 2))) == [[[[54.5]]]]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_small_integers_are_exact(backend, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-2, 3, (3, 4, 6, 7), generator=generator)
    conv = backend(4, 6, (3, 2), stride=(1, 2), padding=1, groups=2, dtype=dtype)
    with torch.no_grad():
        conv.weight.copy_(torch.randint(-2, 3, conv.weight.shape, generator=generator))
        conv.bias.copy_(torch.arange(6))
    padded = nn.functional.pad(x, (1, 1, 1, 1)).double()
    expected = conv2d_reference(padded, conv.weight, conv.bias, Geometry((1, 2), (1, 1), 2))
    assert conv(x.to(dtype)).tolist() == expected


@our_backend
def test_precision_of_bfloat16(backend):
    reference, x = nn.Conv2d(16, 8, 3, dtype=torch.float64), randn(4, 16, 9, 9)
    ours = backend(16, 8, 3).to(torch.bfloat16)
    with torch.no_grad():
        reference.weight.copy_(ours.weight)  # rounded the same
        reference.bias.copy_(ours.bias)
    x = x.bfloat16()
    torch.testing.assert_close(ours(x).double(), reference(x.double()), rtol=2**-7, atol=2**-7)


@our_backend
def test_autocast_casts_before_the_algorithm_and_gives_float32_gradients(backend):
    conv, x = backend(2, 3, 3), randn(2, 2, 6, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x)
        assert conv.double()(x.double()).dtype == torch.float64  # as nn.Conv2d: left alone
    conv.float()
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x)
    y.sum().backward()
    assert conv.weight.grad.dtype == conv.bias.grad.dtype == torch.float32


@our_backend
@pytest.mark.parametrize("groups", [1, 2])
def test_layouts_unbatched_and_empty_inputs(backend, groups):
    options = {"padding": 1, "stride": (1, 2), "groups": groups}
    reference = nn.Conv2d(4, 6, 3, **options, dtype=torch.float64)
    ours, x = layer_like(backend, reference, 4, 6, 3, **options), randn(5, 4, 6, 8)
    inputs = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3),
        "every second": randn(5, 8, 12, 8)[:, ::2, ::2],
        "expanded": x[:1, :1].expand(3, 4, 6, 8),
        "flipped batch": x.permute(3, 1, 2, 0)[:, :, 1:],
        "unbatched": x[0],
        "one image": x[:1],
        "empty batch": x[:0],
    }
    for name, value in inputs.items():
        before = value.clone()
        torch.testing.assert_close(ours(value), reference(value), msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(value, before), f"{name}: the input was changed"


@our_backend
@pytest.mark.parametrize("groups", [1, 3])
def test_no_convolution_and_no_unfold_inside(backend, groups):
    conv = backend(3, 3, 3, padding=1, stride=2, dilation=(2, 1), groups=groups)
    with OperatorNames() as seen:
        conv(torch.zeros(2, 3, 9, 9, requires_grad=True)).sum().backward()
    assert seen.names & {"aten::bmm", "aten::baddbmm_"}
    forbidden = ("conv", "unfold", "im2col", "col2im", "fold")
    assert [name for name in seen.names if any(word in name for word in forbidden)] == []
    with OperatorNames() as seen:  # the recorder does see a convolution where there is one
        nn.Conv2d(3, 3, 3)(torch.zeros(2, 3, 9, 9))
    assert "aten::convolution" in seen.names


def test_im2col_makes_its_output_with_one_product():
    class Products(OperatorNames):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func._schema.name in ("aten::bmm", "aten::baddbmm_", "aten::mm")
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Products() as products, torch.no_grad():
        Im2colConv2d(3, 4, 3)(torch.zeros(2, 3, 9, 9))
    assert products.count == 1


def test_new_backend_is_three_functions():
    class Native(Algorithm):
        def forward(self, x, w, geometry):
            return nn.functional.conv2d(
                x, w, None, geometry.stride, 0, geometry.dilation, geometry.groups
            )

        def grad_input(self, g, w, input_size, geometry):
            raise NotImplementedError

        grad_weight = grad_input

    class MyConv2d(Conv2d):
        algorithm = Native()

    reference, x = nn.Conv2d(4, 4, 3, padding=1, groups=2, dtype=torch.float64), randn(2, 4, 6, 6)
    ours = layer_like(MyConv2d, reference, 4, 4, 3, padding=1, groups=2)
    torch.testing.assert_close(ours(x), reference(x))


def test_geometry_counts():
    geometry = Geometry.of(nn.Conv2d(6, 8, (3, 5), stride=(2, 3), dilation=(1, 2), groups=2))
    assert geometry == Geometry((2, 3), (1, 2), 2)
    assert geometry.output_size((11, 30), (3, 5)) == (5, 8)
    assert geometry.macs(6, 8, (3, 5), (5, 8)) == 5 * 3 * 3 * 8 * 5 * 8
    assert Geometry().macs(1, 6, (5, 5), (28, 28)) == 117_600  # lenet5's first layer


def test_padding_amounts():
    assert padding_amounts("same", (2, 4), (1, 1)) == (1, 2, 0, 1)  # more at right and bottom
    assert padding_amounts("same", (3, 2), (2, 3)) == (1, 2, 2, 2)
    assert padding_amounts("valid", (3, 3), (1, 1)) == (0, 0, 0, 0)
    assert padding_amounts((1, 2), (3, 3), (1, 1)) == (2, 2, 1, 1)
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert pad(x, (0, 1, 0, 0), "zeros").tolist() == [[[[0, 1, 0], [2, 3, 0]]]]
    assert pad(x, (0, 1, 0, 0), "circular").tolist() == [[[[0, 1, 0], [2, 3, 2]]]]
