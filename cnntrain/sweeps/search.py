"""A hyperparameter search as the config has it, and all that can be wrong with one."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveInt

from cnntrain.config import ConfigError
from cnntrain.sweeps.space import Compose, Space

# Those of the test set are known so that they can be refused for the right reason.
Metric = Literal["val/acc", "val/loss", "train/acc", "train/loss", "test/acc", "test/loss"]


class Search:
    """Optuna's search for the best values of some options.

    `trials` are the runs in all, those before an interruption included. `metric`, of the weights
    that a run would test, is maximised if it is an accuracy and minimised if it is a loss.
    `at_once` trials are asked for together and run side by side; None leaves that to the launcher.
    `sampler` is called with a `seed` for each trial, so that what it suggests depends on the
    study's seed and its trials alone.
    """

    def __init__(
        self,
        *,
        space: dict[str, Any],
        sampler: Callable[..., Any],
        pruner: Any,
        trials: PositiveInt = 40,
        metric: Metric = "val/acc",
        at_once: PositiveInt | None = None,
    ):
        self.space = Space(_plain(space))
        self.sampler, self.pruner = sampler, pruner
        self.trials, self.metric, self.at_once = trials, metric, at_once

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Optuna's word for what is sought."""
        return "maximize" if self.metric.endswith("acc") else "minimize"


def problems(node: DictConfig, compose: Compose, typed: Sequence[str] = ()) -> list[str]:
    """What is wrong with the node `search` of a config whose keys and types are right.

    `compose` gives the checked config of a run with further overrides; `typed` are the overrides
    that all runs share. Nothing is written.
    """
    found = []
    if node.get("metric", "").startswith("test/"):
        better = node.metric.replace("test", "val")
        found.append(
            f"search.metric={node.metric}: what is chosen by the test set has no test left; "
            f"take {better}"
        )
    try:
        space = Space(_plain(node.get("space")))
    except ConfigError as error:
        return [*found, *error.problems]
    options = [d.option for d in space.dimensions]
    found += [
        f"{text}: is searched over, see search.space; leave it out"
        for text in typed
        if text.lstrip("+").partition("=")[0] in options
    ]
    if found := found + space.refusals(compose):
        return found
    from cnntrain.sweeps.study import dry_run

    try:
        dry_run(node)
    except ConfigError as error:
        return error.problems
    return []


def _plain(space: Any) -> Any:
    return OmegaConf.to_container(space, resolve=True) if OmegaConf.is_config(space) else space
