"""Networks against counts and formulas derived by hand."""

import functools
import math
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from cnntrain.conv import BACKENDS
from cnntrain.models import LeNet5, Shallow, layer_table, summarise
from cnntrain.models.layers import BatchNorm2d, MapSize


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_lenet5_has_65886_parameters() -> None:
    convolutions = (25 + 1) * 6 + (6 * 25 + 1) * 16 + (16 * 25 + 1) * 128
    norms = 2 * (6 + 16 + 128)
    connected = (128 + 1) * 84 + (84 + 1) * 10
    assert count(LeNet5()) == convolutions + norms + connected == 65_886
    assert count(LeNet5(norm=False)) == 65_886 - norms
    assert count(LeNet5(channels=(3, 4, 5), hidden=7)) == (
        26 * 3 + (3 * 25 + 1) * 4 + (4 * 25 + 1) * 5 + 2 * 12 + 6 * 7 + 8 * 10
    )


def test_lenet5_layers_in_order() -> None:
    kinds = [type(m).__name__ for m in LeNet5().modules() if not list(m.children())]
    block = ["Conv2d", "BatchNorm2d"]
    head = ["Tanh", "Flatten", "Linear", "Dropout", "Tanh", "Linear"]
    assert kinds == [*block, "MaxPool2d", "Tanh"] * 2 + [*block, *head]


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu", "leaky_relu"])
def test_lenet5_is_convolution_norm_activation_pooling(activation: Any, pooling: Any) -> None:
    torch.manual_seed(0)
    network = LeNet5(activation=activation, pooling=pooling, dropout=0)
    functions = {"leaky_relu": nn.functional.leaky_relu}
    act = functions.get(activation) or getattr(torch, activation)
    pool = nn.functional.max_pool2d if pooling == "max" else nn.functional.avg_pool2d
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    images = torch.randn(8, 1, 28, 28)
    x = images
    for conv, norm in zip(convolutions, norms, strict=True):
        x = act(norm(conv(x)))
        x = pool(x, 2) if x.shape[-1] > 1 else x
    expected = linear[1](act(linear[0](x.flatten(1))))
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(expected.square().sum(), parameters)
    logits = network(images)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(
        torch.autograd.grad(logits.square().sum(), parameters), gradients, rtol=1e-4, atol=1e-4
    )


def test_lenet5_options() -> None:
    network = LeNet5(activation="leaky_relu", pooling="avg", dropout=0.25, norm=False)
    kinds = [type(m).__name__ for m in network.modules() if not list(m.children())]
    assert kinds.count("LeakyReLU") == 4
    assert kinds.count("AvgPool2d") == 2
    assert "BatchNorm2d" not in kinds
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.25]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("network", [LeNet5, Shallow])
def test_any_batch_shape_and_class_count(network: Any, name: str) -> None:
    torch.manual_seed(0)
    for shape, classes, batch in [((1, 28, 28), 10, 1), ((3, 32, 30), 7, 2), ((2, 40, 44), 3, 1)]:
        made = network(shape, classes, conv=BACKENDS[name])
        for mode in (True, False):
            logits = made.train(mode)(torch.randn(batch, *shape))
            assert logits.shape == (batch, classes)
            logits.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in made.parameters())
        assert all(type(m) is BACKENDS[name] for m in made.modules() if isinstance(m, nn.Conv2d))


SIZES = [(1, 1, 1), (2, 1, 9), (1, 2, 3), (3, 5, 4), (1, 8, 8), (1, 20, 20), (3, 64, 64)]


@pytest.mark.parametrize("network", [LeNet5, Shallow])
@pytest.mark.parametrize("shape", [*SIZES, (3, 37, 224)])
def test_any_size(network: Any, shape: tuple[int, int, int]) -> None:
    made = network(shape, 4)
    for batch in (1, 2):
        logits = made.train()(torch.randn(batch, *shape))
        assert logits.shape == (batch, 4)
        logits.square().sum().backward()
    assert count(made) < 300_000


def test_28x28_is_not_changed() -> None:
    """The same random numbers and the same function as written out."""
    torch.manual_seed(5)
    lenet, shallow = LeNet5(), Shallow()
    torch.manual_seed(5)
    layers = [nn.Conv2d(1, 6, 5, padding=2), nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Tanh()]
    layers += [nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.MaxPool2d(2), nn.Tanh()]
    layers += [nn.Conv2d(16, 128, 5), nn.BatchNorm2d(128), nn.Tanh(), nn.Flatten()]
    layers += [nn.Linear(128, 84), nn.Dropout(0.3), nn.Tanh(), nn.Linear(84, 10)]
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.zeros_(layer.bias)
            nn.init.xavier_uniform_(layer.weight)
    flat = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2704, 10)]
    images = torch.randn(3, 1, 28, 28)
    for found, expected in ((lenet, nn.Sequential(*layers)), (shallow, nn.Sequential(*flat))):
        for p, q in zip(found.parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q)
        assert torch.equal(found.eval()(images), expected.eval()(images))


@pytest.mark.parametrize(
    ("shape", "kernels", "flat"),
    [
        ((1, 28, 28), [(5, 5), (5, 5), (5, 5)], 128),
        ((1, 32, 30), [(5, 5), (5, 5), (5, 5)], 128 * 2 * 1),
        ((1, 20, 9), [(5, 5), (5, 4), (3, 1)], 128),  # 20x9, 10x4, 6x1, 3x1
        ((1, 2, 1), [(5, 5), (1, 1), (1, 1)], 128),
        ((1, 44, 40), [(5, 5), (5, 5), (5, 5)], 128 * 3 * 4),  # of 5x4 maps
        ((1, 224, 224), [(5, 5), (5, 5), (5, 5)], 128 * 4 * 4),
    ],
)
def test_lenet5_kernels_of_any_size(
    shape: tuple[int, int, int], kernels: list[tuple[int, int]], flat: int
) -> None:
    network = LeNet5(shape)
    found = [m.kernel_size for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert found == kernels
    assert network.classifier[0].in_features == flat


def test_maps_of_large_images_are_averaged() -> None:
    """Each of 3x4 positions is the mean of the positions of the map that it covers."""
    maps = MapSize((5, 11))
    (pool,) = maps.limit(4)
    values = torch.rand(1, 2, 5, 11)
    rows, columns = ((0, 2), (2, 4), (4, 5)), ((0, 3), (3, 6), (6, 9), (9, 11))
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            mean = values[:, :, top:bottom, left:right].mean((2, 3))
            torch.testing.assert_close(pool(values)[:, :, i, j], mean)
    assert pool(values).shape == (1, 2, 3, 4)
    assert not MapSize((4, 1)).limit(4)


def test_dilated_convolutions_need_larger_images() -> None:
    conv = functools.partial(nn.Conv2d, dilation=3)
    with pytest.raises(ValueError, match=r"images of shape \(1, 20, 20\) do not fit"):
        LeNet5((1, 20, 20), conv=conv)


def test_xavier_uniform_bounds() -> None:
    torch.manual_seed(0)
    network = LeNet5()
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            window = math.prod(layer.weight.shape[2:])
            fans = window * (layer.weight.shape[0] + layer.weight.shape[1])
            bound = math.sqrt(6 / fans)
            largest = layer.weight.abs().max().item()
            assert 0.9 * bound < largest <= bound
            assert not layer.bias.any()


def test_default_init_is_that_of_pytorch() -> None:
    torch.manual_seed(3)
    network = LeNet5(init="default", norm=False)
    torch.manual_seed(3)
    expected = nn.Conv2d(1, 6, 5, padding=2)
    assert torch.equal(network.features[0].weight, expected.weight)


def test_batch_norm_of_a_single_value() -> None:
    norm = BatchNorm2d(2).train()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    out = norm(torch.tensor([3.0, 5.0]).reshape(1, 2, 1, 1)).flatten()
    expected = [(3 - 1) / math.sqrt(4 + 1e-5), (5 - 2) / math.sqrt(9 + 1e-5)]
    assert out.tolist() == pytest.approx(expected)
    assert norm.running_mean.tolist() == [1.0, 2.0]
    x = torch.randn(4, 2, 3, 3)
    assert torch.equal(norm(x), nn.BatchNorm2d(2).train()(x))


def test_layer_table_counts_macs() -> None:
    rows = {row.name: row for row in summarise(LeNet5(conv=BACKENDS["im2col"]), (1, 28, 28))}
    assert [rows[f"features.{i}"].macs for i in (0, 4, 8)] == [
        5 * 5 * 1 * 6 * 28 * 28,
        5 * 5 * 6 * 16 * 10 * 10,
        5 * 5 * 16 * 128 * 1 * 1,
    ]
    assert rows["features.3"].shape == (6, 14, 14)
    assert rows["features.8"].kind == "Im2colConv2d"
    assert rows["classifier.0"].macs == 128 * 84
    text = Console(width=100, file=None, record=True, quiet=False)
    with text.capture() as captured:
        text.print(layer_table(LeNet5(conv=BACKENDS["im2col"]), (1, 28, 28)))
    last = captured.get().strip().splitlines()[-1].split()
    assert last == ["total", "65,886", f"{117_600 + 240_000 + 51_200 + 10_752 + 840:,}"]
    assert captured.get().count("Im2colConv2d") == 3


def test_layer_table_counts_groups() -> None:
    network = nn.Sequential(nn.Conv2d(8, 16, (3, 5), stride=2, groups=4))
    assert summarise(network, (8, 9, 11))[0].macs == 3 * 5 * 8 // 4 * 16 * 4 * 4
