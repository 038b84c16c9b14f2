"""Residual networks against the paper's numbers and torchvision's residual block."""

import math
from typing import Any

import pytest
import torch
from conftest import Reject
from torch import nn
from torchvision.models.resnet import BasicBlock

from cnntrain.conv import BACKENDS
from cnntrain.models import ResNet, layer_graph, summarise
from cnntrain.models.layers import BatchNorm2d


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_parameters_of_the_paper(depth: int, millions: float) -> None:
    """Table 6; the identity shortcuts have none."""
    assert count(ResNet(depth=depth)) == pytest.approx(millions * 1e6, abs=5e3)


def test_parameters_by_hand() -> None:
    def stage(c: int, blocks: int, first: int) -> int:
        return 9 * first * c + (2 * blocks - 1) * 9 * c * c + 4 * blocks * c

    for n in (1, 3, 18):
        stages = stage(16, n, 16) + stage(32, n, 16) + stage(64, n, 32)
        assert count(ResNet(depth=6 * n + 2)) == 27 * 16 + 32 + stages + 65 * 10
    assert count(ResNet(depth=110)) == 1_727_962  # 1.7M
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert count(ResNet(shortcut="B")) == 269_722 + projections
    assert count(ResNet((1, 28, 28), 7, width=8, depth=8)) == (
        9 * 8 + 16 + stage(8, 1, 8) + stage(16, 1, 8) + stage(32, 1, 16) + 33 * 7
    )


class ZeroPadding(nn.Module):
    """Shortcut A by its definition: one position at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        y = x.new_zeros(n, 2 * c, math.ceil(h / 2), math.ceil(w / 2))
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                y[:, :c, i, j] = x[:, :, 2 * i, 2 * j]
        return y


def of_torchvision(shortcut: str, width: int, blocks: int) -> nn.Sequential:
    made: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    made += [nn.BatchNorm2d(width), nn.ReLU()]
    for c, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        for number in range(blocks):
            first = c // stride if number == 0 else c
            by, other = (stride if number == 0 else 1), None
            if by == 2:
                projection = nn.Conv2d(first, c, 1, stride=2, bias=False)
                other = nn.Sequential(projection, nn.BatchNorm2d(c))
                other = other if shortcut == "B" else ZeroPadding()
            made.append(BasicBlock(first, c, by, other))
    return nn.Sequential(*made, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 5))


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("backend", ["native", "im2col"])
def test_equals_torchvisions_blocks(shortcut: Any, backend: str) -> None:
    torch.manual_seed(0)
    conv = BACKENDS[backend]
    ours = ResNet((3, 9, 11), 5, conv=conv, depth=14, width=4, shortcut=shortcut)
    theirs = of_torchvision(shortcut, 4, 2)
    states = ours.state_dict(), theirs.state_dict()
    assert [t.shape for t in states[0].values()] == [t.shape for t in states[1].values()]
    theirs.load_state_dict(dict(zip(states[1], states[0].values(), strict=True)))
    images = torch.randn(4, 3, 9, 11)
    for mode in (True, False):
        found, expected = (n.train(mode)(images) for n in (ours, theirs))
        torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(n(images).square().sum(), [*n.parameters()]) for n in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 5, 3), (1, 1, 1), (4, 1, 30)])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_any_size(shape: tuple[int, int, int], shortcut: Any) -> None:
    network = ResNet(shape, 7, depth=8, width=3, shortcut=shortcut)
    for batch in (1, 2):
        logits = network.train()(torch.randn(batch, *shape))
        assert logits.shape == (batch, 7)
        logits.square().sum().backward()
    last = [row.shape for row in summarise(network, shape) if row.kind == "Conv2d"][-1]
    assert last == (12, *(math.ceil(size / 4) for size in shape[1:]))


def test_initial_weights_are_those_of_he() -> None:
    torch.manual_seed(0)
    network = ResNet(width=32, shortcut="B")
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fan_in = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.1)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(type(m) is BatchNorm2d for m in norms)
    assert len(norms) == 19 + 2


def test_shortcuts_in_the_graph() -> None:
    nodes = {node.name: node for node in layer_graph(ResNet(depth=8), (3, 32, 32))}
    assert nodes["blocks/1/shortcut._Subsample"].shape == (32, 16, 16)
    assert set(nodes["blocks/1/add"].inputs) == {
        "blocks/1/residual/4.BatchNorm2d",
        "blocks/1/shortcut._Subsample",
    }


@pytest.mark.parametrize(("depth", "allowed"), [(21, "20 or 26"), (3, "8 or 14"), (-4, "8 or 14")])
def test_depths(reject: Reject, depth: int, allowed: str) -> None:
    problems = reject("model=resnet", "data=fashion_mnist_mini", f"model.depth={depth}")
    assert problems == [f"  model.depth={depth}: must be 6n + 2, such as {allowed}"]
