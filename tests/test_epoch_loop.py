"""The loop over the batches of an epoch, against Lightning's own."""

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization

from cnntrain.config import compose
from cnntrain.training import train
from cnntrain.training.checkpoint_file import read
from cnntrain.training.epoch_loop import CALLBACK_HOOKS, EpochLoop

SHORT = [
    "data=fashion_mnist_mini",
    "data.batch_size=500",
    "trainer=cpu",
    "trainer.progress_bar=false",
]


class Diary(lightning.Callback):
    """What each hook is called with, and what it finds there."""

    def __init__(self, *, logs: bool) -> None:
        self.logs = logs
        self.entries: list[Any] = []
        for name in CALLBACK_HOOKS:
            setattr(self, name, lambda *a, name=name: self.write(name, *a))

    def write(self, name: str, trainer: Any, module: Any, *arguments: Any) -> None:
        gradients = [p.grad for p in module.parameters()]
        norm = float(sum(g.square().sum() for g in gradients if g is not None))
        loss = arguments[0].detach() if name == "on_before_backward" else module.last_loss
        if name == "on_train_batch_end":
            loss = arguments[0]["loss"]
            assert not loss.requires_grad
        if name in ("on_before_zero_grad", "on_before_optimizer_step"):
            assert arguments == (trainer.optimizers[0],)
        assert module._current_fx_name == name
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
        counts = str(progress.state_dict())
        number = None if loss is None else float(loss)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.entries.append((name, trainer.global_step, norm, number, counts, logged))
        if self.logs and name == "on_train_batch_end":
            module.log("seen", number, on_step=True, on_epoch=True)


@pytest.fixture
def by_lightning(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that are trained by Lightning's step, by their numbers in their epochs."""
    batches: list[int] = []
    own = _AutomaticOptimization.run

    def run(self: Any, optimizer: Any, batch_idx: int, kwargs: Any) -> Any:
        batches.append(batch_idx)
        return own(self, optimizer, batch_idx, kwargs)

    monkeypatch.setattr(_AutomaticOptimization, "run", run)
    return batches


@pytest.mark.parametrize(
    ("optimizer", "logs"), [("adam", False), ("adam", True), ("sgd", False), ("muon", False)]
)
def test_hooks_numbers_and_counts_are_those_of_lightning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by_lightning: list[int],
    optimizer: str,
    logs: bool,
) -> None:
    cfg = compose([*SHORT, f"optimizer={optimizer}", "trainer.max_epochs=2", "trainer.ema=0.9"])
    diary = Diary(logs=logs)
    train(cfg, tmp_path / "plain", callbacks=[diary])
    assert not by_lightning
    monkeypatch.setattr(EpochLoop, "_plain", lambda self: False)
    theirs = Diary(logs=logs)
    train(cfg, tmp_path / "lightning", callbacks=[theirs])
    assert by_lightning == [*range(9)] * 2
    assert [entry[0] for entry in theirs.entries] == CALLBACK_HOOKS * 18
    assert diary.entries == theirs.entries
    assert logs == any("seen_step" in entry[-1] for entry in diary.entries)
    ours, lightnings = (
        read(tmp_path / run / "checkpoints/last.ckpt") for run in ("plain", "lightning")
    )
    assert ours["loops"] == lightnings["loops"]
    for name, weight in ours["state_dict"].items():
        assert torch.equal(weight, lightnings["state_dict"][name]), name


def test_a_hook_of_an_instance_is_called(tmp_path: Path) -> None:
    called: list[int] = []
    callback = LambdaCallback(
        on_before_zero_grad=lambda trainer, module, optimizer: called.append(trainer.global_step)
    )
    train(compose([*SHORT, "trainer.max_epochs=1"]), tmp_path / "run", callbacks=[callback])
    assert called == list(range(9))


LBFGS = (
    "optimizer._target_=torch.optim.LBFGS +optimizer.max_iter=2 "
    "~optimizer.betas ~optimizer.eps ~optimizer.fused ~optimizer.weight_decay"
)


@pytest.mark.parametrize(
    "options",
    [
        "trainer.precision=bf16-mixed",
        "trainer.gradient_clip_val=0.5",
        "trainer.accumulate_grad_batches=2",
        f"{LBFGS} scheduler=none",  # computes the loss several times
    ],
)
def test_all_that_is_not_plain_is_left_to_lightning(
    tmp_path: Path, by_lightning: list[int], options: str
) -> None:
    train(compose([*SHORT, "trainer.max_epochs=1", *options.split()]), tmp_path / "run")
    assert by_lightning == [*range(9)]


def test_what_changes_between_epochs_is_seen(tmp_path: Path, by_lightning: list[int]) -> None:
    gathering = lightning.callbacks.GradientAccumulationScheduler({1: 3})
    train(compose([*SHORT, "trainer.max_epochs=2"]), tmp_path / "run", callbacks=[gathering])
    assert by_lightning == [*range(9)]  # of the second epoch
