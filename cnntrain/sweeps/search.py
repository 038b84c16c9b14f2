"""Search settings and search space: options, their ranges, choices and conditions.

Imports no Optuna, so that a config with a search is checked without it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveInt

from cnntrain.config import ConfigError, quoted
from cnntrain.config.errors import format_value, unknown

# test/ is accepted by the type check and rejected later, with the reason.
Metric = Literal["val/acc", "val/loss", "train/acc", "train/loss", "test/acc", "test/loss"]
WHERE = "search.space"
KEYS = ("choices", "low", "high", "log", "step", "when")
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")  # a string that Hydra reads without quotes
KEYWORDS = ("true", "false", "null", "nan", "inf")  # strings that need quotes


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
    """The values of an option: `choices`, or the range from `low` to `high`, both included.

    `when` maps other options to choices, as typed, all of which the dimension requires.
    """

    option: str
    choices: list[Any] | None = None
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    when: dict[str, list[str]] = field(default_factory=dict)

    @property
    def integer(self) -> bool:
        """Whether it is a range of integers."""
        return all(isinstance(n, int) for n in (self.low, self.high, self.step or 0))

    @property
    def size(self) -> int | None:
        """The number of values; None for a continuous range."""
        if self.choices is not None:
            return len(self.choices)
        if self.low == self.high:
            return 1
        step = self.step or (1 if self.integer else None)
        return step and 1 + round((self.high - self.low) / step)

    @property
    def corners(self) -> list[Any]:
        """The choices, or the bounds of the range."""
        return self.choices if self.choices is not None else [self.low, self.high]

    def suggest(self, trial: Any) -> None:
        """Have an Optuna trial suggest a value."""
        if self.choices is not None:
            trial.suggest_categorical(self.option, [stored(c) for c in self.choices])
        elif self.integer:
            trial.suggest_int(self.option, self.low, self.high, step=self.step or 1, log=self.log)
        else:
            trial.suggest_float(self.option, self.low, self.high, step=self.step, log=self.log)

    def exact(self, suggested: Any) -> Any:
        """A suggested value without rounding errors of the steps: 0.35, not 0.35000000000000003."""
        if self.choices is not None or self.integer or not self.step:
            return suggested
        low, step = Decimal(str(self.low)), Decimal(str(self.step))
        return float(low + round((suggested - self.low) / self.step) * step)

    def value(self, param: Any) -> Any:
        """The option's value for Optuna's parameter, which is text for a list."""
        lists = [c for c in self.choices or [] if isinstance(c, list) and stored(c) == param]
        return lists[0] if lists else param

    def active(self, made: Mapping[str, Any]) -> bool:
        """Whether its conditions are met by these values of other options."""
        as_text = {o: v if str(v).startswith("[") else typed(v) for o, v in made.items()}
        return all(as_text.get(o) in values for o, values in self.when.items())


class Space:
    """Dimensions in an order in which each comes after those that its conditions name.

    `content` is the node `search.space`. Raises ConfigError with all problems.
    """

    def __init__(self, content: Mapping[str, Any] | DictConfig):
        if OmegaConf.is_config(content):
            content = OmegaConf.to_container(content, resolve=True)  # type: ignore[assignment]
        problems = [] if content else [f"{WHERE}={{}}: has no option to search over"]
        found = {str(o): _dimension(str(o), entry, problems) for o, entry in content.items()}
        dimensions = {option: dimension for option, dimension in found.items() if dimension}
        for dimension in dimensions.values():
            problems += _condition_problems(dimension, dimensions, list(found))
        self.dimensions: list[Dimension] = []
        while not problems and dimensions:
            placed = [d.option for d in self.dimensions]
            ready = [o for o, d in dimensions.items() if all(other in placed for other in d.when)]
            if not ready:
                names = ", ".join(f"{WHERE}.{o}.when" for o in dimensions)
                problems.append(f"{names}: conditions that depend on each other in a circle")
            self.dimensions += [dimensions.pop(option) for option in ready]
        if not problems:
            problems = [
                f"{WHERE}.{d.option}.when: can never be met, as its options exclude each other"
                for d in self.dimensions
                if not list(self.settings(d))
            ]
        if problems:
            raise ConfigError(problems)

    def suggest(self, trial: Any) -> None:
        """Have an Optuna trial suggest a value for each option whose conditions are met."""
        for dimension in self.dimensions:
            if dimension.active(trial.params):
                dimension.suggest(trial)

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Option -> value, from the parameters of an Optuna trial."""
        return {d.option: d.value(params[d.option]) for d in self.dimensions if d.option in params}

    def exact(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Suggested parameters without rounding errors."""
        return {d.option: d.exact(params[d.option]) for d in self.dimensions if d.option in params}

    @property
    def size(self) -> int | None:
        """The number of combinations; None if a range is continuous."""
        if any(d.size is None for d in self.dimensions):
            return None
        conditions = {option for d in self.dimensions for option in d.when}

        def count(dimensions: list[Dimension], made: dict[str, Any]) -> int:
            if not dimensions:
                return 1
            first, *others = dimensions
            if not first.active(made):
                return count(others, made)
            if first.option not in conditions:
                return (first.size or 0) * count(others, made)
            return sum(count(others, {**made, first.option: stored(c)}) for c in first.corners)

        return count(self.dimensions, {})

    def settings(self, dimension: Dimension) -> Iterator[dict[str, str]]:
        """All choices of other options, as typed, that meet a dimension's conditions."""
        made: list[dict[str, str]] = [{}]
        for option, values in dimension.when.items():
            (parent,) = (d for d in self.dimensions if d.option == option)
            made = [
                {**before, **above, option: value}
                for before in made
                for above in self.settings(parent)
                for value in values
                if all(before.get(o, v) == v for o, v in {**above, option: value}.items())
            ]
        yield from made


def override(option: str, value: Any) -> str:
    """An override from which Hydra reads exactly this value."""
    return f"{option}={typed(value)}"


def typed(value: Any) -> str:
    """A plain value in the syntax of Hydra's command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(typed, value)) + "]"
    if isinstance(value, str) and (not PLAIN.fullmatch(value) or value.lower() in KEYWORDS):
        return quoted(value)
    return str(value)


def stored(choice: Any) -> Any:
    """A choice as Optuna can store it: a list as text."""
    return typed(choice) if isinstance(choice, list) else choice


def _dimension(option: str, entry: Any, problems: list[str]) -> Dimension | None:
    """The dimension that an entry describes; None after adding to `problems`."""
    where, before = f"{WHERE}.{option}", len(problems)
    given = {"choices": entry} if isinstance(entry, list) else entry
    if not isinstance(given, dict):
        problems.append(
            f"{where}={format_value(entry)}: must be choices [a, b], or {{low: 1, high: 2}}"
        )
        return None
    for key in (key for key in given if key not in KEYS):
        problems.append(f"{where}.{key}: {unknown('a range has', 'option', str(key), KEYS)}")
    when = given.get("when") or {}
    if not isinstance(when, dict):
        problems.append(f"{where}.when={format_value(when)}: must be {{option: choice}}")
    if len(problems) == before:
        check = _choice_problems if "choices" in given else _range_problems
        problems += check(where, given)
    if len(problems) > before:
        return None
    conditions = {
        str(o): [typed(v) for v in (values if isinstance(values, list) else [values])]
        for o, values in when.items()
    }
    return Dimension(option, **{k: v for k, v in given.items() if k != "when"}, when=conditions)


def _choice_problems(where: str, given: dict[str, Any]) -> Iterator[str]:
    choices, others = given["choices"], [k for k in given if k not in ("choices", "when")]
    if others:
        yield f"{where}.{others[0]}: belongs to a range, and choices are given"
    if not isinstance(choices, list) or not choices:
        yield f"{where}={format_value(choices)}: must be choices, at least one, such as [a, b]"
        return
    if any(isinstance(leaf, dict) for c in choices for leaf in (c if isinstance(c, list) else [c])):
        yield f"{where}={format_value(choices)}: a choice must be a value or a list of values"
        return
    texts = [typed(choice) for choice in choices]
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        yield f"{where}={format_value(choices)}: has {', '.join(twice)} twice"


def _range_problems(where: str, given: dict[str, Any]) -> Iterator[str]:
    numbers = {key: given.get(key) for key in ("low", "high", *({"step"} & given.keys()))}
    wrong = {k: v for k, v in numbers.items()
             if type(v) not in (int, float) or not math.isfinite(v)}  # type: ignore[arg-type]  # fmt: skip
    for key, value in wrong.items():
        yield f"{where}.{key}={format_value(value)}: must be a number"
    if not isinstance(log := given.get("log", False), bool):
        yield f"{where}.log={format_value(log)}: must be true or false"
    if wrong:
        return
    low, high, step = (Decimal(str(numbers.get(key, 1))) for key in ("low", "high", "step"))
    if low > high:
        yield f"{where}.low={low}: is more than high={high}"
    if log is True and low <= 0:
        yield f"{where}.low={low}: must be more than 0 with log=true"
    if "step" not in given:
        return
    if log is True:
        yield f"{where}.step={step}: cannot be combined with log=true; leave out one of the two"
    elif step <= 0:
        yield f"{where}.step={step}: must be more than 0"
    elif low < high and (rest := (high - low) % step):
        yield f"{where}.step={step}: does not lead to high={high}; take high={high - rest}"


def _condition_problems(
    dimension: Dimension, dimensions: Mapping[str, Dimension], options: Sequence[str]
) -> Iterator[str]:
    for option, values in dimension.when.items():
        where = f"{WHERE}.{dimension.option}.when.{option}"
        parent = dimensions.get(option)
        if option not in options:
            yield f"{where}: {unknown('the space has', 'option', option, options)}"
        elif parent and parent.choices is None:
            yield f"{where}: has a range, and a condition needs choices"
        elif parent:
            choices = [typed(choice) for choice in parent.choices or []]
            for value in (value for value in values if value not in choices):
                yield f"{where}={value}: {unknown(f'{option} has', 'choice', value, choices)}"
