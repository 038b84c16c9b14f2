"""Convolutions as modules: nn.Conv2d's errors, weights, copies and pickles."""

import copy
import itertools
import pickle

import pytest
import torch
from test_conv import every_backend, randn
from torch import nn

from cnntrain.conv import BACKENDS, Im2colConv2d

BAD_USES = {
    "kernel larger than the padded input": ({"kernel_size": 9, "padding": 1}, (2, 3, 6, 6), "size"),
    "dilated kernel larger": ({"kernel_size": 3, "dilation": 3}, (2, 3, 6, 6), "size"),
    "no height": ({}, (2, 3, 0, 6), "size"),
    "wrong channel count": ({}, (2, 4, 6, 6), "channels"),
    "wrong channel count, unbatched": ({}, (4, 6, 6), "channels"),
    "two dimensions": ({}, (6, 6), "3D"),
    "five dimensions": ({}, (1, 2, 3, 6, 6), "4D"),
    "bad padding string": ({"padding": "full"}, (2, 3, 6, 6), "full"),
    "'same' with a stride": ({"padding": "same", "stride": 2}, (2, 3, 6, 6), "same"),
    "bad padding mode": ({"padding_mode": "wrap"}, (2, 3, 6, 6), "wrap"),
    "groups that do not divide": ({"groups": 2}, (2, 3, 6, 6), "groups"),
    "stride of zero": ({"stride": 0}, (2, 3, 6, 6), "stride"),
    "dilation of zero": ({"dilation": 0}, (2, 3, 6, 6), "dilation"),
    "negative padding": ({"padding": -1}, (2, 3, 6, 6), "negative padding"),
    "three strides": ({"stride": (1, 1, 1)}, (2, 3, 6, 6), "stride|values"),
    "three paddings": ({"padding": (1, 1, 1)}, (2, 3, 6, 6), "padding|values"),
    "reflection wider than the input": (
        {"padding": 7, "padding_mode": "reflect"},
        (2, 3, 6, 6),
        "[Pp]adding size should be less",
    ),
}


@every_backend
@pytest.mark.parametrize("case", BAD_USES)
def test_errors_are_nn_conv2ds(backend, case):
    options, size, message = BAD_USES[case]
    options = {"kernel_size": 3} | options
    with pytest.raises(Exception) as expected:  # noqa: PT011 - its type is what is compared
        nn.Conv2d(3, 4, **options)(torch.zeros(size))
    with pytest.raises(type(expected.value), match=message):
        backend(3, 4, **options)(torch.zeros(size))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_unequal_dtypes_are_an_error(backend, dtype):
    with pytest.raises(RuntimeError, match="type"):
        backend(3, 4, 3)(torch.zeros(2, 3, 6, 6, dtype=dtype))


@every_backend
def test_no_tensor_is_a_type_error(backend):
    with pytest.raises(TypeError):
        backend(3, 4, 3)([1.0])


def test_weights_move_between_all_backends():
    x = randn(2, 4, 6, 6)
    classes = [nn.Conv2d, *BACKENDS.values()]
    for source, target in itertools.product(classes, classes):
        a = source(4, 4, 3, groups=2, dtype=torch.float64)
        b = target(4, 4, 3, groups=2, dtype=torch.float64)
        b.load_state_dict(a.state_dict(), strict=True)
        torch.testing.assert_close(a(x), b(x))


@every_backend
def test_same_seed_same_initial_weights(backend):
    torch.manual_seed(3)
    reference = nn.Conv2d(4, 6, (3, 5))
    torch.manual_seed(3)
    ours = backend(4, 6, (3, 5))
    assert isinstance(ours, nn.Conv2d)
    assert torch.equal(ours.weight, reference.weight)
    assert torch.equal(ours.bias, reference.bias)


@every_backend
def test_copies_and_pickles(backend):
    conv, x = backend(2, 3, 3, dtype=torch.float64), randn(2, 2, 5, 5)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert type(other) is backend
        assert torch.equal(other(x), conv(x))
    assert pickle.loads(pickle.dumps(Im2colConv2d(1, 1, 1, max_column_mib=7))).algorithm == (
        Im2colConv2d(1, 1, 1, max_column_mib=7).algorithm
    )


@every_backend
def test_meta_device_tells_the_shape(backend):
    conv = backend(3, 2, 3, stride=2, device="meta")
    assert conv(torch.empty(4, 3, 9, 8, device="meta")).shape == (4, 2, 4, 3)
