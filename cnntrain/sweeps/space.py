"""The space of a search: which options, which values, under which conditions. No Optuna in here."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from omegaconf import DictConfig

from cnntrain.config import ConfigError, quoted
from cnntrain.config.overrides import shown, unknown

Compose = Callable[[Sequence[str]], DictConfig]  # further overrides to a checked config

WHERE = "search.space"
KEYS = ("choices", "low", "high", "log", "step", "when")
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")  # a string that Hydra takes as it stands
WORDS = ("true", "false", "null", "nan", "inf")  # which are none


@dataclass(frozen=True)
class Dimension:
    """The values of one option: `choices`, or a range from `low` to `high`, both included.

    `when` says of which other options which choices it goes with; all of them have to be made.
    """

    option: str
    choices: list[Any] | None = None
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    when: dict[str, list[str]] = field(default_factory=dict)  # option -> values as typed

    @property
    def whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return all(isinstance(n, int) for n in (self.low, self.high, self.step or 0))

    @property
    def size(self) -> int | None:
        """How many values there are; None if any number between two is one."""
        if self.choices is not None:
            return len(self.choices)
        if self.low == self.high:
            return 1
        step = self.step or (1 if self.whole else None)
        return step and 1 + round((self.high - self.low) / step)

    @property
    def corners(self) -> list[Any]:
        return self.choices if self.choices is not None else [self.low, self.high]

    def suggest(self, trial: Any) -> None:
        """Have an Optuna trial choose a value."""
        if self.choices is not None:
            trial.suggest_categorical(self.option, [_stored(c) for c in self.choices])
        elif self.whole:
            trial.suggest_int(self.option, self.low, self.high, step=self.step or 1, log=self.log)
        else:
            trial.suggest_float(self.option, self.low, self.high, step=self.step, log=self.log)

    def exact(self, suggested: Any) -> Any:
        """A suggested value with the digits that a person would write: steps add up to 0.35, and
        not to 0.35000000000000003."""
        if self.choices is not None or self.whole or not self.step:
            return suggested
        low, step = Decimal(str(self.low)), Decimal(str(self.step))
        return float(low + round((suggested - self.low) / self.step) * step)

    def value(self, stored: Any) -> Any:
        """The option's value by what Optuna has stored of it."""
        found = [c for c in self.choices or [] if isinstance(c, list) and _stored(c) == stored]
        return found[0] if found else stored


class Space:
    """Dimensions, those that conditions ask for before those that have them.

    `content` is the node `search.space` as plain containers. Raises ConfigError with a line for
    each thing that is wrong with it.
    """

    def __init__(self, content: Mapping[str, Any]):
        problems: list[str] = []
        if not content:
            problems.append(f"{WHERE}={{}}: has no option to search over")
        found = {o: _dimension(o, entry, problems) for o, entry in content.items()}
        dimensions = {option: dimension for option, dimension in found.items() if dimension}
        for dimension in dimensions.values():
            problems += _conditions(dimension, dimensions, found)
        self.dimensions: list[Dimension] = []
        if not problems:
            self.dimensions, problems = _sorted(dimensions)
        problems += [
            f"{WHERE}.{d.option}.when: can never be met, as its options exclude each other"
            for d in self.dimensions
            if not list(self.settings(d))
        ]
        if problems:
            raise ConfigError(problems)

    def suggest(self, trial: Any) -> None:
        """Have an Optuna trial choose a value for each option whose conditions are met."""
        for dimension in self.dimensions:
            if _active(dimension, trial.params):
                dimension.suggest(trial)

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Option -> value, by the parameters that Optuna has stored for a trial."""
        return {d.option: d.value(params[d.option]) for d in self.dimensions if d.option in params}

    def exact(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Suggested parameters as they are to be stored."""
        return {d.option: d.exact(params[d.option]) for d in self.dimensions if d.option in params}

    @property
    def size(self) -> int | None:
        """How many combinations there are; None if their number has no end."""
        if any(d.size is None for d in self.dimensions):
            return None
        asked_for = {option for d in self.dimensions for option in d.when}

        def count(dimensions: list[Dimension], made: dict[str, Any]) -> int:
            if not dimensions:
                return 1
            first, *others = dimensions
            if not _active(first, made):
                return count(others, made)
            if first.option not in asked_for:
                return (first.size or 0) * count(others, made)
            return sum(count(others, {**made, first.option: _stored(c)}) for c in first.corners)

        return count(self.dimensions, {})

    def endless(self) -> str | None:
        """The first option that has no end of values."""
        return next((d.option for d in self.dimensions if d.size is None), None)

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

    def refusals(self, compose: Compose) -> list[str]:
        """Why the ends of ranges, and choices, are no values of their options: a line for each."""
        problems: dict[str, str] = {}
        for dimension in self.dimensions:
            for corner in dimension.corners:
                text = override(dimension.option, corner)
                for setting in self.settings(dimension):
                    others = [f"{option}={value}" for option, value in setting.items()]
                    try:
                        compose([*others, text])
                    except ConfigError as error:
                        beside = f" (with {' '.join(others)})" if others else ""
                        for problem in error.problems:
                            # An option that there is not is told of once, not for each value.
                            like = problem.replace(text, dimension.option)
                            problems.setdefault(like, f"{WHERE}: {problem}{beside}")
        return list(problems.values())


def override(option: str, value: Any) -> str:
    """An option and its value as one types them: what Hydra reads from it is this very value."""
    return f"{option}={typed(value)}"


def typed(value: Any) -> str:
    """A plain value as Hydra's command line has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(typed, value)) + "]"
    if isinstance(value, str) and (not PLAIN.fullmatch(value) or value.lower() in WORDS):
        return quoted(value)
    return str(value)  # of a float the shortest that is read as the same


def _stored(choice: Any) -> Any:
    """A choice as Optuna can store it: a list as text."""
    return typed(choice) if isinstance(choice, list) else choice


def _active(dimension: Dimension, made: Mapping[str, Any]) -> bool:
    return all(o in made and _typed(made[o]) in values for o, values in dimension.when.items())


def _typed(stored: Any) -> str:
    return stored if isinstance(stored, str) and stored.startswith("[") else typed(stored)


def _dimension(option: str, entry: Any, problems: list[str]) -> Dimension | None:
    """What an entry says; None, and why in `problems`, if that is nothing of use."""
    where, before = f"{WHERE}.{option}", len(problems)
    given = {"choices": entry} if isinstance(entry, list) else entry
    if not isinstance(given, dict):
        problems.append(f"{where}={shown(entry)}: must be choices [a, b], or {{low: 1, high: 2}}")
        return None
    problems += [
        f"{where}.{key}: {unknown('a range has', 'option', str(key), KEYS)}"
        for key in given
        if key not in KEYS
    ]
    when = given.get("when") or {}
    if not isinstance(when, dict):
        problems.append(f"{where}.when={shown(when)}: must be {{option: choice}}")
        when = {}
    if len(problems) == before:
        if "choices" in given:
            problems += _wrong_choices(where, given)
        else:
            problems += _wrong_range(where, given)
    if len(problems) > before:
        return None
    conditions = {
        str(o): [typed(v) for v in (values if isinstance(values, list) else [values])]
        for o, values in when.items()
    }
    return Dimension(option, **{k: v for k, v in given.items() if k != "when"}, when=conditions)


def _wrong_choices(where: str, given: dict[str, Any]) -> Iterator[str]:
    choices, others = given["choices"], [k for k in given if k not in ("choices", "when")]
    if others:
        yield f"{where}.{others[0]}: goes with a range, and there are choices"
    if not isinstance(choices, list) or not choices:
        yield f"{where}={shown(choices)}: must be choices, at least one, such as [a, b]"
        return
    if any(isinstance(leaf, dict) for c in choices for leaf in (c if isinstance(c, list) else [c])):
        yield f"{where}={shown(choices)}: a choice must be a value or a list of values"
        return
    texts = [typed(choice) for choice in choices]
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        yield f"{where}={shown(choices)}: has {', '.join(twice)} twice"


def _wrong_range(where: str, given: dict[str, Any]) -> Iterator[str]:
    numbers = {
        key: given.get(key) for key in ("low", "high", *(["step"] if "step" in given else []))
    }
    unfit = [k for k, v in numbers.items() if type(v) not in (int, float) or not math.isfinite(v)]  # type: ignore[arg-type]
    for key in unfit:
        yield f"{where}.{key}={shown(numbers[key])}: must be a number"
    log = given.get("log", False)
    if not isinstance(log, bool):
        yield f"{where}.log={shown(log)}: must be true or false"
    if unfit:
        return
    low, high, step = (Decimal(str(numbers.get(key, 1))) for key in ("low", "high", "step"))
    if low > high:
        yield f"{where}.low={low}: is more than high={high}"
    if log is True and low <= 0:
        yield f"{where}.low={low}: must be more than 0 with log=true"
    if "step" not in given:
        return
    if log is True:
        yield f"{where}.step={step}: goes without log=true; leave out one of the two"
    elif step <= 0:
        yield f"{where}.step={step}: must be more than 0"
    elif low < high and (rest := (high - low) % step):
        yield f"{where}.step={step}: does not lead to high={high}; take high={high - rest}"


def _conditions(
    dimension: Dimension, dimensions: Mapping[str, Dimension], all_options: Mapping[str, Any]
) -> Iterator[str]:
    for option, values in dimension.when.items():
        where = f"{WHERE}.{dimension.option}.when.{option}"
        parent = dimensions.get(option)
        if option not in all_options:
            yield f"{where}: {unknown('the space has', 'option', option, list(all_options))}"
        elif parent and parent.choices is None:
            yield f"{where}: has a range, and a condition needs choices"
        elif parent:
            choices = [typed(choice) for choice in parent.choices or []]
            for value in (value for value in values if value not in choices):
                yield f"{where}={value}: {unknown(f'{option} has', 'choice', value, choices)}"


def _sorted(dimensions: Mapping[str, Dimension]) -> tuple[list[Dimension], list[str]]:
    """Parents first; or a line that names what asks for each other in a circle."""
    placed: dict[str, Dimension] = {}
    left = dict(dimensions)
    while left:
        ready = [o for o, d in left.items() if all(option in placed for option in d.when)]
        if not ready:
            names = ", ".join(f"{WHERE}.{o}.when" for o in left)
            return [], [f"{names}: conditions that go round in a circle"]
        placed |= {option: left.pop(option) for option in ready}
    return list(placed.values()), []
