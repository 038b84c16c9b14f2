"""Every argument of Lightning's trainer: what Lightning documents, or rejected."""

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from cnntrain.commands.app import build_problems
from cnntrain.config import CONF, ConfigError, compose
from cnntrain.config.nodes import TRAINER_GIVEN
from cnntrain.interruption import Interrupted, interruption
from cnntrain.training import train
from cnntrain.training.building import dry_run
from cnntrain.training.checkpoint_file import read

FILES = [OmegaConf.load(CONF / "trainer" / f"{name}.yaml") for name in ("auto", "ddp")]
ACCEPTED = {
    "min_epochs",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "overfit_batches",
    "gradient_clip_algorithm",
    "benchmark",
    "inference_mode",
    "sync_batchnorm",
}
VALUES = {
    "max_time": "00:00:10:00",
    "profiler": "simple",
    "strategy": "ddp",
    "val_check_interval": 0.5,
    "callbacks": [],
    "plugins": [],
}
# 9 training batches of 500 images, and 5 validation batches and 10 test batches of 100.
RUN = [
    "data=fashion_mnist_mini",
    "data.batch_size=500",
    "data.eval_batch_size=100",
    "model=shallow",
    "optimizer.fused=false",
    "tensorboard=scalars",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.progress_bar=false",
]
EPOCH = [500] * 9, [100] * 5


class Seen(lightning.Callback):
    """Records the batches, and stops the run after `stop` optimizer steps."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.train: list[list[Tensor]] = []  # the labels of each batch, of each epoch
        self.val: list[list[int]] = []  # sizes
        self.test: list[int] = []
        self.inference: set[bool] = set()  # in the test: Lightning does not use it while fitting
        self.benchmark: set[bool] = set()
        self.update = 0.0  # the largest of any weight
        self.before: list[Tensor] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.train.append([])

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.train[-1].append(batch[1])
        self.before = [p.detach().clone() for p in module.parameters()]
        self.benchmark.add(torch.backends.cudnn.benchmark)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        changes = zip(module.parameters(), self.before, strict=True)
        self.update = max(self.update, *(float((p.detach() - b).abs().max()) for p, b in changes))
        if trainer.global_step == self.stop:
            interruption.received = 15

    def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
        self.val.append([])

    def on_validation_batch_end(
        self, trainer: Any, module: Any, out: Any, batch: Any, *_: Any
    ) -> None:
        self.val[-1].append(len(batch[1]))

    def on_test_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, *_: Any) -> None:
        self.test.append(len(batch[1]))
        self.inference.add(torch.is_inference_mode_enabled())


def run(directory: Path, *options: str) -> Seen:
    train(compose([*RUN, *options]), directory, callbacks=[seen := Seen()])
    return seen


def sizes(epochs: list[list[Tensor]]) -> list[list[int]]:
    return [[len(labels) for labels in epoch] for epoch in epochs]


def test_every_argument_is_given_accepted_or_rejected() -> None:
    arguments = set(inspect.signature(lightning.Trainer).parameters)
    given = {str(key) for file in FILES for key in file} & arguments
    rejected = set(TRAINER_GIVEN) & arguments
    assert given | ACCEPTED | rejected == arguments
    assert not given & ACCEPTED | given & rejected | ACCEPTED & rejected


@pytest.fixture(scope="module")
def problems() -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose([f"+trainer.{name}={VALUES.get(name, 1)}" for name in TRAINER_GIVEN])
    return caught.value.problems


@pytest.mark.parametrize("name", TRAINER_GIVEN)
def test_rejected_argument(name: str, problems: list[str]) -> None:
    (problem,) = (p for p in problems if p.startswith(f"trainer.{name}="))
    assert problem.endswith(f": is decided by the program; {TRAINER_GIVEN[name]}")
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("trainer.fast_dev_run=true", "trainer.fast_dev_run=true: is decided by the program; "),
        (
            "+trainer.overfit_batches=1 +trainer.limit_val_batches=2",
            "trainer.limit_val_batches=2: trainer.overfit_batches sets it",
        ),
        ("+trainer.gradient_clip_algorithm=value", "add trainer.gradient_clip_val=1"),
        ("+trainer.benchmark=true trainer.deterministic=true", "leave one of them out"),
        ("+trainer.overfit_batches=0.15", "less than one of 5 val batches"),
        ("+trainer.overfit_batches=-1", "trainer: You have passed invalid value -1"),
        ("+trainer.limit_train_batches=1.5", "trainer: You have passed invalid value 1.5"),
        ("+trainer.limit_val_batches=true", "trainer.limit_val_batches=true"),
        (
            "+trainer.gradient_clip_algorithm=foo trainer.gradient_clip_val=1",
            "trainer: `gradient_clip_algorithm` foo is invalid",
        ),
    ],
)
def test_rejected_value(options: str, expected: str) -> None:
    try:
        problems = build_problems(compose([*RUN, *options.split()]), dry_run)
    except ConfigError as error:
        problems = error.problems
    assert [expected in problem for problem in problems] == [True], problems


def test_limits(tmp_path: Path) -> None:
    options = ["limit_train_batches=0.25", "limit_val_batches=2", "limit_test_batches=3"]
    seen = run(tmp_path / "run", *(f"+trainer.{option}" for option in options))
    assert sizes(seen.train) == [[500] * 2] * 2  # int(0.25 * 9)
    assert seen.val == [[100] * 2] * 2
    assert seen.test == [100] * 3
    assert seen.inference == {True}
    assert not torch.equal(seen.train[0][0], seen.train[1][0])


@pytest.mark.parametrize(("value", "train_batches", "val_batches"), [("2", 2, 2), ("0.5", 4, 2)])
def test_overfit_batches(tmp_path: Path, value: str, train_batches: int, val_batches: int) -> None:
    seen = run(tmp_path / "run", f"+trainer.overfit_batches={value}")
    first, second = seen.train
    assert sizes(seen.train) == [[500] * train_batches] * 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert seen.val == [[100] * val_batches] * 2
    assert seen.test == [100] * 10


def test_min_epochs(tmp_path: Path) -> None:
    """Without it the run ends after the first epoch that is no better than the one before."""
    still = ["optimizer.lr=1e-30", "trainer.max_epochs=9", "trainer.early_stopping=1"]
    few = "+trainer.limit_train_batches=1"
    assert len(run(tmp_path / "without", *still, few).train) == 2
    assert len(run(tmp_path / "with", *still, few, "+trainer.min_epochs=4").train) == 4


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clip_algorithm(tmp_path: Path, algorithm: str) -> None:
    """Plain SGD with a learning rate of 1 changes a weight by its gradient."""
    seen = run(
        tmp_path / "run",
        "scheduler=none",
        "optimizer=sgd",
        "optimizer.lr=1",
        "optimizer.momentum=0",
        "optimizer.nesterov=false",
        "optimizer.weight_decay=0",
        "trainer.gradient_clip_val=0.001",
        f"+trainer.gradient_clip_algorithm={algorithm}",
        "+trainer.limit_train_batches=2",
    )
    largest = {"value": 0.001}.get(algorithm)
    assert seen.update == pytest.approx(largest, rel=1e-3) if largest else 0 < seen.update < 0.001


def test_other_arguments(tmp_path: Path) -> None:
    before = torch.backends.cudnn.benchmark
    options = ["inference_mode=false", "benchmark=true", "sync_batchnorm=true"]
    try:
        seen = run(tmp_path / "run", *(f"+trainer.{option}" for option in options))
    finally:
        torch.backends.cudnn.benchmark = before
    assert (sizes(seen.train), seen.val) == ([EPOCH[0]] * 2, [EPOCH[1]] * 2)
    assert (seen.inference, seen.benchmark) == ({False}, {True})


@pytest.mark.parametrize(
    ("options", "stop"),
    [
        (["+trainer.overfit_batches=3", "+trainer.inference_mode=false"], 5),
        ([
            "+trainer.limit_train_batches=3",
            "+trainer.limit_val_batches=1",
            "+trainer.limit_test_batches=1",
            "trainer.gradient_clip_val=0.01",
            "+trainer.gradient_clip_algorithm=value",
            "+trainer.min_epochs=2",
            "trainer.early_stopping=1",
            "optimizer.lr=1e-30",
            "trainer.max_epochs=3",
        ], 2),
    ],
    ids=["overfit", "limits"],
)  # fmt: skip
def test_interrupted_and_resumed(tmp_path: Path, options: list[str], stop: int) -> None:
    cfg = compose([*RUN, *options])
    train(cfg, tmp_path / "whole")
    whole = read(tmp_path / "whole/checkpoints/last.ckpt")
    with pytest.raises(Interrupted):
        train(cfg, tmp_path / "resumed", callbacks=[Seen(stop)])
    train(cfg, tmp_path / "resumed", resume=True)
    resumed = read(tmp_path / "resumed/checkpoints/last.ckpt")
    assert resumed["position"] == whole["position"]
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name]), name
