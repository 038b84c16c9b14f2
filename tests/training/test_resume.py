"""Bitwise resume: an interrupted and resumed run equals one that was not interrupted."""

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torturing.runs import differences, record

from cnntrain.config import ConfigError, compose, flat
from cnntrain.config.resume import read_result, run_config, run_options, with_overrides
from cnntrain.interruption import Interrupted, interruption
from cnntrain.training import CheckpointError, checkpoint_file, train
from cnntrain.training.checkpoints import Checkpoints

# All that has a state: shuffling, augmentation, dropout, one-cycle, accumulation (with a last
# window that is not full), moving average, clipping, early stopping.
EVERYTHING = [
    "data=fashion_mnist_mini",
    "data.batch_size=20",
    "data.val_size=100",
    "data.hflip=0.5",
    "data.crop=2",
    "data.erase=0.3",
    "data.eval_batch_size=20",
    "optimizer.fused=false",
    "trainer.max_epochs=3",
    "trainer.accumulate_grad_batches=2",
    "trainer.ema=0.9",
    "trainer.early_stopping=5",
    "trainer.gradient_clip_val=1.0",
    "trainer.progress_bar=false",
    "trainer.log_every_n_steps=1",
    "+trainer.limit_train_batches=7",
    "+trainer.limit_test_batches=5",
    "seed=4",
]
STEPS = 4  # optimizer steps in an epoch: of 2, 2, 2 and 1 batches


class Stops:
    """Simulates SIGTERM at given moments: (`train`, step), (`val`, validation batch)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.wanted: list[tuple[str, int]] = []
        self.validated = 0
        train_hook, val_hook = Checkpoints.on_train_batch_end, Checkpoints.on_validation_batch_end

        def on_train_batch_end(own: Any, trainer: Any, module: Any, *rest: Any) -> None:
            self._signal("train", trainer.global_step)
            train_hook(own, trainer, module, *rest)

        def on_validation_batch_end(own: Any, trainer: Any, module: Any, *rest: Any) -> None:
            self.validated += 1
            self._signal("val", self.validated)
            val_hook(own, trainer, module, *rest)

        monkeypatch.setattr(Checkpoints, "on_train_batch_end", on_train_batch_end)
        monkeypatch.setattr(Checkpoints, "on_validation_batch_end", on_validation_batch_end)

    def _signal(self, stage: str, count: int) -> None:
        if (stage, count) in self.wanted:
            self.wanted.remove((stage, count))
            interruption.received = 15


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Stops:
    return Stops(monkeypatch)


def train_until_completed(directory: Path, *options: str, **how: Any) -> int:
    """Train, resuming after each interruption. Returns the number of interruptions."""
    interruptions = 0
    while True:
        random.seed(interruptions)  # numbers drawn before a resume have no effect
        np.random.seed(interruptions)  # noqa: NPY002
        try:
            train(compose([*EVERYTHING, *options]), directory, resume=True, **how)
            return interruptions
        except Interrupted:
            interruptions += 1
            status = json.loads((directory / "result.json").read_text())["status"]
            assert status == "interrupted"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(compose(EVERYTHING), directory)
    return directory


@pytest.mark.parametrize(
    "moments",
    [
        [("train", 3)],
        [("val", 1), ("val", 11)],
        [("train", step) for step in range(1, 3 * STEPS + 1)],
        [("train", 2), ("val", 2), ("train", 5), ("val", 8)],
    ],
    ids=str,
)
def test_interrupted_anywhere(
    uninterrupted: Path, stops: Stops, tmp_path: Path, moments: list[tuple[str, int]]
) -> None:
    stops.wanted = list(moments)
    assert train_until_completed(tmp_path / "run") == len(moments)
    assert not list(differences(record(uninterrupted), record(tmp_path / "run")))
    for stage in ("train", "val"):
        curves = [
            EventAccumulator(str(run / "curves" / stage)).Reload().Scalars("loss")
            for run in (uninterrupted, tmp_path / "run")
        ]
        assert len({tuple((e.step, e.value) for e in curve) for curve in curves}) == 1


@pytest.mark.parametrize(
    "chosen",
    [
        "backend=im2col optimizer=sgd scheduler=cosine",
        "backend=naive model=shallow optimizer=adamw trainer.precision=bf16-mixed",
        "scheduler=none trainer.monitor=val/loss trainer.test_checkpoint=last "
        "trainer.checkpoint_every_n_steps=1 trainer.checkpoint_every_n_minutes=1e-4",
        "scheduler._target_=torch.optim.lr_scheduler.StepLR +scheduler.step_size=1 "
        "trainer.accumulate_grad_batches=3 trainer.checkpoint_every_n_epochs=2",
        "trainer.accumulate_grad_batches=1 optimizer.fused=true trainer.ema=null",
        "trainer.early_stopping=1 optimizer.lr=0 trainer.ema=null model.norm=false",
        "loss.class_weights=balanced data.sampler=balanced trainer.monitor=val/balanced_acc",
        "data.vflip=0.5 data.random_resized_crop=0.5 data.rotate=10 data.translate=0.1 "
        "data.trivial_augment=true data.color_jitter=0.4 data.mixup=0.2 data.cutmix=1",
    ],
)
def test_options_resume_bitwise(stops: Stops, tmp_path: Path, chosen: str) -> None:
    options = [*chosen.split(), "trainer.max_epochs=2", "tensorboard=scalars"]
    if any("StepLR" in option for option in options):
        options += ["~scheduler.pct_start", "~scheduler.div_factor"]
        options += ["~scheduler.final_div_factor", "~scheduler.anneal_strategy"]
        options += ["~scheduler.cycle_momentum"]
    assert train_until_completed(tmp_path / "uninterrupted", *options) == 0
    stops.wanted, stops.validated = [("train", 2), ("train", 3), ("val", 2), ("train", 5)], 0
    assert train_until_completed(tmp_path / "many", *options) == 4
    assert not list(differences(record(tmp_path / "uninterrupted"), record(tmp_path / "many")))


def test_early_stopping_resumes(stops: Stops, tmp_path: Path) -> None:
    """Interrupted in the last epoch, the run is not one epoch longer."""
    options = ["trainer.early_stopping=1", "optimizer.lr=0", "trainer.ema=null", "model.norm=false"]
    options += ["scheduler=none", "trainer.max_epochs=5"]
    stops.wanted = [("train", 2 * STEPS)]
    assert train_until_completed(tmp_path / "run", *options) == 1
    stopped = read_result(tmp_path / "run")
    assert stopped is not None
    assert stopped["epochs"] == 2
    # Again from its last checkpoint, as after a crash in the test.
    (tmp_path / "run/result.json").unlink()
    assert train_until_completed(tmp_path / "run", *options) == 0
    again = read_result(tmp_path / "run")
    assert again is not None
    assert (again["epochs"], again["metrics"]) == (2, stopped["metrics"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
def test_on_a_gpu(
    stops: Stops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options = ["trainer=gpu", "trainer.deterministic=true", f"trainer.precision={precision}"]
    options += ["trainer.gradient_clip_val=null"]
    assert train_until_completed(tmp_path / "uninterrupted", *options) == 0
    stops.wanted, stops.validated = [("train", 2), ("val", 1), ("train", 7)], 0
    assert train_until_completed(tmp_path / "many", *options) == 3
    assert not list(differences(record(tmp_path / "uninterrupted"), record(tmp_path / "many")))


def test_random_numbers_of_python_and_numpy_resume(
    stops: Stops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of the user's may draw them."""

    def run(directory: Path) -> list[tuple[float, float]]:
        drawn: list[tuple[float, float]] = []
        forward = nn.Flatten.forward

        def noisy(self: nn.Flatten, x: Tensor) -> Tensor:
            if self.training:
                drawn.append((random.random(), np.random.random()))  # noqa: NPY002
                x = x * (1 + 0.01 * sum(drawn[-1]))
            return forward(self, x)

        monkeypatch.setattr(nn.Flatten, "forward", noisy)
        train_until_completed(directory, "trainer.max_epochs=1")
        monkeypatch.setattr(nn.Flatten, "forward", forward)
        return drawn

    expected = run(tmp_path / "a")
    stops.wanted = [("train", 1), ("train", 3)]
    assert run(tmp_path / "b") == expected
    assert len(set(expected)) == 7
    assert not list(differences(record(tmp_path / "a"), record(tmp_path / "b")))


def test_max_epochs_can_be_raised(tmp_path: Path) -> None:
    """With a constant learning rate, two epochs and one more equal three."""
    constant = ["scheduler=none", "trainer.early_stopping=null"]
    assert train_until_completed(tmp_path / "a", *constant, "trainer.max_epochs=3") == 0
    assert train_until_completed(tmp_path / "b", *constant, "trainer.max_epochs=2") == 0
    longer = with_overrides(
        run_config(tmp_path / "b", checkpoint_file.newest), tmp_path / "b", ["trainer.max_epochs=3"]
    )
    train(longer, tmp_path / "b", resume=True)
    assert not list(differences(record(tmp_path / "a"), record(tmp_path / "b")))
    assert run_config(tmp_path / "b", checkpoint_file.newest).trainer.max_epochs == 3
    with pytest.raises(ConfigError, match=r"^trainer.max_epochs=2: 3 epochs are done; set 3 or"):
        train(
            compose([*EVERYTHING, *constant, "trainer.max_epochs=2"]), tmp_path / "b", resume=True
        )


def test_max_epochs_below_a_begun_epoch_is_rejected(stops: Stops, tmp_path: Path) -> None:
    """Otherwise weights within an epoch would be tested."""
    constant = ["scheduler=none", "trainer.max_epochs=3"]
    stops.wanted = [("train", STEPS + 1)]
    with pytest.raises(Interrupted):
        train(compose([*EVERYTHING, *constant]), tmp_path / "run")
    shorter = compose([*EVERYTHING, "scheduler=none", "trainer.max_epochs=1"])
    with pytest.raises(ConfigError, match=r"^trainer.max_epochs=1: epoch 2 has begun; set 2 or"):
        train(shorter, tmp_path / "run", resume=True)


def test_typed_default_changes_the_run(tmp_path: Path) -> None:
    """Also for a run started from Python, and one changed when it was resumed."""
    options = ["scheduler=none", "backend=im2col", "seed=5", "trainer.max_epochs=3"]
    cfg = run_options(compose(options))
    for typed, key, value in [
        ("seed=0", "seed", 0),
        ("trainer.max_epochs=10", "trainer.max_epochs", 10),
        ("backend=native", "backend._target_", "cnntrain.conv.NativeConv2d"),
    ]:
        assert flat(with_overrides(cfg, tmp_path, [typed]))[key] == value
    (tmp_path / ".hydra").mkdir()
    given = "- scheduler=none\n- backend=im2col\n- seed=5\n- trainer.max_epochs=4\n"
    (tmp_path / ".hydra/overrides.yaml").write_text(given)
    assert with_overrides(cfg, tmp_path, ["trainer.max_epochs=4"]).trainer.max_epochs == 4
    assert with_overrides(cfg, tmp_path, ["trainer=cpu"]) == {
        **cfg,
        "trainer": {**cfg.trainer, "accelerator": "cpu"},
    }


@pytest.fixture
def halfway(uninterrupted: Path, stops: Stops, tmp_path: Path) -> Path:
    """A run that was interrupted in its second epoch."""
    stops.wanted = [("train", STEPS + 2)]
    with pytest.raises(Interrupted, match="SIGTERM"):
        train(compose(EVERYTHING), tmp_path / "run")
    interruption.received = None
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["seed=5"], "seed=5: the run was started with 4"),
        (["optimizer.lr=1"], "optimizer.lr=1: the run was started with 0.005"),
        (
            ["backend=im2col"],
            "backend._target_=cnntrain.conv.Im2colConv2d: the run was started",
        ),
        (["trainer.max_epochs=5"], "the learning rate schedule of this run is for 3 epochs"),
        (
            ["trainer.precision=bf16-mixed"],
            "trainer.precision=bf16-mixed: the run was started",
        ),
        (["data.hflip=0"], "data.hflip=0: the run was started with 0.5"),
        (["scheduler=none"], "scheduler._target_=null: the run was started with"),
    ],
    ids=str,
)
def test_options_that_change_the_result_are_rejected(
    halfway: Path, options: list[str], message: str
) -> None:
    before = {file: file.read_bytes() for file in halfway.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError) as caught:
        train(compose([*EVERYTHING, *options]), halfway, resume=True)
    assert message in caught.value.problems[0]
    assert {file: file.read_bytes() for file in halfway.rglob("*") if file.is_file()} == before


def test_other_options_can_change(uninterrupted: Path, halfway: Path) -> None:
    options = ["trainer.progress_bar=true", "trainer=cpu", "trainer.checkpoint_every_n_steps=2"]
    run = run_config(halfway, checkpoint_file.newest)
    train(with_overrides(run, halfway, options), halfway, resume=True)
    assert not list(differences(record(uninterrupted), record(halfway)))


def test_damaged_checkpoint_is_replaced_by_the_previous_one(
    uninterrupted: Path, halfway: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for name in ("last.ckpt", "best.ckpt"):
        path = halfway / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:-1000])
    (halfway / "metrics.csv").write_text("nonsense")
    train(compose(EVERYTHING), halfway, resume=True)
    assert any(
        "last.ckpt: is cut off" in message and "previous.ckpt" in message
        for message in caplog.messages
    )
    assert not list(differences(record(uninterrupted), record(halfway)))


def test_damaged_config_is_read_from_the_checkpoint(
    uninterrupted: Path, halfway: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    file = halfway / ".hydra/config.yaml"
    text = file.read_text()
    assert "lr: 0.005" in text
    file.write_text(text.replace("lr: 0.005", "lr: 0.004"))
    cfg = run_config(halfway, checkpoint_file.newest)
    assert cfg.optimizer.lr == 0.005
    assert "config.yaml: is damaged" in caplog.messages[0]
    train(cfg, halfway, resume=True)
    assert not list(differences(record(uninterrupted), record(halfway)))
    assert "lr: 0.005" in file.read_text()


def test_other_conditions_are_reported(
    uninterrupted: Path, halfway: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    path = halfway / "checkpoints/last.ckpt"
    content = checkpoint_file.read(path)
    content["conditions"] |= {"torch": "1.0", "threads": "64"}
    checkpoint_file.write(path, content)
    train(compose(EVERYTHING), halfway, resume=True)
    assert "threads: 1, before 64: results may differ in their last bits" in caplog.messages
    assert any(
        message.startswith("torch: ") and "before 1.0" in message for message in caplog.messages
    )


def test_other_shapes_are_reported(halfway: Path) -> None:
    path = halfway / "checkpoints/last.ckpt"
    content = checkpoint_file.read(path)
    weights = content["state_dict"]
    weights["network.features.0.weight"] = torch.zeros(8, 1, 3, 3)
    del weights["network.classifier.3.bias"]
    checkpoint_file.write(path, content)
    with pytest.raises(CheckpointError) as caught:
        train(compose(EVERYTHING), halfway, resume=True)
    assert str(caught.value) == (
        f"{path}: is of another network: network.features.0.weight is 8x1x3x3 there and 6x1x5x5 "
        "here; network.classifier.3.bias is nothing there and 10 here"
    )


def test_checkpoint_of_another_run_is_rejected(
    uninterrupted: Path, halfway: Path, tmp_path: Path
) -> None:
    train(compose([*EVERYTHING, "seed=9", "trainer.max_epochs=1"]), tmp_path / "other")
    other = (tmp_path / "other/checkpoints/last.ckpt").read_bytes()
    (halfway / "checkpoints/last.ckpt").write_bytes(other)
    with pytest.raises(ConfigError, match="seed=4: the run was started with 9"):
        train(compose(EVERYTHING), halfway, resume=True)


def test_completed_run_returns_its_result(
    uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.read_bytes() for file in uninterrupted.rglob("*") if file.is_file()}
    result = train(compose(EVERYTHING), uninterrupted, resume=True)
    assert result.metrics == json.loads((uninterrupted / "result.json").read_text())["metrics"]
    assert {
        file: file.read_bytes() for file in uninterrupted.rglob("*") if file.is_file()
    } == before


def test_edited_result_is_not_used(
    uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(uninterrupted, directory)
    text = (directory / "result.json").read_text()
    metrics = json.loads(text)["metrics"]
    (directory / "result.json").write_text(
        text.replace(str(metrics["test/acc"]), str(metrics["test/acc"] + 0.1))
    )
    result = train(compose(EVERYTHING), directory, resume=True)
    assert "result.json: is damaged or was edited" in caplog.text
    assert result.metrics == metrics
    assert not list(differences(record(uninterrupted), record(directory)))


def test_unloadable_state_is_rejected_at_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.optim.lr_scheduler.OneCycleLR, "state_dict", lambda self: {"function": Path}
    )
    with pytest.raises(CheckpointError, match=r"last\.ckpt: holds Python objects"):
        train(compose(EVERYTHING), tmp_path / "run")


def test_keys_of_lightnings_loop_state(halfway: Path) -> None:
    """`lightning_compat.set_progress` writes these keys; another version may have other ones."""
    import lightning.pytorch as lightning

    loops = checkpoint_file.read(halfway / "checkpoints/last.ckpt")["loops"]["fit_loop"]
    known = lightning.Trainer(logger=False, enable_checkpointing=False).fit_loop.state_dict()
    assert loops.keys() == known.keys(), "Lightning has renamed keys of its loop state"
    progress = loops["epoch_loop.batch_progress"]
    assert progress.keys() == known["epoch_loop.batch_progress"].keys()
    assert progress["current"].keys() == known["epoch_loop.batch_progress"]["current"].keys()
    assert progress["current"]["completed"] == 4
