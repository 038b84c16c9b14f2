"""Trials of a search as members of a sweep, and the check of a search before it starts."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cnntrain.config import ConfigError, as_config_error, build
from cnntrain.config.resume import read_result, result_with_status
from cnntrain.sweeps.members import ComposedRun, PlannedMember, SweepFolder, directory_name
from cnntrain.sweeps.search import WHERE, Search
from cnntrain.sweeps.study import SearchStudy, no_warnings, suggest_trial, summary
from cnntrain.sweeps.sweep import Launch, Sweep, SweepRunner, write_hparams_schema

Compose = Callable[[Sequence[str]], DictConfig]  # from further overrides to a checked config


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
                left = [
                    m
                    for m in members
                    if not result_with_status(path / m.name, m.config_hash, ended)
                ]
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
