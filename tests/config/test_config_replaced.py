"""Replaced classes, text of interpolations, --cfg of invalid configs, and locales."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
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
        # channels: [6, 16, 128] of lenet5 is no int, the others are not taken.
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
def test_options_of_the_class_that_was_replaced(
    node: str, overrides: list[str], expected: dict[str, Any]
) -> None:
    found: Any = OmegaConf.to_container(compose(overrides)[node])
    assert found["_target_"] in str(overrides) or "hidden" in expected
    assert found.items() >= expected.items()
    if "Open" not in str(overrides) and "hidden" not in expected:
        assert found.keys() == {"_target_", *expected}


def test_replaced_in_a_file(tmp_path: Path) -> None:
    """What the file itself says of the new class stays, a mistake included."""
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
    ("overrides", "said"),
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
def test_mistake(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert [said in problem for problem in caught.value.problems] == [True], caught.value.problems


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LR", "3e-3")
    assert compose(["optimizer.lr='${oc.decode:${oc.env:LR}}'"]).optimizer.lr == 0.003
    with pytest.raises(ConfigError, match=r"optimizer\.lr=3e-3: input should be a valid number"):
        compose(["optimizer.lr=${oc.env:LR}"])


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_command(["train", *arguments], folder, {**os.environ, **environment})


@pytest.mark.parametrize(
    ("arguments", "shown", "said"),
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
def test_cfg_shows_what_is_wrong_too(
    tmp_path: Path, arguments: str, shown: dict[str, Any], said: list[str]
) -> None:
    done = run(tmp_path, *arguments.split(), LR="3e-3")
    content = yaml.safe_load(done.stdout) or {}
    content = content.get("optimizer", content)
    content = content.get("hydra", {}).get("sweep", content)
    assert content.items() >= shown.items()
    first, *problems = done.stderr.splitlines() or [""]
    assert first == ("cnntrain: invalid configuration" if said else "")
    assert [p.strip().startswith(s) for p, s in zip(problems, said, strict=True)] == [True] * len(
        said
    )
    assert done.returncode == (2 if said else 0)


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run_in_c_locale(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cnntrain", "train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **C_LOCALE}
    pipes = {"capture_output": True, "text": True}
    return subprocess.run(command, cwd=folder, env=environment, timeout=300, **pipes)


def test_paths_beyond_ascii(tmp_path: Path) -> None:
    """In --config-dir, hydra.run.dir and resume."""
    (tmp_path / "ü/model").mkdir(parents=True)
    (tmp_path / "ü/model/mine.yaml").write_text("_target_: own_classes.Tiny\n")
    few = ["data=fashion_mnist_mini", "trainer=cpu", "trainer.max_epochs=1"]
    few += ["+trainer.limit_train_batches=1", "tensorboard=scalars", "hydra.run.dir=läufe/日本"]
    done = run_in_c_locale(tmp_path, "--config-dir", "ü", "model=mine", *few)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "läufe/日本/result.json").exists()
    done = run_in_c_locale(tmp_path, "resume=läufe/日本")
    assert (done.returncode, done.stdout[:17]) == (0, "already completed"), done.stderr
