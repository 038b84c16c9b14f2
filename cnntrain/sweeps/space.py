"""The space of a search: which options, which values, under which conditions. No Optuna in here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from cnntrain.config import ConfigError
from cnntrain.config.errors import unknown
from cnntrain.sweeps.dimension import WHERE, Dimension, read, stored, typed

Compose = Callable[[Sequence[str]], DictConfig]  # further overrides to a checked config


class Space:
    """Dimensions, those that conditions ask for before those that have them.

    `content` is the node `search.space` as plain containers. Raises ConfigError with a line for
    each thing that is wrong with it.
    """

    def __init__(self, content: Mapping[str, Any]):
        problems: list[str] = []
        if not content:
            problems.append(f"{WHERE}={{}}: has no option to search over")
        found = {o: read(o, entry, problems) for o, entry in content.items()}
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
            return sum(count(others, {**made, first.option: stored(c)}) for c in first.corners)

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
        """Why the ends of ranges, and choices, are no values of their options: a line for each.

        First each by itself, then each choice together with all else that a trial has with it.
        """
        problems: dict[str, str] = {}
        for whole in (False, True):
            for dimension in self.dimensions:
                if whole and dimension.choices is None:
                    continue
                for corner in dimension.corners:
                    for setting in self.settings(dimension):
                        made = {**setting, dimension.option: typed(corner)}
                        self._try(self._filled(made) if whole else made, made, compose, problems)
        return list(problems.values())

    def _filled(self, made: Mapping[str, str]) -> dict[str, str]:
        """Choices with the first value of every other option that goes with them."""
        found: dict[str, str] = {}
        for d in self.dimensions:
            if d.option in made or all(found.get(o) in values for o, values in d.when.items()):
                found[d.option] = made.get(d.option) or typed(d.corners[0])
        return found

    def _try(
        self,
        options: Mapping[str, str],
        made: Mapping[str, str],
        compose: Compose,
        problems: dict[str, str],
    ) -> None:
        try:
            compose([f"{option}={value}" for option, value in options.items()])
        except ConfigError as error:
            for problem in error.problems:
                about = problem.lstrip("+~").partition("=")[0]
                beside = " ".join(f"{o}={v}" for o, v in made.items() if o != about)
                # An option that there is not is told of once, not for each of its values.
                like = problem.replace(f"{about}={options.get(about)}", about)
                with_ = f" (with {beside})" if beside else ""
                problems.setdefault(like, f"{WHERE}: {problem}{with_}")


def _active(dimension: Dimension, made: Mapping[str, Any]) -> bool:
    return all(o in made and _typed(made[o]) in values for o, values in dimension.when.items())


def _typed(value: Any) -> str:
    return value if isinstance(value, str) and value.startswith("[") else typed(value)


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
