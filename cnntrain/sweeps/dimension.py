"""An option of a search and the values that it may have, as the config declares them."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from cnntrain.config import quoted
from cnntrain.config.errors import format_value, unknown

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
            trial.suggest_categorical(self.option, [stored(c) for c in self.choices])
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

    def value(self, known: Any) -> Any:
        """The option's value by what Optuna knows of it."""
        found = [c for c in self.choices or [] if isinstance(c, list) and stored(c) == known]
        return found[0] if found else known


def read(option: str, entry: Any, problems: list[str]) -> Dimension | None:
    """What an entry says; None, and why in `problems`, if that is nothing of use."""
    where, before = f"{WHERE}.{option}", len(problems)
    given = {"choices": entry} if isinstance(entry, list) else entry
    if not isinstance(given, dict):
        problems.append(
            f"{where}={format_value(entry)}: must be choices [a, b], or {{low: 1, high: 2}}"
        )
        return None
    problems += [
        f"{where}.{key}: {unknown('a range has', 'option', str(key), KEYS)}"
        for key in given
        if key not in KEYS
    ]
    when = given.get("when") or {}
    if not isinstance(when, dict):
        problems.append(f"{where}.when={format_value(when)}: must be {{option: choice}}")
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
        yield f"{where}={format_value(choices)}: must be choices, at least one, such as [a, b]"
        return
    if any(isinstance(leaf, dict) for c in choices for leaf in (c if isinstance(c, list) else [c])):
        yield f"{where}={format_value(choices)}: a choice must be a value or a list of values"
        return
    texts = [typed(choice) for choice in choices]
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        yield f"{where}={format_value(choices)}: has {', '.join(twice)} twice"


def _wrong_range(where: str, given: dict[str, Any]) -> Iterator[str]:
    numbers = {
        key: given.get(key) for key in ("low", "high", *(["step"] if "step" in given else []))
    }
    unfit = [k for k, v in numbers.items() if type(v) not in (int, float) or not math.isfinite(v)]  # type: ignore[arg-type]
    for key in unfit:
        yield f"{where}.{key}={format_value(numbers[key])}: must be a number"
    log = given.get("log", False)
    if not isinstance(log, bool):
        yield f"{where}.log={format_value(log)}: must be true or false"
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


def stored(choice: Any) -> Any:
    """A choice as Optuna can store it: a list as text."""
    return typed(choice) if isinstance(choice, list) else choice
