"""Networks of torchvision on the backends, against counts derived by hand, and a run."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cnntrain.config import ConfigError, as_config_error, build, compose
from cnntrain.conv import BACKENDS
from cnntrain.models import TorchVision
from cnntrain.training import train


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]


def plane(network: nn.Module, layer: nn.Module, images: torch.Tensor) -> tuple[int, ...]:
    """Height and width of the output of a layer."""
    found: list[tuple[int, ...]] = []
    handle = layer.register_forward_hook(lambda m, i, y: found.append(tuple(y.shape[2:])))
    network.eval()(images)
    handle.remove()
    return found[0]


RESNET18 = 11_689_512  # torchvision's own count, 3 channels, 1000 classes


def test_resnet18_has_the_parameters_of_torchvision() -> None:
    assert count(TorchVision((3, 32, 32), 1000)) == RESNET18
    head = (512 + 1) * (1000 - 10)
    assert count(TorchVision()) == RESNET18 - head - 64 * 2 * 49
    small = TorchVision((5, 28, 28), 10, small_images=True)
    assert count(small) == RESNET18 - head - 64 * (3 * 49 - 5 * 9)


def test_stem_of_a_resnet() -> None:
    images = torch.zeros(1, 1, 28, 28)
    usual, small = TorchVision().network, TorchVision(small_images=True).network
    assert plane(usual, usual.layer1, images) == (7, 7)
    assert plane(small, small.layer1, images) == (28, 28)
    assert small.conv1.kernel_size == (3, 3)
    assert isinstance(small.maxpool, nn.Identity)


def test_adapted_stem_keeps_the_scale_of_its_outputs() -> None:
    torch.manual_seed(0)
    for shape, small, fan_in in [((1, 28, 28), False, 49), ((8, 32, 32), True, 72)]:
        weight = TorchVision(shape, small_images=small).network.conv1.weight
        # He et al. 2015 with fan_out 64 * 49, which is what torchvision draws, for fan_in 3 * 49.
        expected = math.sqrt(2 / (64 * 49)) * math.sqrt(3 * 49 / fan_in)
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    assert not TorchVision(name="squeezenet1_1").network.features[0].bias.any()  # as its others


# Height and width of the last convolution's output for 28x28 with `small_images`, for one network
# of each family: derived from the strides after the first convolution.
FAMILIES = {
    "alexnet": 13,
    "convnext_tiny": 3,
    "densenet121": 3,
    "efficientnet_b0": 2,
    "googlenet": 4,
    "mnasnet0_5": 2,
    "mobilenet_v3_small": 2,
    "regnet_x_400mf": 2,
    "shufflenet_v2_x0_5": 4,
    "squeezenet1_1": 7,
    "swin_t": 28,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_take_small_images(name: str) -> None:
    torch.manual_seed(0)
    made = TorchVision((1, 28, 28), 7, conv=BACKENDS["im2col"], name=name, small_images=True)
    planes: list[tuple[int, ...]] = []
    for layer in made.modules():
        if isinstance(layer, nn.Conv2d):
            assert type(layer) is BACKENDS["im2col"]
            layer.register_forward_hook(lambda m, i, y: planes.append(tuple(y.shape[2:])))
    logits = made.train()(torch.randn(2, 1, 28, 28))
    assert logits.shape == (2, 7)
    assert planes[0] == (28, 28)
    assert planes[-1] == (FAMILIES[name],) * 2


def test_backends_start_from_the_same_weights() -> None:
    states = []
    for conv in (nn.Conv2d, *BACKENDS.values()):
        torch.manual_seed(4)
        made = TorchVision((2, 32, 32), conv=conv, name="shufflenet_v2_x0_5")
        states.append(made.state_dict())
        assert all(layer.training for layer in made.modules())
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"name": "resnet19"}, r"^model.name=resnet19: .* no such .*; choose from resnet1"),
    ({"name": "Zz"}, r"^model.name=Zz: .* no such .*; choose from alexnet, .*, wide_resnet50_2$"),
    (
        {"name": "alexnet"},
        r"^model.name=alexnet: .* 1x28x28 \(.*\); try model.small_images=true$",
    ),
    ({"name": "vit_b_16"}, r"^model.name=vit_b_16: .* 1x28x28 \(.*indivisible by patch size!\)$"),
    ({"name": "maxvit_t"}, r"^model.name=maxvit_t: .* 1x28x28 \(Input size .* not divisible"),
    (
        {"name": "vit_b_16", "small_images": True},
        r"^model.name=vit_b_16: does not take images of shape 1x28x28",
    ),
    ({"name": "resnet18", "conv": lambda *sizes: None}, r"^model: backend=<function .* must be"),
]


@pytest.mark.parametrize(("options", "message"), REJECTED)
def test_errors_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised, as_config_error("model"):
        TorchVision(**options)
    (problem,) = raised.value.problems
    assert re.search(message, problem), problem


def test_checkpoint_of_a_run_on_another_backend(tmp_path: Path) -> None:
    """Trained and tested on im2col; native has the same loss with the same weights."""
    model = ["model=torchvision", "model.name=shufflenet_v2_x0_5", "data=fashion_mnist_mini"]
    few = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "tensorboard=scalars"]
    cfg = compose([*model, *few, "backend=im2col", "trainer=cpu", "data.batch_size=16"])
    result = train(cfg, tmp_path / "run")
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "completed"
    data = build(cfg.data)
    saved = torch.load(result.directory / "checkpoints/best.ckpt", weights_only=True)
    state = {k.removeprefix("network."): v for k, v in saved["state_dict"].items()}
    native = TorchVision(name="shufflenet_v2_x0_5", conv=BACKENDS["native"])
    native.load_state_dict(state)
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(native.eval()(x), y, reduction="sum").item()
            for x, y in data.test_loader()
        ]
    assert sum(losses) / 1000 == pytest.approx(result.metrics["test/loss"], rel=1e-4)
