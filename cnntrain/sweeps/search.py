"""Search: the search space, its validation, and trials run as members of a sweep."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import PositiveInt

from cnntrain.config import ConfigError, as_config_error, build
from cnntrain.config.errors import collect, format_error, format_value, unknown
from cnntrain.config.overrides import parsed
from cnntrain.config.resume import read_result, result_with_status
from cnntrain.sweeps.members import ComposedRun, PlannedMember, SweepFolder, directory_name, typed
from cnntrain.sweeps.records import is_number
from cnntrain.sweeps.study import SearchStudy, no_warnings, suggest_trial, summary
from cnntrain.sweeps.sweep import Launch, Sweep, SweepRunner, write_hparams_schema

Metric = Literal["val/acc", "val/loss", "train/acc", "train/loss"]
Compose = Callable[[Sequence[str]], DictConfig]  # from further overrides to a checked config

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


@dataclass(frozen=True)
class SearchSweep:
    """The trials of a search as members of a sweep's folder."""

    folder: SweepFolder
    options: Sweep
    node: DictConfig  # the checked config node `search`
    seed: int  # of the samplers
    command: Callable[[Sequence[str]], str]  # formats a trial's command line from its overrides
    compose: Compose  # composes and checks a trial's config, with the node `hydra`
    at_once: int  # trials per round

    @property
    def size(self) -> str:
        return f"{self.node.trials} trials, {self.at_once} at once"

    def run(self, launch: Launch) -> SweepRunner:
        """Run rounds of trials until there are `trials` in all.

        Raises ConfigError if another process runs the same search or its settings have changed, and
        Interrupted after a signal, when the running trials have saved.
        """
        path = self.folder.path
        with self.folder.locked():
            study = SearchStudy(path, self.node, seed=self.seed)
            columns = {d.option: d.corners for d in study.search.space.dimensions}
            write_hparams_schema(path, columns)
            done = sum(trial.state.is_finished() for trial in study.trials)
            total = max(study.search.trials, len(study.trials))
            runner = SweepRunner(self.folder, self.options, columns, total, done)
            settings: Any = OmegaConf.to_container(self.node, resolve=True)
            while asked := study.ask(self.at_once):
                trials = [
                    PlannedMember(
                        directory_name(trial.name),
                        ComposedRun.of(self.compose(trial.overrides)),
                        trial.values,
                        trial.number,
                    )
                    for trial in asked
                ]
                members = self.folder.extend(trials, list(columns))
                self.folder.write(self.options.metric, settings)
                runner.write_csv()
                ended = ("completed", "pruned")
                left = [m for m in members
                        if not result_with_status(path / m.name, m.config_hash, ended)]  # fmt: skip
                runner.run(left, launch)
                results = {m.trial: read_result(path / m.name) for m in members}
                study.tell({number: r for number, r in results.items() if number is not None})
                if self.options.fail_fast and runner.failed:
                    break
            runner.write_csv()
            runner.summary = summary(study, self.command)
            return runner


def search_problems(node: DictConfig, compose: Compose, given: Sequence[str] = ()) -> list[str]:
    """Problems of the config node `search`, whose keys and types are checked already.

    Each bound and choice is composed with the first values of all other options. `given` are the
    overrides common to all trials.
    """
    try:
        with no_warnings(), as_config_error("search"):
            search: Search = build(node)
            suggest_trial(search, [], 0)
    except ConfigError as error:
        return error.problems
    options = [d.option for d in search.space.dimensions]
    if found := [
        f"{text}: is searched over, see search.space; leave it out"
        for text in given
        if text.lstrip("+").partition("=")[0] in options
    ]:
        return found
    problems: dict[str, str] = {}
    for d in search.space.dimensions:
        conditions = [[(o, value) for value in values] for o, values in d.when.items()]
        for corner, *setting in itertools.product(d.corners, *conditions):
            made = {**dict(setting), d.option: corner}
            params = search.space.completed(made)
            try:
                compose([f"{o}={v}" for o, v in params.items()])
            except ConfigError as error:
                for problem in error.problems:
                    option = problem.lstrip("+~").partition("=")[0]
                    others = " ".join(f"{o}={v}" for o, v in made.items() if o != option)
                    # An unknown option is reported once, not for each of its values.
                    key = problem.replace(f"{option}={params.get(option)}", option)
                    context = f" (with {others})" if others else ""
                    problems.setdefault(key, f"{WHERE}: {problem}{context}")
    return list(problems.values())


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
