"""Learning rates of backbone and head, and runs that start from pretrained weights."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Reject
from torch import Tensor, nn
from torchvision import models
from torturing.runs import differences, record

from cnntrain.config import ConfigError, compose
from cnntrain.inference import evaluate
from cnntrain.interruption import Interrupted, interruption
from cnntrain.models import LeNet5
from cnntrain.training import train
from cnntrain.training.building import build_run
from cnntrain.training.checkpoints import Checkpoints
from cnntrain.training.optim import Muon, build_optimizer

OPTIMIZERS = ["adam", "adamw", "sgd", "muon"]


def rates(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, float]:
    names = {p: name for name, p in network.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("scheduler", ["one_cycle", "triangle", "cosine"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_backbone_learning_rates(name: str, scheduler: str) -> None:
    """A tenth of those without the option, at every step of the schedule."""
    given = ["data=fashion_mnist_mini", f"optimizer={name}", f"scheduler={scheduler}"]
    usual, lower = (
        build_run(compose([*given, f"optimizer.backbone_lr_factor={factor}"]))[1]
        for factor in (1.0, 0.1)
    )
    pairs = [(module, *module.schedule(20)) for module in (usual, lower)]
    for _ in range(20):
        expected, found = (rates(optimizer, module.network) for module, optimizer, _ in pairs)
        assert len(expected) == 16
        assert found.keys() == expected.keys()
        for parameter, rate in expected.items():
            factor = 1 if parameter.startswith("classifier.3.") else 0.1
            assert found[parameter] == pytest.approx(factor * rate)
        for module, optimizer, schedule in pairs:
            for p in module.network.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            assert schedule is not None
            schedule["scheduler"].step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_default_has_the_groups_of_the_optimizer(name: str) -> None:
    module = build_run(compose(["data=fashion_mnist_mini", f"optimizer={name}"]))[1]
    found = module.schedule(20)[0].param_groups
    made = module.make_optimizer
    assert isinstance(made, functools.partial)
    assert made.keywords.pop("backbone_lr_factor") == 1
    expected = made(params=module.network.parameters()).param_groups
    assert len(found) == len(expected) == (2 if name == "muon" else 1)
    for group, other in zip(found, expected, strict=True):
        assert [*map(id, group["params"])] == [*map(id, other["params"])]


def test_steps_by_hand() -> None:
    torch.manual_seed(0)
    network = LeNet5(norm=False)
    before = copy.deepcopy(network.state_dict())
    make = functools.partial(torch.optim.SGD, lr=0.5, backbone_lr_factor=0.25)
    optimizer = build_optimizer(make, network)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.125]
    network(torch.randn(4, 1, 28, 28)).square().sum().backward()
    optimizer.step()
    for name, p in network.named_parameters():
        assert p.grad is not None
        rate = 0.5 if name.startswith("classifier.3.") else 0.125
        torch.testing.assert_close(p.detach(), before[name] - rate * p.grad)


def test_muon_of_a_single_trained_layer() -> None:
    network = LeNet5().requires_grad_(False)
    network.classifier[3].requires_grad_()
    optimizer = build_optimizer(Muon, network)
    assert [*map(id, optimizer.param_groups[0]["params"])] == [
        *map(id, network.classifier[3].parameters())
    ]
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("0", "input should be greater than 0"),
        ("fast", "input should be a valid number"),
        ("0.1", "only the last layer is trained; leave it out"),
    ],
)
def test_rejected_factors(reject: Reject, option: str, message: str) -> None:
    frozen = ["model=torchvision", "model.name=squeezenet1_1", "model.freeze=true"]
    given = f"optimizer.backbone_lr_factor={option}"
    assert reject("data=fashion_mnist_mini", *frozen, given) == [f"  {given}: {message}"]


def test_factor_of_an_optimizer_of_ones_own() -> None:
    given = ["data=fashion_mnist_mini", "optimizer._target_=torch.optim.RMSprop"]
    cfg = compose([*given, "optimizer.backbone_lr_factor=0.5"])
    assert [g["lr"] for g in build_run(cfg)[1].schedule(9)[0].param_groups] == pytest.approx(
        [cfg.optimizer.lr / 25, cfg.optimizer.lr / 50]
    )
    assert "backbone_lr_factor" not in compose(given).optimizer
    assert len(build_run(compose(given))[1].schedule(9)[0].param_groups) == 1
    with pytest.raises(ConfigError, match=r"optimizer.network=1: is decided by the program"):
        compose([*given, "+optimizer.network=1"])


TINY = [
    "data=fashion_mnist_mini",
    "data.batch_size=20",
    "data.val_size=100",
    "data.hflip=0.5",
    "model=torchvision",
    "model.name=mobilenet_v3_small",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.progress_bar=false",
    "trainer.gradient_clip_val=1.0",
    "trainer.log_every_n_steps=1",
    "+trainer.limit_train_batches=4",
    "+trainer.limit_test_batches=2",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pth"
    torch.save(models.mobilenet_v3_small(num_classes=5).state_dict(), path)
    return path


def final_weights(run: Path) -> dict[str, Tensor]:
    state = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("network.network."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "options",
    [
        ["model.freeze=true", "optimizer=adamw"],
        ["model.freeze=true", "optimizer=muon", "trainer.ema=0.9"],
        ["optimizer=muon", "optimizer.backbone_lr_factor=0.1"],
        ["optimizer=sgd", "optimizer.backbone_lr_factor=0.1", "trainer.ema=0.9"],
    ],
    ids=" ".join,
)
def test_run_from_weights(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """Interrupted and resumed without the file, evaluated without the file."""
    file = tmp_path / "w.pth"
    file.write_bytes(weights.read_bytes())
    cfg = compose([*TINY, *options, f"model.weights={file}"])
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(cfg, whole)
    log = (whole / "train.log").read_text()
    assert log.count("head: classifier.3, 5 -> 10 classes, newly initialised") == 1
    given, found = torch.load(file), final_weights(whole)
    grey = given["features.0.0.weight"].sum(1, keepdim=True)
    moved = [
        name
        for name, tensor in found.items()
        if not torch.equal(tensor, grey if name == "features.0.0.weight" else given[name])
    ]
    if "model.freeze=true" in options:
        assert moved == ["classifier.3.weight", "classifier.3.bias"]
    else:
        assert len(moved) > 100
        assert not torch.equal(
            found["features.0.1.running_mean"], given["features.0.1.running_mean"]
        )

    hook = Checkpoints.on_train_batch_end

    def stop(own: Any, trainer: Any, module: Any, *rest: Any) -> None:
        if trainer.global_step == 3 and file.exists():
            file.unlink()
            interruption.received = 15
        hook(own, trainer, module, *rest)

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", stop)
    with pytest.raises(Interrupted):
        train(cfg, resumed)
    train(cfg, resumed, resume=True)
    assert not file.exists()
    assert not list(differences(record(whole), record(resumed)))
    assert evaluate(resumed)
    with pytest.raises(ConfigError, match=r"w\.pth: there is no such file"):
        train(cfg, tmp_path / "other")
