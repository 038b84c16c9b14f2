"""Whether a trial is worth going on with, asked at the end of every epoch in its own process."""

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import optuna
from omegaconf import OmegaConf

from cnntrain.config import NODES, ConfigError, build
from cnntrain.config.checks import check_node
from cnntrain.sweeps.journal import load, quietly
from cnntrain.sweeps.study import FIRST_EPOCH
from cnntrain.training import Pruned

GOES_ON = "goes on after epoch"  # the last epoch for which that was decided
ENDS = "pruned after epoch"


class Pruning(lightning.Callback):
    """Reports a trial's metric to its study, and raises Pruned when the study's pruner says so.

    `number` is the trial's in the study in `folder`. An epoch is reported and decided on before
    the checkpoint that follows it: one that is computed a second time, after an interruption, has
    its value and its decision in the study already, and they stand.
    """

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        study = load(self.folder)
        pruner = study.user_attrs["pruner"]
        if problems := check_node("search.pruner", NODES["search.pruner"], dict(pruner)):
            raise ConfigError([f"{self.folder}: {problem}" for problem in problems])
        with quietly():
            study.pruner = build(OmegaConf.create(pruner))
        self.metric: str = study.user_attrs["metric"]
        self.first_epoch: int = study.user_attrs.get(FIRST_EPOCH, 0)
        frozen = study.get_trials(deepcopy=False)[self.number]
        self.trial = optuna.trial.Trial(study, frozen._trial_id)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        epoch = trainer.current_epoch + 1
        with quietly():
            ends = self._ends(epoch - 1 + self.first_epoch, module)
        if ends and epoch != trainer.max_epochs:  # else there is nothing left to save
            raise Pruned(f"others did better in epoch {epoch}")

    def _ends(self, epoch: int, module: Any) -> bool:
        stage = self.metric.partition("/")[0]
        # Optuna lets the first report of an epoch stand.
        self.trial.report(module.totals[stage].metrics(stage)[self.metric], epoch)
        decided = self.trial.user_attrs
        if epoch <= decided.get(GOES_ON, -1):
            return False
        ends = decided.get(ENDS) == epoch or self.trial.should_prune()
        self.trial.set_user_attr(ENDS if ends else GOES_ON, epoch)
        return ends
