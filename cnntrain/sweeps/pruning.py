"""Pruning of a search's trials: the pruner is asked at the end of every epoch."""

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import OmegaConf

from cnntrain.config import NODES, ConfigError, build
from cnntrain.config.checks import check_node
from cnntrain.sweeps.study import no_warnings, open_trial
from cnntrain.training import Pruned

KEPT, PRUNED = "kept after epoch", "pruned after epoch"  # user attributes of a trial


def pruning_callback(folder: Path, number: int) -> lightning.Callback:
    """A Lightning callback that reports a trial's metric and raises Pruned if the pruner says so.

    An epoch is reported and decided on before the checkpoint that follows. If it is repeated after
    an interruption, the value and the decision in the study remain.

    Args:
        folder: The folder of the study.
        number: The trial's number in it.
    """
    trial = open_trial(folder, number)
    pruner, metric = trial.study.user_attrs["pruner"], trial.study.user_attrs["metric"]
    stage = metric.partition("/")[0]

    def build_pruner(*_: Any) -> None:
        if problems := check_node("search.pruner", NODES["search.pruner"], dict(pruner)):
            raise ConfigError([f"{folder}: {problem}" for problem in problems])
        with no_warnings():
            trial.study.pruner = build(OmegaConf.create(pruner))

    def report(trainer: lightning.Trainer, module: Any) -> None:
        epoch = trainer.current_epoch + 1
        with no_warnings():
            # Optuna keeps the first report of an epoch.
            trial.report(module.totals[stage].metrics(stage)[metric], epoch)
            if epoch <= trial.user_attrs.get(KEPT, 0):
                return
            pruned = trial.user_attrs.get(PRUNED) == epoch or trial.should_prune()
            trial.set_user_attr(PRUNED if pruned else KEPT, epoch)
        if pruned and epoch != trainer.max_epochs:
            raise Pruned(f"the pruner stopped the trial in epoch {epoch}")

    return LambdaCallback(on_fit_start=build_pruner, on_train_epoch_end=report)
