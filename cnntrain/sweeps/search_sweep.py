"""Trials of a search as members of a sweep, and the check of a search before it starts."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cnntrain.config import ConfigError, as_config_error, build
from cnntrain.config.resume import read_result
from cnntrain.sweeps.members import ComposedRun, PlannedMember, SweepFolder, directory_name
from cnntrain.sweeps.search import WHERE, Search
from cnntrain.sweeps.study import SearchStudy, no_warnings, suggest_trial, summary
from cnntrain.sweeps.sweep import Launch, Sweep, SweepRunner, write_hparams_schema

Compose = Callable[[Sequence[str]], DictConfig]  # from further overrides to a checked config


class SearchSweep(SweepRunner):
    """The trials of a search as members of a sweep's folder.

    Args:
        cfg: The checked config, whose seed is that of the samplers.
        command: Formats a trial's command line from its overrides.
        compose: Composes and checks a trial's config, with the node `hydra`.
        at_once: Trials per round.
    """

    def __init__(
        self,
        folder: Path,
        options: Sweep,
        cfg: DictConfig,
        command: Callable[[Sequence[str]], str],
        compose: Compose,
        at_once: int,
    ):
        super().__init__(SweepFolder(folder, search=True), options)
        self.node, self.seed, self.at_once = cfg.search, cfg.seed, at_once
        self.command, self.compose = command, compose
        self.size = f"{self.node.trials} trials, {at_once} at once"

    def run(self, launch: Launch) -> None:
        """Run rounds of trials until there are `trials` in all. Raises as SearchStudy does."""
        path = self.folder.path
        with self.folder.locked():
            study = SearchStudy(path, self.node, seed=self.seed)
            self.columns = {d.option: d.corners for d in study.search.space.dimensions}
            write_hparams_schema(path, self.columns)
            self.done = sum(trial.state.is_finished() for trial in study.trials)
            self.total = max(study.search.trials, len(study.trials))
            settings: Any = OmegaConf.to_container(self.node, resolve=True)
            while asked := study.ask(self.at_once):
                trials = []
                for t in asked:
                    run = ComposedRun.of(self.compose(t.overrides))
                    trials.append(PlannedMember(directory_name(t.name), run, t.values, t.number))
                members = self.folder.extend(trials, list(self.columns))
                self.folder.write(self.options.metric, settings)
                self.write_csv()
                left = [m for m in members if not self.folder.ended(m, "completed", "pruned")]
                self.run_members(left, launch)
                results = [read_result(path / member.name) for member in members]
                study.tell({t.number: r for t, r in zip(asked, results, strict=True)})
                if self.options.fail_fast and self.failed:
                    break
            self.write_csv()
            self.summary = summary(study, self.command)


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
    if typed := [text for text in given if text.lstrip("+").partition("=")[0] in options]:
        return [f"{text}: is searched over, see search.space; leave it out" for text in typed]
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
