"""Search run as a sweep: validation, rounds of trials on a launcher, pruning, summary."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from omegaconf import DictConfig, OmegaConf
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.samplers import BruteForceSampler
from optuna.trial import TrialState

from cnntrain.config import ConfigError, as_config_error, build
from cnntrain.config.resume import read_result, result_with_status
from cnntrain.sweeps.members import ComposedRun, PlannedMember, SweepFolder, directory_name
from cnntrain.sweeps.search import Search, Space, typed
from cnntrain.sweeps.study import SearchStudy, no_warnings, replaced, suggest_trial
from cnntrain.sweeps.sweep import Launch, Print, Sweep, SweepRunner, format_metric
from cnntrain.sweeps.tables import write_hparams_schema

if TYPE_CHECKING:
    pass

Compose = Callable[[Sequence[str]], DictConfig]  # from further overrides to a checked config
FOR_IMPORTANCE = 20  # completed trials


class SearchSweep:
    """The trials of a search as members of a sweep's folder.

    Construction writes nothing.

    Args:
        folder: The sweep's folder.
        options: Options of the sweep.
        node: The checked config node `search`.
        seed: Seed of the samplers.
        base: Overrides common to all trials.
        command: Formats the command line of a run with given overrides.
        compose: Composes and checks a config, with the node `hydra`.
        at_once: Number of trials per round.

    Raises:
        ConfigError: The folder is damaged, or not that of a search.
    """

    def __init__(
        self,
        folder: Path,
        options: Sweep,
        node: DictConfig,
        *,
        seed: int,
        base: Sequence[str],
        command: Callable[[Sequence[str]], str],
        compose: Compose,
        at_once: int,
    ):
        self.folder, self.options, self.node = SweepFolder(folder, search=True), options, node
        self.seed, self.base, self.compose, self.at_once = seed, base, compose, at_once
        self.command = command

    @property
    def size(self) -> str:
        return f"{self.node.trials} trials, {self.at_once} at once"

    def run(self, launch: Launch, write: Print) -> SweepRunner:
        """Run rounds of trials until there are `trials` in all.

        Raises ConfigError if another process runs the same search or its settings have changed, and
        Interrupted after a signal, when the running trials have saved.
        """
        with self.folder.locked():
            study = SearchStudy(self.folder.path, self.node, seed=self.seed)
            columns = {d.option: d.corners for d in study.search.space.dimensions}
            write_hparams_schema(self.folder.path, columns)
            done = sum(trial.state.is_finished() for trial in study.trials)
            total = max(study.search.trials, len(study.trials) - len(replaced(study.trials)))
            runner = SweepRunner(self.folder, self.options, columns, total, done, write)
            settings: Any = OmegaConf.to_container(self.node, resolve=True)
            while asked := study.ask(self.at_once):
                trials = [
                    PlannedMember(
                        directory_name(trial.name),
                        ComposedRun.of(self.compose([*self.base, *trial.overrides])),
                        trial.values,
                        trial.number,
                    )
                    for trial in asked
                ]
                members = self.folder.extend(trials, list(columns))
                self.folder.write(**self.options.facts, search=settings)
                runner.csv_outdated = True
                runner.run([m for m in members if not self._ended(m)], launch)
                results = {m.trial: read_result(self.folder.directory(m.name)) for m in members}
                study.tell({number: r for number, r in results.items() if number is not None})
                if self.options.fail_fast and runner.failed:
                    break
            runner.write_csv()
            runner.findings = summary(study, lambda own: self.command([*self.base, *own]))
            return runner

    def _ended(self, member: PlannedMember) -> bool:
        directory = self.folder.directory(member.name)
        return (
            result_with_status(directory, member.config_hash, ("completed", "pruned")) is not None
        )


def search_problems(node: DictConfig, compose: Compose, given: Sequence[str] = ()) -> list[str]:
    """Problems of the config node `search`, whose keys and types are checked already.

    Args:
        node: The node; nothing is written.
        compose: Composes and checks a run's config with further overrides.
        given: Overrides common to all runs.
    """
    found = []
    if node.get("metric", "").startswith("test/"):
        better = node.metric.replace("test", "val")
        found.append(
            f"search.metric={node.metric}: the test metric of a run selected by it is biased; "
            f"take {better}"
        )
    try:
        space = Space(node.get("space"))
    except ConfigError as error:
        return [*found, *error.problems]
    options = [d.option for d in space.dimensions]
    found += [
        f"{text}: is searched over, see search.space; leave it out"
        for text in given
        if text.lstrip("+").partition("=")[0] in options
    ]
    if found := found + value_problems(space, compose):
        return found
    try:
        suggest_once(node)
    except ConfigError as error:
        return error.problems
    return []


def value_problems(space: Space, compose: Compose) -> list[str]:
    """Bounds and choices that their options reject, a line each.

    Each is tried alone, and each choice also together with the first values of all others.
    """
    problems: dict[str, str] = {}
    for complete in (False, True):
        for dimension in space.dimensions:
            corners = [] if complete and dimension.choices is None else dimension.corners
            for made in (
                {**setting, dimension.option: typed(corner)}
                for corner in corners
                for setting in space.settings(dimension)
            ):
                options = _completed(space, made) if complete else made
                try:
                    compose([f"{option}={value}" for option, value in options.items()])
                except ConfigError as error:
                    for problem in error.problems:
                        option = problem.lstrip("+~").partition("=")[0]
                        others = " ".join(f"{o}={v}" for o, v in made.items() if o != option)
                        # An unknown option is reported once, not for each of its values.
                        key = problem.replace(f"{option}={options.get(option)}", option)
                        context = f" (with {others})" if others else ""
                        problems.setdefault(key, f"search.space: {problem}{context}")
    return list(problems.values())


def summary(study: SearchStudy, command: Callable[[Sequence[str]], str]) -> list[str]:
    """Lines for the end of a search: counts, the best trial, its command, the importances.

    `command` formats the command line of a trial with given overrides.
    """
    trials = [trial for trial in study.trials if trial.number not in replaced(study.trials)]
    states = [trial.state for trial in trials]
    completed = states.count(TrialState.COMPLETE)
    counts = f"{completed} completed, {states.count(TrialState.PRUNED)} pruned, "
    counts += f"{states.count(TrialState.FAIL)} failed"
    wanted, metric = study.search.trials, study.search.metric
    size = f"{len(trials)} of {wanted} trials"
    if len(trials) > wanted:
        size = f"{len(trials)} trials, more than search.trials={wanted}"
    lines = [f"search       {size}: {counts}"]
    if not completed:
        return lines
    best = study.study.best_trial
    trial = study.planned(best)
    lines.append(
        f"best trial   {trial.name.partition(',')[0]}, {metric} {format_metric(metric, best.value)}"
    )
    lines.append(f"             {command(trial.overrides)}")
    if completed >= FOR_IMPORTANCE and len(best.params) > 1:
        shares = importances(study.study)
        lines.append("importance   " + ", ".join(f"{k} {v:.0%}" for k, v in shares.items()))
    return lines


def importances(study: optuna.Study) -> dict[str, float]:
    """Importance of each option for reaching the best quarter (PED-ANOVA, arXiv:2304.10255).

    Of the options that every completed trial has, the most important first.
    """
    with no_warnings():
        completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        common = [o for o in completed[0].params if all(o in t.params for t in completed)]
        evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)
        return optuna.importance.get_param_importances(study, evaluator=evaluator, params=common)


def suggest_once(node: DictConfig) -> None:
    """Build the search and suggest a trial, in memory. ConfigError for what is rejected."""
    with no_warnings():
        with as_config_error("search.pruner"):
            build(node.pruner)
        with as_config_error("search.sampler"):
            sampler = build(node.sampler)(seed=0)
        with as_config_error("search"):
            search: Search = build(node)
        continuous = [d.option for d in search.space.dimensions if d.size is None]
        if isinstance(sampler, BruteForceSampler) and continuous:
            raise ConfigError(
                [
                    f"search/sampler: tries all combinations, and search.space.{continuous[0]} is "
                    "continuous; give it a step or choices, or take search/sampler=tpe"
                ]
            )
        with as_config_error("search.sampler"):
            suggest_trial(search, [], 0, "validation")


def _completed(space: Space, made: Mapping[str, str]) -> dict[str, str]:
    """Choices with the first value of every other option that applies."""
    found: dict[str, str] = {}
    for d in space.dimensions:
        if d.option in made or all(found.get(o) in values for o, values in d.when.items()):
            found[d.option] = made.get(d.option) or typed(d.corners[0])
    return found
