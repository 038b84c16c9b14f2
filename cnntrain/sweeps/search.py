"""Hyperparameter search: its options and the search space."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import PositiveInt

from cnntrain.config import ConfigError
from cnntrain.config.errors import collect, format_error, format_value, unknown
from cnntrain.config.overrides import parsed
from cnntrain.sweeps.members import typed
from cnntrain.sweeps.records import is_number

Metric = Literal["val/acc", "val/loss", "train/acc", "train/loss"]

WHERE = "search.space"


class Search:
    """Search for the best values of some options, with Optuna.

    Args:
        space: Option -> choices or range.
        sampler: Called with a `seed` for each trial, so that its suggestion is a function of the
            study's seed and its trials.
        pruner: An Optuna pruner.
        trials: Number of runs in all, those before an interruption included.
        metric: Of the weights that would be tested; accuracies are maximised, losses minimised.
        at_once: Trials run side by side; default: chosen by the launcher.
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
        self.space, self.sampler, self.pruner = Space(space), sampler, pruner
        self.trials, self.metric, self.at_once = trials, metric, at_once

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        return "maximize" if self.metric.endswith("acc") else "minimize"


@dataclass(frozen=True)
class Dimension:
    """An option of the space. Choices are stored as typed on the command line.

    `when` maps other options to choices, one of which each must have.
    """

    option: str
    distribution: Any
    when: dict[str, list[str]]

    @property
    def choices(self) -> list[str] | None:
        categorical = isinstance(self.distribution, CategoricalDistribution)
        return list(self.distribution.choices) if categorical else None

    @property
    def corners(self) -> list[Any]:
        """The choices, or the bounds of the range."""
        return self.choices or [self.distribution.low, self.distribution.high]

    def suggest(self, trial: Any) -> None:
        """Have an Optuna trial suggest a value."""
        d = self.distribution
        if self.choices:
            trial.suggest_categorical(self.option, self.choices)
        elif isinstance(d, IntDistribution):
            trial.suggest_int(self.option, d.low, d.high, step=d.step, log=d.log)
        else:
            trial.suggest_float(self.option, d.low, d.high, step=d.step, log=d.log)

    def active(self, params: Mapping[str, Any]) -> bool:
        """Whether its conditions are met by these values of other options."""
        return all(params.get(option) in values for option, values in self.when.items())


class Space:
    """The dimensions, those with conditions last.

    `content` is the node `search.space`. Raises ConfigError with all problems.
    """

    def __init__(self, content: Mapping[str, Any] | DictConfig):
        if OmegaConf.is_config(content):
            content = OmegaConf.to_container(content, resolve=True)  # type: ignore[assignment]
        problems = [] if content else [f"{WHERE}={{}}: has no option to search over"]
        found = []
        for option, entry in content.items():
            with collect(problems):
                found.append(_dimension(str(option), entry))
        self.dimensions = sorted(found, key=lambda dimension: bool(dimension.when))
        if problems := problems or list(self._condition_problems()):
            raise ConfigError(problems)

    def suggest(self, trial: Any) -> None:
        """Have an Optuna trial suggest a value for each option whose conditions are met."""
        for dimension in self.dimensions:
            if dimension.active(trial.params):
                dimension.suggest(trial)

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Option -> value, from the parameters of an Optuna trial."""
        return {
            o: parsed(f"{o}={v}").value() if isinstance(v, str) else v for o, v in params.items()
        }

    def completed(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """Some values with the first value of every other option that applies."""
        found: dict[str, Any] = {}
        for d in self.dimensions:
            if d.active({**made, **found}):
                found[d.option] = made.get(d.option, d.corners[0])
        return found

    def _condition_problems(self) -> Iterator[str]:
        free = [dimension for dimension in self.dimensions if not dimension.when]
        known = [f"{d.option}={choice}" for d in free for choice in d.choices or []]
        for d in self.dimensions:
            for text in (f"{o}={value}" for o, values in d.when.items() for value in values):
                if text not in known:
                    what = "the options without a condition have"
                    yield f"{WHERE}.{d.option}.when: {unknown(what, 'choice', text, known)}"


def _dimension(option: str, entry: Any) -> Dimension:
    """The dimension that an entry describes. Raises ConfigError."""
    where = f"{WHERE}.{option}"
    given = {"choices": entry} if isinstance(entry, list) else entry
    if not (
        isinstance(given, dict)
        and isinstance(choices := given.get("choices", []), list)
        and isinstance(when := given.get("when", {}), dict)
    ):
        text = "must be choices [a, b], or {low: 1, high: 2}; with when: {option: choice}"
        raise ConfigError([f"{where}={format_value(entry)}: {text}"])
    known = ("choices", "when") if "choices" in given else ("low", "high", "log", "step", "when")
    if wrong := [str(key) for key in given if key not in known]:
        text = "an option with choices has" if "choices" in given else "a range has"
        raise ConfigError([f"{where}.{k}: {unknown(text, 'option', k, known)}" for k in wrong])
    bounds = {key: value for key, value in given.items() if key not in ("choices", "when")}
    if wrong := [key for key, v in bounds.items() if key != "log" and not is_number(v)]:
        raise ConfigError(
            [f"{where}.{key}={format_value(bounds[key])}: must be a number" for key in wrong]
        )
    integers = all(isinstance(v, int) for k, v in bounds.items() if k != "log")
    try:
        if "choices" in given:
            distribution: Any = CategoricalDistribution([typed(choice) for choice in choices])
        else:
            distribution = (IntDistribution if integers else FloatDistribution)(**bounds)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"{where}: {format_error(error)}"]) from None
    conditions = {
        str(o): [typed(value) for value in (values if isinstance(values, list) else [values])]
        for o, values in when.items()
    }
    return Dimension(option, distribution, conditions)
