"""Pretrained weights in made files, against torchvision's own networks with these weights."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from conftest import Reject
from torch import Tensor, nn
from torchvision import models

from cnntrain.conv import BACKENDS
from cnntrain.models import TorchVision, deferred_weights, head

SQUEEZENET = {"name": "squeezenet1_1"}


def original(name: str, classes: int = 7, **options: Any) -> nn.Module:
    """A network of torchvision, with running statistics that are not those of the start."""
    torch.manual_seed(1)
    network = models.get_model(name, weights=None, num_classes=classes, **options)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.fixture(scope="module")
def squeezenet() -> nn.Module:
    return original("squeezenet1_1")


@pytest.fixture(scope="module")
def file(squeezenet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(squeezenet.state_dict(), path)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub, and no network connection."""

    def download(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@torch.no_grad()
def assert_same(found: nn.Module, expected: nn.Module, images: Tensor, given: Tensor) -> None:
    torch.testing.assert_close(found.eval()(images), expected(given), rtol=1e-4, atol=1e-4)


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "DataParallel": lambda state: {f"module.{name}": t for name, t in state.items()},
    "checkpoint": lambda state: {
        "state_dict": {f"network.network.{name}": t for name, t in state.items()}
    },
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_files_of_training_scripts(squeezenet: nn.Module, tmp_path: Path, wrapped: str) -> None:
    torch.save(WRAPPED[wrapped](squeezenet.state_dict()), tmp_path / "w.pth")
    made = TorchVision((3, 40, 40), 7, **SQUEEZENET, weights=str(tmp_path / "w.pth"))
    assert made.normalisation is None
    images = torch.rand(2, 3, 40, 40)
    assert_same(made, squeezenet, images, images)


def test_other_numbers_of_channels(squeezenet: nn.Module, file: Path) -> None:
    images = torch.rand(2, 3, 40, 40)
    grey = TorchVision((1, 40, 40), 7, **SQUEEZENET, weights=str(file), conv=BACKENDS["im2col"])
    assert_same(grey, squeezenet, images[:, :1], images[:, :1].expand(2, 3, 40, 40))
    six = TorchVision((6, 40, 40), 7, **SQUEEZENET, weights=str(file))
    assert_same(six, squeezenet, torch.cat([images, images], 1), images)
    two = TorchVision((2, 40, 40), 7, **SQUEEZENET, weights=str(file))
    kernels = squeezenet.features[0].weight[:, :2] * 1.5
    torch.testing.assert_close(two.network.features[0].weight, kernels)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_other_number_of_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    state = original(name, 1000).state_dict()
    torch.save(state, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO), deferred_weights():
        torch.manual_seed(3)
        made = TorchVision((3, 40, 40), 10, name=name, weights=str(tmp_path / "w.pth"))
        assert not caplog.messages
    initial = {key: t.clone() for key, t in made.network.state_dict().items()}
    with caplog.at_level(logging.INFO):
        made.load_initial_weights()
    layer = {"resnet18": "fc", "mobilenet_v3_small": "classifier.3"}.get(name, "classifier.1")
    assert caplog.messages == [f"head: {layer}, 1,000 -> 10 classes, newly initialised"]
    for key, tensor in made.network.state_dict().items():
        expected = initial if key.startswith(f"{layer}.") else state
        assert torch.equal(tensor, expected[key]), key


def test_head_is_the_last_layer() -> None:
    families = {
        "alexnet": "classifier.6",
        "densenet121": "classifier",
        "mnasnet0_5": "classifier.1",
        "shufflenet_v2_x0_5": "fc",
        "squeezenet1_1": "classifier.1",
        "swin_t": "head",
        "vit_b_16": "heads.head",
        "convnext_tiny": "classifier.2",
    }
    with torch.device("meta"):
        for name, expected in families.items():
            found, layer = head(models.get_model(name))
            assert (found, layer.weight.shape[0]) == (expected, 1000)  # type: ignore[union-attr,index]


def test_small_images_of_a_3x3_convolution(tmp_path: Path) -> None:
    """Its stride and the pooling change, no weight does."""
    torch.save(original("mobilenet_v3_small").state_dict(), tmp_path / "w.pth")
    weights = str(tmp_path / "w.pth")
    made = TorchVision(
        (3, 28, 28), 7, name="mobilenet_v3_small", small_images=True, weights=weights
    )
    assert torch.equal(
        made.network.features[0][0].weight, torch.load(weights)["features.0.0.weight"]
    )
    assert made.network.features[0][0].stride in (1, (1, 1))


def other_weights(kind: str, path: Path) -> None:
    state = {"conv1.weight": torch.zeros(8, 3, 7, 7), "more": torch.zeros(2)}
    contents: dict[str, Any] = {
        "other": state,
        "list": [1],
        "object": original,
        "nothing": {"lr": 1},
    }
    if kind in contents:
        torch.save(contents[kind], path)
    elif kind == "text":
        path.write_text("weights\n")
    elif kind == "cut":
        torch.save(original("squeezenet1_1").state_dict(), path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "missing",
            "there is no such file; squeezenet1_1 has the weights IMAGENET1K_V1, DEFAULT",
        ),
        (
            "other",
            "is of another network: features.0.weight is missing, features.0.bias is missing, "
            "features.3.squeeze.weight is missing and 51 more",
        ),
        ("list", "holds no state_dict, neither alone nor under the key state_dict or model"),
        ("nothing", "holds no state_dict, neither alone nor under the key state_dict or model"),
        ("object", r"cannot be read \(UnpicklingError\); it must be what torch.save.* writes"),
        ("text", r"cannot be read \(UnpicklingError\); it must be what torch.save.* writes"),
        ("cut", r"cannot be read \(RuntimeError\); it must be what torch.save.* writes"),
        ("folder", r"cannot be read \(IsADirectoryError\); it must be what torch.save.* writes"),
    ],
)
def test_unusable_files_are_reported_before_a_run(
    reject: Reject, tmp_path: Path, kind: str, message: str
) -> None:
    path = tmp_path / "w.pth"
    other_weights(kind, path)
    given = ["data=fashion_mnist_mini", "model=torchvision", "model.name=squeezenet1_1"]
    (problem,) = reject(*given, f"model.weights={path}")
    assert re.match(f"  model.weights={re.escape(str(path))}: {message}", problem), problem


def test_weights_of_another_shape(tmp_path: Path) -> None:
    torch.save(original("resnet18").state_dict(), tmp_path / "w.pth")
    options: dict[str, Any] = {"weights": str(tmp_path / "w.pth")}
    message = "conv1.weight is 64x3x7x7 there and 64x3x3x3 here; change model.small_images"
    with pytest.raises(ValueError, match=f"w.pth: is of another network: {message}$"):
        TorchVision((3, 28, 28), 7, name="resnet18", small_images=True, **options)
    message = "layer1.0.conv1.weight is 64x64x3x3 there and 64x64x1x1 here, .* and [0-9]+ more$"
    with pytest.raises(ValueError, match=f"is of another network: {message}"):
        TorchVision((3, 64, 64), 7, name="resnet50", **options)


def test_published_weights(hub: Path, tmp_path: Path) -> None:
    network = original("squeezenet1_1", 1000)
    torch.save(network.state_dict(), hub / "squeezenet1_1-b8a52dc0.pth")
    images = torch.rand(2, 3, 40, 40)
    for weights in ("IMAGENET1K_V1", "DEFAULT"):
        made = TorchVision((3, 40, 40), 1000, **SQUEEZENET, weights=weights)
        assert made.normalisation == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert_same(made, network, images, images)


def test_published_weights_without_a_connection(hub: Path, reject: Reject) -> None:
    given = ["data=fashion_mnist_mini", "model=torchvision", "model.weights=DEFAULT"]
    (problem,) = reject(*given)
    assert problem == (
        f"  model.weights=DEFAULT: resnet18-f37072fd.pth can be neither downloaded nor read from "
        f"{hub} (<urlopen error no route to host>); put it there, or take a local file, "
        "model.weights=<file>"
    )
    (hub / "resnet18-f37072fd.pth").write_bytes(b"half a file")
    (problem,) = reject(*given)
    assert problem.startswith("  model.weights=DEFAULT: resnet18-f37072fd.pth can be neither")
    with deferred_weights():  # as a finished run is loaded
        made = TorchVision(weights="DEFAULT")
    assert made.normalisation == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_googlenet_of_torchvision(hub: Path) -> None:
    """Its file has auxiliary classifiers, and it changes the normalisation of its images."""
    network = original("googlenet", 1000, init_weights=False, transform_input=True)
    torch.save(network.state_dict(), hub / "googlenet-1378be20.pth")
    made = TorchVision((3, 40, 40), 1000, name="googlenet", weights="DEFAULT")
    images = torch.rand(2, 3, 40, 40)
    imagenet = (
        torch.tensor(n)[:, None, None] for n in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    assert made.normalisation is not None
    mean, std = (torch.tensor(n)[:, None, None] for n in made.normalisation)
    other, scale = imagenet
    assert_same(made, network, (images - mean) / std, (images - other) / scale)


def test_densenet_with_the_names_of_2017(tmp_path: Path) -> None:
    network = original("densenet121")
    state = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): tensor
        for key, tensor in network.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "w.pth")
    made = TorchVision((3, 40, 40), 7, name="densenet121", weights=str(tmp_path / "w.pth"))
    images = torch.rand(2, 3, 40, 40)
    assert_same(made, network, images, images)


def test_versions_of_modules_are_kept(tmp_path: Path) -> None:
    network = original("mnasnet0_5")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    made = TorchVision((3, 40, 40), 7, name="mnasnet0_5", weights=str(tmp_path / "w.pth"))
    images = torch.rand(2, 3, 40, 40)
    assert_same(made, network, images, images)


def test_position_embeddings_are_interpolated(tmp_path: Path) -> None:
    """Tiny vision transformers; of a linear function the interpolation is exact."""

    def tiny(size: int) -> nn.Module:
        return models.VisionTransformer(size, 16, 1, 2, 8, 16, num_classes=7)

    given = tiny(48)
    grid = torch.arange(3.0).repeat_interleave(3)[:, None].expand(9, 8)  # the row
    given.encoder.pos_embedding.data[0, 1:] = grid
    torch.save(given.state_dict(), tmp_path / "w.pth")
    made = TorchVision((3, 80, 80), 7, **SQUEEZENET)
    made.name, made.network, made.weights = "vit_b_16", tiny(80), str(tmp_path / "w.pth")
    made.load_initial_weights()
    found = made.network.encoder.pos_embedding[0]
    assert torch.equal(found[0], given.encoder.pos_embedding[0, 0])
    rows = torch.linspace(0, 2, 5).repeat_interleave(5)[:, None].expand(25, 8)
    # Cubic interpolation repeats the border, so that only the centre is exact.
    torch.testing.assert_close(found[1:].reshape(5, 5, 8)[2], rows.reshape(5, 5, 8)[2])


def test_frozen_network(tmp_path: Path) -> None:
    torch.save(original("mobilenet_v3_small").state_dict(), tmp_path / "w.pth")
    weights = str(tmp_path / "w.pth")
    made = TorchVision((3, 40, 40), 7, name="mobilenet_v3_small", weights=weights, freeze=True)
    before = {key: t.clone() for key, t in made.state_dict().items()}
    images = torch.rand(4, 3, 40, 40)
    expected = made.eval()(images)
    logits = made.train()(images)
    assert made.training
    assert torch.equal(logits, expected)  # neither dropout nor statistics of the batch
    logits.square().sum().backward()
    named = dict(made.named_parameters())
    trained = {name for name, p in named.items() if p.requires_grad}
    assert trained == {"network.classifier.3.weight", "network.classifier.3.bias"}
    assert {name for name, p in named.items() if p.grad is not None} == trained
    assert all(torch.equal(before[key], t) for key, t in made.state_dict().items())
