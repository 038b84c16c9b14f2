"""Hyperparameter search: its options and the search space."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import PositiveInt

from cnntrain.config import ConfigError
from cnntrain.config.errors import collect, format_error, format_value, unknown
from cnntrain.metric_names import Monitored, higher_is_better
from cnntrain.sweeps.members import typed
from cnntrain.sweeps.records import is_number

WHERE = "search.space"


class Search:
    """Search for the best values of some options, with Optuna.

    Args:
        space: Option -> choices or range.
        sampler: Called with a `seed` for each trial, so that its suggestion is a function of the
            study's seed and its trials.
        pruner: An Optuna pruner.
        trials: Number of runs in all, those before an interruption included.
        metric: Of the weights that would be tested; losses are minimised, others maximised.
        at_once: Trials run side by side; default: chosen by the launcher.
    """

    def __init__(
        self,
        *,
        space: dict[str, Any],
        sampler: Callable[..., Any],
        pruner: Any,
        trials: PositiveInt = 40,
        metric: Monitored = "val/acc",
        at_once: PositiveInt | None = None,
    ):
        self.space, self.sampler, self.pruner = Space(space), sampler, pruner
        self.trials, self.metric, self.at_once = trials, metric, at_once
        self.direction: Any = "maximize" if higher_is_better(metric) else "minimize"


KINDS = {"categorical": CategoricalDistribution, "int": IntDistribution, "float": FloatDistribution}


@dataclass(frozen=True)
class Dimension:
    """An option of the space."""

    option: str
    kind: str  # a name in KINDS
    arguments: dict[str, Any]  # of the distribution; choices as typed on the command line
    when: dict[str, list[str]]  # other options, each with choices of which it must have one

    @property
    def corners(self) -> list[Any]:
        """The choices, or the bounds of the range."""
        return self.arguments.get("choices") or [self.arguments["low"], self.arguments["high"]]

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
        for d in self.dimensions:
            if d.active(trial.params):
                getattr(trial, f"suggest_{d.kind}")(d.option, **d.arguments)

    def completed(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """Some values with the first value of every other option that applies."""
        found: dict[str, Any] = {}
        for d in self.dimensions:
            if d.active({**made, **found}):
                found[d.option] = made.get(d.option, d.corners[0])
        return found

    def _condition_problems(self) -> Iterator[str]:
        free = [dimension for dimension in self.dimensions if not dimension.when]
        known = [f"{d.option}={choice}" for d in free for choice in d.arguments.get("choices", [])]
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
    categorical = "choices" in given
    known = ("choices", "when") if categorical else ("low", "high", "log", "step", "when")
    has = "an option with choices has" if categorical else "a range has"
    bounds = {key: value for key, value in given.items() if key in ("low", "high", "step")}
    texts = {key: format_value(value) for key, value in bounds.items() if not is_number(value)}
    wrong = [f"{k}: {unknown(has, 'option', str(k), known)}" for k in given if k not in known]
    if wrong := wrong or [f"{key}={value}: must be a number" for key, value in texts.items()]:
        raise ConfigError([f"{where}.{problem}" for problem in wrong])
    arguments = {key: value for key, value in given.items() if key != "when"}
    if categorical:
        kind, arguments = "categorical", {"choices": [typed(choice) for choice in choices]}
    else:
        kind = "int" if all(isinstance(value, int) for value in bounds.values()) else "float"
    try:
        KINDS[kind](**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"{where}: {format_error(error)}"]) from None
    conditions = {
        str(o): [typed(value) for value in (values if isinstance(values, list) else [values])]
        for o, values in when.items()
    }
    return Dimension(option, kind, arguments, conditions)
