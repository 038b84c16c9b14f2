"""Pruning of trials, in real trainings, and after a resume."""

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import optuna
import pytest
from searches import QUIET, search

from cnntrain.config import compose
from cnntrain.config.resume import read_result
from cnntrain.sweeps.study import (
    STUDY,
    PlannedTrial,
    SearchStudy,
    open_storage,
    open_trial,
    pruning_callback,
    summary,
)
from cnntrain.training import Pruned, train

SPACE = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
RUN = [*QUIET, "+trainer.limit_train_batches=3", "trainer.max_epochs=4", "scheduler=none"]


def begin(sweep: Path, others: float, *overrides: str) -> tuple[SearchStudy, PlannedTrial]:
    """A search in which five trials are completed, with this accuracy in each of four epochs."""
    sweep.mkdir()
    node = search(*(overrides or ["search.pruner.n_warmup_steps=2"]), space=SPACE)
    study = SearchStudy(sweep, node, seed=0)
    add_others(study, 5, others)
    (asked,) = study.ask()
    return study, asked


def add_others(study: SearchStudy, count: int, accuracy: float) -> None:
    for asked in (trial for _ in range(count) for trial in study.ask()):
        reporting = open_trial(study.folder, asked.number)
        for epoch in range(1, 5):
            reporting.report(accuracy, epoch)
        study.tell({asked.number: {"status": "completed", "metrics": {"val/acc": accuracy}}})


def run(
    sweep: Path, asked: PlannedTrial, *callbacks: lightning.Callback, resume: bool = False
) -> Any:
    return train(
        compose([*RUN, "tensorboard=scalars", *asked.overrides]),
        sweep / asked.name,
        resume=resume,
        callbacks=[pruning_callback(sweep, asked.number), *callbacks],
    )


def stored(sweep: Path, asked: PlannedTrial) -> optuna.trial.FrozenTrial:
    study = optuna.load_study(study_name=None, storage=open_storage(sweep))
    return study.trials[asked.number]


def values(directory: Path) -> dict[int, float]:
    with (directory / "metrics.csv").open() as file:
        return {int(row["epoch"]): float(row["val/acc"]) for row in csv.DictReader(file)}


def test_a_worse_trial_is_pruned(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    study, asked = begin(sweep, 0.999)
    with pytest.raises(Pruned, match="the pruner stopped the trial in epoch 2"):
        run(sweep, asked)
    result = read_result(sweep / asked.name)
    assert result is not None
    assert (result["status"], result["epochs"]) == ("pruned", 2)
    reported = values(sweep / asked.name)
    assert list(reported) == [1, 2]
    assert result["metrics"]["val/acc"] == reported[2]
    assert not any(name.startswith("test/") for name in result["metrics"])

    study.tell({asked.number: result})
    trial = study.study.trials[asked.number]
    assert (trial.state.name, trial.value) == ("PRUNED", reported[2])
    assert trial.intermediate_values == reported
    assert summary(study, shlex.join)[0].endswith("5 completed, 1 pruned, 0 failed")


@pytest.mark.parametrize(("others", "overrides"), [(0.01, ()), (0.999, ("search/pruner=none",))])
def test_a_trial_that_is_not_pruned(
    tmp_path: Path, others: float, overrides: tuple[str, ...]
) -> None:
    sweep = tmp_path / "sweep"
    study, asked = begin(sweep, others, *overrides)
    result = run(sweep, asked)
    reported = values(sweep / asked.name)
    assert stored(sweep, asked).intermediate_values == reported
    assert len(reported) == 4
    study.tell({asked.number: read_result(sweep / asked.name)})
    assert study.study.trials[asked.number].value == result.metrics["val/acc"]
    assert result.metrics["val/acc"] == max(reported.values())


class Cut(lightning.Callback):
    """Ends a run between an epoch's report and its checkpoint, as a kill can."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise OSError("cut")


def test_a_repeated_epoch_is_reported_once(tmp_path: Path) -> None:
    """When epoch 2 is repeated, the other trials have become better."""
    sweep = tmp_path / "sweep"
    study, asked = begin(sweep, 0.01)
    with pytest.raises(OSError, match="cut"):
        run(sweep, asked, Cut(1))
    before = stored(sweep, asked).intermediate_values
    assert list(before) == [1, 2]
    add_others(study, 8, 0.999)
    with pytest.raises(Pruned, match="the pruner stopped the trial in epoch 2"):
        run(sweep, asked, resume=True)
    reported = values(sweep / asked.name)
    assert list(reported) == [1, 2]
    trial = stored(sweep, asked)
    assert trial.intermediate_values == reported
    assert {k: reported[k] for k in before} == before
    steps = [
        json.loads(line)["step"]
        for line in (sweep / STUDY).read_text().splitlines()
        if '"op_code":7' in line and f'"trial_id":{trial.number},' in line
    ]
    assert steps == [1, 2]
