"""`convert` against the network as it was: a second native one with the same weights."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn

from cnntrain.conv import BACKENDS, Conv2d, Im2colConv2d, NaiveConv2d, NativeConv2d, convert


def kinds(network: nn.Module) -> list[str]:
    return [type(m).__name__ for m in network.modules() if isinstance(m, nn.Conv2d)]


def passed(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Output and the gradients of the input and of every parameter, of one loss."""
    images = images.clone().requires_grad_()
    torch.manual_seed(1)  # of dropout and stochastic depth
    logits = network(images)
    nn.functional.cross_entropy(logits, torch.arange(len(images))).backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return {"output": logits.detach(), "input": images.grad, **gradients}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest max|a - b| / max|b| of all tensors.

    The bias of a batch norm whose output meets another batch norm has no gradient: what is there
    is rounding. So no tensor counts as smaller than a millionth of the largest.
    """
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(t.abs().max().item() for t in expected.values())
    return max(
        (found[name] - t).abs().max().item() / max(t.abs().max().item(), floor)
        for name, t in expected.items()
    )


# In float32 and training mode a ReLU whose input is 1e-7 from zero opens on one backend and not on
# the other: native itself differs by 1e-2 from native with channels last. So training is compared
# in float64; in float32, running statistics keep the rounding small and the images few.
@pytest.mark.parametrize(
    ("name", "backend", "size"),
    [
        ("resnet18", "im2col", 32),
        ("mobilenet_v3_small", "im2col", 64),
        ("shufflenet_v2_x1_0", "naive", 32),
    ],
)
def test_networks_agree_with_native(name: str, backend: str, size: int) -> None:
    torch.manual_seed(0)
    native = torchvision.models.get_model(name, num_classes=10)
    other = convert(torchvision.models.get_model(name, num_classes=10), backend)
    other.load_state_dict(native.state_dict())
    assert set(kinds(other)) == {BACKENDS[backend].__name__}
    for dtype, training, limit in [(torch.float32, False, 1e-4), (torch.float64, True, 1e-9)]:
        images = torch.randn(4 if training else 2, 3, size, size, dtype=dtype)
        for network in (native, other):
            network.to(dtype).train(training).zero_grad()
        assert worst(passed(other, images), passed(native, images)) < limit


LAYERS = {
    "plain": ((4, 6, 3), {}),
    "no bias, stride, padding": ((4, 6, (3, 2)), {"stride": 2, "padding": (2, 1), "bias": False}),
    "same, dilation, reflect": (
        (4, 6, 3),
        {"padding": "same", "dilation": (1, 2), "padding_mode": "reflect"},
    ),
    "valid, groups": ((4, 6, 1), {"padding": "valid", "groups": 2}),
    "depthwise, circular": ((4, 8, 3), {"groups": 4, "padding": 1, "padding_mode": "circular"}),
    "float64": ((4, 6, 3), {"dtype": torch.float64}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_attributes_of_a_layer_are_kept(layer: str, backend: str) -> None:
    torch.manual_seed(0)
    sizes, options = LAYERS[layer]
    conv = nn.Conv2d(*sizes, **options).to(memory_format=torch.channels_last).eval()
    conv.weight.requires_grad_(False)
    before, parameters = copy.deepcopy(conv), dict(conv.named_parameters())
    state = torch.get_rng_state()
    assert convert(conv, backend) is conv
    assert torch.equal(torch.get_rng_state(), state)
    assert type(conv) is BACKENDS[backend]
    assert not conv.training
    assert dict(conv.named_parameters()).keys() == parameters.keys()
    assert all(getattr(conv, name) is p for name, p in parameters.items())
    assert not conv.weight.requires_grad
    assert conv.weight.stride() == before.weight.stride()
    for name in [*nn.Conv2d.__constants__, "_reversed_padding_repeated_twice"]:
        assert getattr(conv, name) == getattr(before, name), name
    images = torch.randn(2, 4, 7, 9, dtype=conv.weight.dtype)
    torch.testing.assert_close(conv(images), before(images))


class Net(nn.Module):
    """One layer in two places, two layers with one weight, and a layer in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Conv2d(3, 3, 3, padding=1)
        self.first = nn.DataParallel(nn.Sequential(shared, nn.ReLU()))
        self.again = nn.ModuleList([shared, nn.ModuleDict({"a": nn.Conv2d(3, 3, 3, padding=1)})])
        self.tied = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.tied.weight = shared.weight
        self.order = [shared, self.tied]

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.again[0], self.again[1]["a"], *self.order):
            x = layer(x)
        return x


def test_shared_layers_and_optimizer_stay_valid() -> None:
    torch.manual_seed(0)
    native, network = Net(), Net()
    network.load_state_dict(native.state_dict())
    x = torch.randn(2, 3, 6, 6)
    for net, backend in [(native, None), (network, "im2col")]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            if step == 1 and backend:
                convert(net, backend)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert kinds(network) == ["Im2colConv2d"] * 3
    assert network.first.module[0] is network.again[0] is network.order[0]
    assert network.tied.weight is network.again[0].weight
    torch.testing.assert_close(network.state_dict(), native.state_dict())


def test_hooks_and_attributes_are_kept() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.utils.weight_norm(nn.Conv2d(2, 2, 3)))
    seen: list[Any] = []
    handle = network[0].register_forward_hook(lambda layer, inputs, y: seen.append(layer))
    network[0].register_full_backward_hook(lambda layer, gi, go: seen.append(type(layer)))
    network[0].tag = "stem"
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    before, keys = network(x), list(network.state_dict())
    seen.clear()
    after = convert(network, "im2col")(x)
    after.sum().backward()
    torch.testing.assert_close(after, before)
    assert seen == [network[0], Im2colConv2d]
    assert network[0].tag == "stem"
    assert list(network.state_dict()) == keys == [
        "0.weight", "0.bias", "1.bias", "1.weight_g", "1.weight_v",
    ]  # fmt: skip
    assert network[1].weight_g.grad.abs().max() > 0
    handle.remove()
    network(x)
    assert len(seen) == 2


def test_copies_and_checkpoints() -> None:
    torch.manual_seed(0)
    native = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 1, 3))
    network = convert(copy.deepcopy(native), partial(Im2colConv2d, max_column_mib=8))
    x = torch.randn(2, 2, 9, 9)
    for made in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert kinds(made) == ["Im2colConv2d"] * 2
        assert made[0].algorithm.max_column_mib == 8
        torch.testing.assert_close(made(x), native(x))
        made.load_state_dict(native.state_dict())
        native.load_state_dict(made.state_dict())
    back = convert(network, "native")
    assert kinds(back) == ["NativeConv2d"] * 2
    assert vars(back[0]).keys() == vars(nn.Conv2d(1, 1, 1)).keys()
    assert torch.equal(back(x), native(x))


def test_options_and_unchanged_layers() -> None:
    network = nn.Sequential(Im2colConv2d(1, 1, 1, max_column_mib=3), NaiveConv2d(1, 1, 1))
    convert(network, Im2colConv2d)
    assert [layer.algorithm.max_column_mib for layer in network] == [3, 64]
    convert(network, partial(Im2colConv2d, max_column_mib=5))
    assert [layer.algorithm.max_column_mib for layer in network] == [5, 5]
    assert kinds(convert(network, nn.Conv2d)) == ["Conv2d"] * 2


def test_compiled_network_is_converted() -> None:
    layer = nn.Conv2d(1, 2, 3)
    network = torch.compile(nn.Sequential(layer), backend="eager")
    x = torch.randn(1, 1, 5, 5)
    before = network(x)

    class Twice(Conv2d):
        algorithm = copy.copy(NaiveConv2d.algorithm)

        def _conv_forward(self, *inputs: Any) -> Tensor:
            return 2 * super()._conv_forward(*inputs)

    convert(network, Twice)
    torch.testing.assert_close(network(x), 2 * before)


def test_other_convolutions_are_reported() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.Sequential(nn.Conv3d(1, 1, 1))
    )
    message = "^not converted: Conv3d, ConvTranspose2d$"
    with pytest.warns(UserWarning, match=message) as warnings:
        convert(network, "im2col")
    assert warnings[0].filename == __file__
    assert [type(m).__name__ for m in network] == ["Im2colConv2d", "ConvTranspose2d", "Sequential"]


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class OnlySmall(nn.Conv2d):
    """A user's own: knows no groups, rejects large kernels, and calls itself by an attribute."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Any, bias: bool = True):
        if max(kernel_size) > 3:
            raise NotImplementedError("only up to 3x3\nand a second line")
        super().__init__(in_channels, out_channels, kernel_size, bias=bias)
        self.register_buffer("shift", torch.ones(()))
        self.compute = self.shifted

    def shifted(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias) + self.shift

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input)


def patched() -> nn.Module:
    conv = nn.Conv2d(1, 1, 1)
    conv.forward = lambda x: x
    return conv


class KeepsEvalMode(nn.Conv2d):
    def train(self, mode: bool = True) -> nn.Conv2d:
        return super().train(False)


class Versioned(nn.Conv2d):
    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None: ...


def moved_padding() -> nn.Module:
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    conv.padding = (0, 0)
    return conv


REJECTED: list[tuple[Callable[[], nn.Module], Any, str]] = [
    (lambda: nn.LazyConv2d(1, 1), "im2col", "is an nn.LazyConv2d without weights yet"),
    (lambda: Standardised(1, 1, 1), "im2col", "Standardised has its own forward"),
    (lambda: KeepsEvalMode(1, 1, 1), "im2col", "KeepsEvalMode has its own train"),
    (lambda: Versioned(1, 1, 1), "native", "Versioned has its own get_extra_state"),
    (moved_padding, "im2col", "its padding was changed"),
    (patched, "im2col", "Conv2d has its own forward"),
    (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1)),
        "im2col",
        r"is parametrized \(weight\)",
    ),
    (lambda: nn.Conv2d(1, 1, 5), OnlySmall, "only up to 3x3"),
    (lambda: nn.Conv2d(2, 2, 1, groups=2), OnlySmall, "unexpected keyword argument 'groups'"),
    (lambda: nn.Conv2d(1, 1, 1), partial(Im2colConv2d, stride=2), r"its stride \(2, 2\), not"),
    (lambda: nn.Conv2d(1, 1, 1), partial(Im2colConv2d, bias=False), "its bias False, not True"),
]


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(("make", "backend", "reason"), REJECTED)
def test_rejected_layers_are_named_and_nothing_is_changed(
    make: Callable[[], nn.Module], backend: Any, reason: str
) -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Sequential(make()), make())
    layers = list(network.modules())
    before = [(type(layer), dict(vars(layer))) for layer in layers]
    parameters = [(name, id(p)) for name, p in network.named_parameters()]
    with pytest.raises(ValueError, match=rf"^cannot convert (0|1\.0) to \w+, .*{reason}"):
        convert(network, backend)
    assert [(type(layer), dict(vars(layer))) for layer in layers] == before
    assert [(name, id(p)) for name, p in network.named_parameters()] == parameters


def test_user_class() -> None:
    class Third(nn.Conv2d):  # computes as its base class does
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels, 3)

    network = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), Third(2)).double()
    x = torch.randn(1, 1, 9, 9, dtype=torch.float64)
    before, weight = network(x), network[1].weight
    expected = network[1](network[0](x) + 1) + 1
    convert(network, OnlySmall)
    assert network[1].weight is weight
    torch.testing.assert_close(network(x), expected)
    assert network[0].shift.dtype == torch.float64
    with pytest.raises(ValueError, match=r"cannot convert 0 to .* OnlySmall has its own forward"):
        convert(network, "native")
    assert before.shape == expected.shape


def test_replaced_weight() -> None:
    conv = nn.Conv2d(3, 4, 3)
    conv.weight = nn.Parameter(conv.weight.detach().sum(1, keepdim=True))  # in_channels is still 3
    x = torch.randn(2, 1, 6, 6)
    before = conv(x)
    torch.testing.assert_close(convert(conv, "im2col")(x), before)


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("im2coll", ValueError, "backend='im2coll': choose from native, im2col, "),
        (nn.Linear, TypeError, "must be a name, a class derived from nn.Conv2d, or"),
        (partial(Im2colConv2d, 3), TypeError, "must be a name, a class derived from nn.Conv2d"),
        (nn.Conv2d(1, 1, 1), TypeError, "must be a name, a class derived from nn.Conv2d"),
    ],
)
def test_invalid_backend(backend: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        convert(nn.Conv2d(1, 1, 1), backend)
    assert message in str(raised.value)


def test_meta_device_and_network_without_convolutions() -> None:
    with torch.device("meta"):
        network = convert(nn.Sequential(nn.Conv2d(1, 2, 3)), "im2col")
    assert network[0].weight.is_meta
    assert network[0].bias.is_meta
    assert convert(nn.Sequential(nn.Linear(1, 1)), NativeConv2d)[0].weight.shape == (1, 1)
    with pytest.raises(TypeError, match=r"model: must be an nn\.Module, not list"):
        convert([nn.Conv2d(1, 1, 1)], "im2col")  # type: ignore[type-var]
