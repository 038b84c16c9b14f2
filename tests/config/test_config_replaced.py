"""Replaced classes, interpolations, and --cfg of invalid configs."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import run_command
from omegaconf import OmegaConf

from cnntrain.config import ConfigError, compose

OWN = """
from torch import nn, optim

class Tiny(nn.Module):
    def __init__(self, conv, in_shape, num_classes, channels: int = 4, depth=1):
        super().__init__()
        self.layers = nn.Sequential(
            conv(in_shape[0], channels, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(4 * channels, num_classes),
        )

    def forward(self, images):
        return self.layers(images)

class Open(Tiny):
    def __init__(self, conv, in_shape, num_classes, **options):
        super().__init__(conv, in_shape, num_classes)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_classes.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


STEP = "torch.optim.lr_scheduler.StepLR"


@pytest.mark.parametrize(
    ("node", "overrides", "expected"),
    [
        # channels: [6, 16, 128] of lenet5 is no int; Tiny has no other option of it.
        ("model", ["model._target_=own_classes.Tiny"], {}),
        ("model", ["model={_target_: own_classes.Tiny}"], {}),
        ("model", ["+model={_target_:own_classes.Tiny,channels:8}"], {"channels": 8}),
        ("model", ["+model.depth=3", "model._target_=own_classes.Tiny"], {"depth": 3}),
        ("model", ["model._target_=own_classes.Open", "model=shallow"], {"channels": 16}),
        ("model", ["model={hidden: 3}", "model=lenet5"], {"hidden": 3}),
        (
            "optimizer",
            ["optimizer={_target_: torch.optim.SGD, lr: 0.1}"],
            {"_partial_": True, "lr": 0.1},
        ),
        (
            "scheduler",
            ["scheduler=none", f"scheduler={{_target_: {STEP}, step_size: 2}}"],
            {"_partial_": True, "step_size": 2},
        ),
        (
            "scheduler",
            [f"scheduler._target_={STEP}", "+scheduler.step_size=2"],
            {"_partial_": True, "step_size": 2},
        ),
        ("loss", ["loss={_target_: torch.nn.MultiMarginLoss}"], {}),
        ("data", ["data={_target_: cnntrain.data.Strokes}"], {}),
        (
            "optimizer",
            ["optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1"],
            {"_partial_": True, "lr": 0.1, "weight_decay": 0.0, "fused": True},
        ),
        ("backend", ["backend={_target_: torch.nn.Conv2d}"], {"_partial_": True}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_options_of_the_replaced_class(
    node: str, overrides: list[str], expected: dict[str, Any]
) -> None:
    found: Any = OmegaConf.to_container(compose(overrides)[node])
    assert found["_target_"] in str(overrides) or "hidden" in expected
    assert found.items() >= expected.items()
    if "Open" not in str(overrides) and "hidden" not in expected:
        assert found.keys() == {"_target_", *expected}


def test_replaced_in_a_file(tmp_path: Path) -> None:
    """Options that the file gives the new class are kept, invalid ones too."""
    (tmp_path / "experiment").mkdir()
    file = "# @package _global_\nmodel:\n  _target_: own_classes.Tiny\n  depth: 2\n"
    (tmp_path / "experiment/own.yaml").write_text(file)
    assert compose(["experiment=own"], extra=tmp_path).model == {
        "_target_": "own_classes.Tiny",
        "depth": 2,
    }
    (tmp_path / "experiment/own.yaml").write_text(file.replace("depth", "dept"))
    with pytest.raises(
        ConfigError, match=r"^model\.dept=2: own_classes\.Tiny has no option 'dept'"
    ):
        compose(["experiment=own"], extra=tmp_path)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model={_target_:own_classes.Tiny,dept:2}"], "model.dept=2: own_classes.Tiny has no opt"),
        (["model.hidden=3", "model._target_=own_classes.Tiny"], "model.hidden=3: own_classes.Tiny"),
        (
            ["model.depth=3", "model._target_=own_classes.Tiny"],
            "other options of own_classes.Tiny are added with +",
        ),
        (["model={hiden: 3}"], "model.hiden=3: cnntrain.models.LeNet5 has no option 'hiden'; did"),
        (
            ["+trainer.devices=[0]"],
            "trainer.devices=[0]: input should be a valid integer: the numb",
        ),
        (["+trainer.devices=-1"], "such as 1 or 2; to choose GPUs, set CUDA_VISIBLE_DEVICES=0,1"),
        (["+trainer.devices=auto"], "such as 1 or 2; to choose GPUs, set CUDA_VISIBLE_DEVICES=0,1"),
        (["trainer=ddp", "trainer.devices='0,1'"], "trainer.devices=0,1: input should be a valid"),
        (["+optimizer.amsgrad=maybe"], "optimizer.amsgrad=maybe: input should be a valid boolean"),
    ],
    ids=str,
)
def test_mistake(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert [expected in problem for problem in caught.value.problems] == [True], (
        caught.value.problems
    )


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LR", "3e-3")
    assert compose(["optimizer.lr='${oc.decode:${oc.env:LR}}'"]).optimizer.lr == 0.003
    with pytest.raises(ConfigError, match=r"optimizer\.lr=3e-3: input should be a valid number"):
        compose(["optimizer.lr=${oc.env:LR}"])


@pytest.mark.parametrize(
    ("arguments", "shown", "expected"),
    [
        (
            "--cfg job optimizer.lr=x model.dropuot=1",
            {"lr": "x"},
            ["model.dropuot"],
        ),
        (
            "--cfg all -p optimizer --resolve optimizer.lr=${oc.env:NOT_SET}",
            {"lr": "${oc.env:NOT_SET}"},
            ["--resolve: "],
        ),
        ("--cfg job -p optimizer --resolve optimizer.lr=${oc.env:LR}", {"lr": "3e-3"}, []),
        ("--cfg hydra sed=1", {"dir": "outputs/sweeps/${sweep.name}"}, ["sed=1"]),
        ("--cfg job -p nowhere", {}, ["--package=nowhere"]),
    ],
    ids=str,
)
def test_cfg_of_an_invalid_config(
    tmp_path: Path, arguments: str, shown: dict[str, Any], expected: list[str]
) -> None:
    done = run_command(["train", *arguments.split()], tmp_path, {**os.environ, "LR": "3e-3"})
    content = yaml.safe_load(done.stdout) or {}
    content = content.get("optimizer", content)
    content = content.get("hydra", {}).get("sweep", content)
    assert content.items() >= shown.items()
    first, *problems = done.stderr.splitlines() or [""]
    assert first == ("cnntrain: invalid configuration" if expected else "")
    assert [p.strip().startswith(s) for p, s in zip(problems, expected, strict=True)] == [
        True
    ] * len(expected)
    assert done.returncode == (2 if expected else 0)
