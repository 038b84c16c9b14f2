"""A run that is interrupted and goes on ends with the bits of one that was not."""

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from cnntrain.config import ConfigError, compose
from cnntrain.interruption import Interrupted, interruption
from cnntrain.training import CheckpointError, checkpoint_file, train
from cnntrain.training.checkpoints import Checkpoints

# All that has a state: shuffling, augmentation, dropout, one-cycle, accumulation (with a last
# window that is not full), moving average, clipping, early stopping.
EVERYTHING = [
    "data=fashion_mnist_mini",
    "data.batch_size=100",
    "data.hflip=0.5",
    "data.crop=2",
    "data.erase=0.3",
    "optimizer.fused=false",
    "trainer.max_epochs=3",
    "trainer.accumulate_grad_batches=2",
    "trainer.ema=0.9",
    "trainer.early_stopping=5",
    "trainer.gradient_clip_val=1.0",
    "trainer.progress_bar=false",
    "trainer.log_every_n_steps=1",
    "+trainer.limit_train_batches=7",
    "seed=4",
]
STEPS = 4  # optimizer steps in an epoch: of 2, 2, 2 and 1 batches


def record(directory: Path) -> dict[str, Any]:
    """All that two equal runs have in common, bit for bit."""
    checkpoint = checkpoint_file.read(directory / "checkpoints/last.ckpt")
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    result = json.loads((directory / "result.json").read_text())
    kept = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")
    kept += ("lr_schedulers", "loops", "generators", "best", "position")
    return {
        **{name: checkpoint[name] for name in kept if name in checkpoint},
        "best.ckpt": checkpoint_file.read(directory / "checkpoints/best.ckpt"),
        "metrics.csv": (directory / "metrics.csv").read_bytes(),
        "scalars": {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if tag != "images_per_second"
        },
        "result": {key: result.get(key) for key in ("status", "metrics", "epochs", "tested_epoch")},
    }


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Where two records differ in a bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = (
            a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        )
        if not same:
            yield where
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from differences(a.get(key), b.get(key), f"{where}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{where}/{i}")
    elif a != b and not (a != a and b != b):
        yield f"{where}: {a!r} != {b!r}"[:200]


class Stops:
    """Lets SIGTERM seem to come at given moments: (`train`, step) or (`val`, epoch)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.wanted: list[tuple[str, int]] = []
        train_hook, val_hook = Checkpoints.on_train_batch_end, Checkpoints.on_validation_batch_end

        def on_train_batch_end(own: Any, trainer: Any, module: Any, *rest: Any) -> None:
            self._come("train", trainer.global_step)
            train_hook(own, trainer, module, *rest)

        def on_validation_batch_end(own: Any, trainer: Any, module: Any, *rest: Any) -> None:
            self._come("val", trainer.current_epoch)
            val_hook(own, trainer, module, *rest)

        monkeypatch.setattr(Checkpoints, "on_train_batch_end", on_train_batch_end)
        monkeypatch.setattr(Checkpoints, "on_validation_batch_end", on_validation_batch_end)

    def _come(self, stage: str, count: int) -> None:
        if (stage, count) in self.wanted:
            self.wanted.remove((stage, count))
            interruption.received = 15


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Stops:
    return Stops(monkeypatch)


def go(directory: Path, *options: str, **how: Any) -> int:
    """Train, again after every interruption; how often that was."""
    interruptions = 0
    while True:
        random.seed(interruptions)  # what is drawn before a resume has no say in it
        np.random.seed(interruptions)  # noqa: NPY002
        try:
            train(compose([*EVERYTHING, *options]), directory, resume=True, **how)
            return interruptions
        except Interrupted:
            interruptions += 1
            status = json.loads((directory / "result.json").read_text())["status"]
            assert status == "interrupted"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    train(compose(EVERYTHING), directory)
    return directory


@pytest.mark.parametrize(
    "moments",
    [[("train", step)] for step in range(1, 3 * STEPS + 1)]
    + [[("val", 0)], [("val", 1)], [("val", 2)]]
    + [[("train", 1), ("train", 2), ("train", 4), ("val", 0), ("train", 5), ("val", 2)]],
    ids=str,
)
def test_interrupted_anywhere(
    undisturbed: Path, stops: Stops, tmp_path: Path, moments: list[tuple[str, int]]
) -> None:
    stops.wanted = list(moments)
    assert go(tmp_path / "run") == len(moments)
    assert not list(differences(record(undisturbed), record(tmp_path / "run")))
