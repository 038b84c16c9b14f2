"""Optuna's study of a search: asked for trials, told how they ended, and gone on with after
whatever interruption, as if there had been none."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from omegaconf import DictConfig, OmegaConf
from optuna.pruners import NopPruner
from optuna.samplers import BruteForceSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from cnntrain.config import ConfigError, as_config_error, build
from cnntrain.sweeps.dimension import override, typed
from cnntrain.sweeps.journal import load, quietly, storage
from cnntrain.sweeps.search import Search

FIRST_EPOCH = "first epoch"  # the step of a trial's first report; missing: 0, in earlier versions
# Optuna's names for a trial that takes the place of a failed one, as its own callbacks give them.
FIRST, HISTORY = "failed_trial", "retry_history"
ERROR, DIVERGED = "error", "diverged"  # ours, of a failed trial


@dataclass(frozen=True)
class Asked:
    """A trial to be run: the study's number of it, its member's name and its own overrides."""

    number: int
    name: str
    overrides: list[str]
    values: dict[str, Any]


class Study:
    """The study in a sweep's folder, begun there if it has none.

    `node` is the config's node `search`, checked, and `seed` what the samplers' seeds are made of.
    Raises ConfigError if the study that is there was begun with another space, metric or seed.
    """

    def __init__(self, folder: Path, node: DictConfig, *, seed: int):
        with as_config_error("search"), quietly():
            self.search: Search = build(node)
        self.seed = seed
        self.asked: set[int] = set()  # by this process
        content: Any = OmegaConf.to_container(node, resolve=True)
        fixed = {"space": content["space"], "metric": self.search.metric, "seed": seed}
        self.study = _begun(folder) or optuna.create_study(
            study_name=folder.absolute().name,
            storage=storage(folder),
            direction=self.search.direction,
            sampler=RandomSampler(),
            pruner=NopPruner(),
        )
        if self.study.get_trials(deepcopy=False):
            before = {key: self.study.user_attrs.get(key) for key in fixed}
            if problems := _differences(before, fixed):
                raise ConfigError([f"{text} (says {folder})" for text in problems])
        else:
            self.study.set_user_attr(FIRST_EPOCH, 1)
        # What members ask whether to go on, and how trials were chosen: these may change.
        attributes = {**fixed, "sampler": content["sampler"], "pruner": content["pruner"]}
        for key, value in attributes.items():
            if self.study.user_attrs.get(key) != value:
                self.study.set_user_attr(key, value)
        self._retry_failed()

    def ask(self, most: int = 1) -> list[Asked]:
        """The next trials to be run, `most` at once; none if `trials` are run, or all there are.

        First those that an interruption has left, with the parameters and the names that they had.
        Then new ones, each stored at once with all its parameters: a kill loses none and leaves no
        half of one.
        """
        trials = self.study.get_trials(deepcopy=False)
        left = [t for t in trials if not t.state.is_finished() and t.number not in self.asked]
        number = len(trials) - len(replaced(trials))
        # A round that a kill has cut short is filled up: its trials knew nothing of each other.
        while number < self.search.trials and len(left) < most and (not left or number % most):
            if (trial := self._new()) is None:
                break
            left.append(trial)
            number += 1
        self.asked |= {trial.number for trial in left[:most]}
        return [self.asked_for(trial) for trial in left[:most]]

    def tell(self, results: Mapping[int, Mapping[str, Any] | None]) -> None:
        """How trials ended, by their numbers: what their result.json says, None without one.

        A trial whose run is not over, as when it was interrupted, will be asked for again. So will
        one that failed when the search is started again, unless it failed by its parameters: what
        was not a number once will not be one the next time.
        """
        for number, result in results.items():
            trial = self.study.get_trials(deepcopy=False)[number]
            status = result["status"] if result else None
            if trial.state.is_finished() or result is None:
                continue
            if status == "completed":
                value = result["metrics"][self.search.metric]
                self.study.tell(number, value, TrialState.COMPLETE)
            elif status == "pruned":
                self.study.tell(number, state=TrialState.PRUNED)
            elif status == "failed":
                handle = optuna.trial.Trial(self.study, trial._trial_id)
                handle.set_user_attr(ERROR, result.get("error"))
                handle.set_user_attr(DIVERGED, "not_finite" in result)
                self.study.tell(number, state=TrialState.FAIL)

    def _new(self) -> FrozenTrial | None:
        """A trial with parameters of its own, stored; None if every combination has been tried."""
        trials = self.study.get_trials(deepcopy=False)
        size = self.search.space.size
        if size is not None and len({json.dumps(t.params, sort_keys=True) for t in trials}) >= size:
            return None
        trial = sample(self.search, trials, self.seed, self.study.study_name)
        self.study.add_trial(trial)
        return self.study.get_trials(deepcopy=False)[-1]

    def _retry_failed(self) -> None:
        """Failed trials once more: others in their place, as none that is over can be changed."""
        trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            again = trial.state == TrialState.FAIL and not trial.user_attrs.get(DIVERGED)
            if not again or trial.number in replaced(trials):
                continue
            history = [*trial.system_attrs.get(HISTORY, []), trial.number]
            decided = {k: v for k, v in trial.user_attrs.items() if k not in (ERROR, DIVERGED)}
            self.study.add_trial(
                create_trial(
                    state=TrialState.RUNNING,
                    params=trial.params,
                    distributions=trial.distributions,
                    intermediate_values=trial.intermediate_values,  # its run goes on
                    user_attrs=decided,
                    system_attrs={**trial.system_attrs, FIRST: history[0], HISTORY: history},
                )
            )

    def asked_for(self, trial: FrozenTrial) -> Asked:
        """A trial of the study as it was, or is to be, run."""
        values = self.search.space.values(trial.params)
        number = trial.system_attrs.get(FIRST, trial.number)  # its directory is the first one's
        rounded = {option: _rounded(value) for option, value in values.items()}
        name = ",".join([f"trial={number:03}", *(f"{o}={rounded[o]}" for o in sorted(rounded))])
        return Asked(trial.number, name, [override(o, v) for o, v in values.items()], values)


def _begun(folder: Path) -> optuna.Study | None:
    """The study in a folder if it has trials; one without is as good as none, and is removed."""
    stored = storage(folder)
    names = optuna.get_all_study_names(stored)
    if names and (study := load(folder)).get_trials(deepcopy=False):
        return study
    for name in names:
        optuna.delete_study(study_name=name, storage=stored)
    return None


def sample(search: Search, trials: Sequence[FrozenTrial], seed: int, name: str) -> FrozenTrial:
    """The trial that a sampler suggests after these, running, with all its parameters.

    A function of its arguments: the sampler is a new one each time, with a seed of its own, and
    works on a copy of the study.
    """
    with quietly():
        own_seed = np.random.SeedSequence([seed, len(trials)]).generate_state(1)
        study = optuna.create_study(
            study_name=name,
            direction=search.direction,
            sampler=search.sampler(seed=int(own_seed[0])),
            pruner=search.pruner,
        )
        study.add_trials(trials)
        search.space.suggest(study.ask())
        found = study.get_trials(deepcopy=False)[-1]
    return create_trial(
        state=TrialState.RUNNING,
        params=search.space.exact(found.params),
        distributions=found.distributions,
        user_attrs=found.user_attrs,
        system_attrs=found.system_attrs,
    )


def dry_run(node: DictConfig) -> None:
    """Build what a search is made of and have it suggest a trial. Nothing is written.

    Raises ConfigError for what constructors, or the first trial, refuse.
    """
    with quietly():
        with as_config_error("search.pruner"):
            build(node.pruner)
        with as_config_error("search.sampler"):
            sampler = build(node.sampler)(seed=0)
        with as_config_error("search"):
            search: Search = build(node)
        if isinstance(sampler, BruteForceSampler) and (option := search.space.endless()):
            raise ConfigError(
                [
                    f"search/sampler: goes through all combinations, and search.space.{option} has "
                    "no end of values; give it a step or choices, or take search/sampler=tpe"
                ]
            )
        with as_config_error("search.sampler"):
            sample(search, [], 0, "dry run")


def replaced(trials: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of failed trials that later ones stand in for."""
    return {number for trial in trials for number in trial.system_attrs.get(HISTORY, [])}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    old, new = _leaves(before), _leaves(now)
    return [
        f"{key}={typed(new[key]) if key in new else '(left out)'}: the search was begun with "
        f"{typed(old[key]) if key in old else 'no such option'}; start another with sweep=<name>"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, ...) != new.get(key, ...)
    ]


def _leaves(settings: dict[str, Any]) -> dict[str, Any]:
    found = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        else:
            found[name] = value

    for key, value in settings.items():
        walk(key if key == "seed" else f"search.{key}", value)
    return found


def _rounded(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else typed(value)
