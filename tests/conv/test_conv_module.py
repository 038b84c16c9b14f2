"""Convolutions as modules: nn.Conv2d's errors, weights, copies and pickles."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from convolutions import every_backend, layer_like, randn
from torch import nn
from torch.func import functional_call

from cnntrain.conv import BACKENDS, Im2colConv2d, NaiveConv2d

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
    "no height before the padding": ({"padding": 3}, (2, 3, 0, 6), "size|shape"),
    "no width before the padding": ({"padding": 3}, (2, 3, 6, 0), "size|shape"),
    "no width to reflect": ({"padding": 1, "padding_mode": "reflect"}, (2, 3, 6, 0), "dimensions"),
    "two dimensions to reflect": ({"padding": 1, "padding_mode": "reflect"}, (6, 6), "2D"),
    "wrong channel count, reflected": (
        {"padding": 1, "padding_mode": "reflect"},
        (2, 4, 6, 6),
        "channels",
    ),
    "negative stride": ({"stride": -1}, (2, 3, 6, 6), "stride"),
    "half a stride": ({"stride": 1.5}, (2, 3, 6, 6), "stride|combination"),
    "no stride": ({"stride": None}, (2, 3, 6, 6), "stride|combination"),
    "half a padding": ({"padding": 0.5}, (2, 3, 6, 6), "padding|combination|pad"),
    "three dilations": ({"dilation": (1, 1, 1)}, (2, 3, 6, 6), "dilation|values"),
    "no padding at all": ({"padding": ()}, (2, 3, 6, 6), "padding|values"),
    "one kernel size": ({"kernel_size": (3,)}, (2, 3, 6, 6), "stride|kernel sizes"),
    "three kernel sizes": ({"kernel_size": (3, 3, 3)}, (2, 3, 6, 6), "stride|kernel sizes"),
    "a kernel of none": ({"kernel_size": 0}, (2, 3, 6, 6), "primitive|zero"),
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


BAD_PARAMETERS = {
    "another number of channels": ((4, 2, 3, 3), (4,), "channels"),
    "no output": ((0, 3, 3, 3), (0,), "dimension"),
    "a bias of another size": ((4, 3, 3, 3), (3,), "bias"),
    "one number as bias": ((4, 3, 3, 3), (1,), "bias"),
    "a bias of two dimensions": ((4, 3, 3, 3), (4, 1), "bias"),
    "three dimensions": ((4, 3, 3), (4,), "stride|kernel sizes"),
}


@every_backend
@pytest.mark.parametrize("case", BAD_PARAMETERS)
def test_errors_in_parameters_are_nn_conv2ds(backend, case):
    weight_size, bias_size, message = BAD_PARAMETERS[case]
    parameters = {"weight": torch.zeros(weight_size), "bias": torch.zeros(bias_size)}
    with pytest.raises(Exception) as expected:  # noqa: PT011 - its type is what is compared
        functional_call(nn.Conv2d(3, 4, 3), parameters, (torch.zeros(2, 3, 6, 6),))
    with pytest.raises(type(expected.value), match=message):
        functional_call(backend(3, 4, 3), parameters, (torch.zeros(2, 3, 6, 6),))


@every_backend
def test_groups_that_do_not_divide_the_weight_are_rejected(backend):
    weight = {"weight": torch.zeros(3, 2, 3, 3)}
    with pytest.raises(RuntimeError, match=r"divisible by 2|groups=2 divides"):
        functional_call(backend(4, 4, 3, groups=2, bias=False), weight, (torch.zeros(2, 4, 6, 6),))


def test_zero_input_channels_are_rejected():  # nn.Conv2d gives an output of size (2, 0, 4, 4)
    for backend in (Im2colConv2d, NaiveConv2d):
        with pytest.warns(UserWarning, match="zero-element"):
            conv = backend(0, 4, 3)
        with pytest.raises(RuntimeError, match="no dimension of zero"):
            conv(torch.zeros(2, 0, 6, 6))


@every_backend
@pytest.mark.parametrize("steps", [{"stride": (2,)}, {"dilation": (2,)}, {"padding": (2,)}])
def test_one_number_in_a_tuple_is_for_both_axes(backend, steps):
    reference, x = nn.Conv2d(3, 4, 3, **steps, dtype=torch.float64), randn(2, 3, 7, 8)
    torch.testing.assert_close(layer_like(backend, reference, 3, 4, 3, **steps)(x), reference(x))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_unequal_dtypes_are_rejected(backend, dtype):
    x = torch.zeros(2, 3, 6, 6)
    with pytest.raises(RuntimeError, match="type"):
        backend(3, 4, 3)(x.to(dtype))
    for name in ("weight", "bias"):
        conv = backend(3, 4, 3)
        value = conv.get_parameter(name).detach().to(dtype)
        with pytest.raises(RuntimeError, match="type"):
            functional_call(conv, {name: value}, (x,))


@every_backend
def test_sparse_input_is_rejected(backend):
    with pytest.raises(RuntimeError, match=r"layout torch\.sparse_coo|torch\.sparse\.FloatTensor"):
        backend(3, 4, 3)(torch.zeros(2, 3, 6, 6).to_sparse())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@every_backend
def test_two_devices_are_rejected(backend):
    with pytest.raises(RuntimeError, match=r"cuda"):
        backend(3, 4, 3)(torch.zeros(2, 3, 6, 6, device="cuda"))


@every_backend
@pytest.mark.parametrize("no_tensor", [[1.0], None, np.zeros((2, 3, 6, 6))], ids=type)
def test_input_that_is_no_tensor_is_a_type_error(backend, no_tensor):
    with pytest.raises(TypeError):
        backend(3, 4, 3)(no_tensor)


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
def test_meta_device_gives_the_shape(backend):
    conv = backend(3, 2, 3, stride=2, device="meta")
    assert conv(torch.empty(4, 3, 9, 8, device="meta")).shape == (4, 2, 4, 3)
