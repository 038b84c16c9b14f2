"""Optuna study stored in the sweep folder: asks for trials, records results, resumes.

The storage is Optuna's journal and not SQLite, whose locks do not work on the network file systems
of clusters.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from cnntrain.config import ConfigError, as_config_error, build
from cnntrain.config.errors import format_error
from cnntrain.sweeps.search import Search, override, typed

STUDY = "study.journal"
# System attributes of Optuna's RetryFailedTrialCallback: a trial that replaces a failed one.
FIRST, HISTORY = "failed_trial", "retry_history"
ERROR, DIVERGED = "error", "diverged"  # user attributes of a failed trial

optuna.logging.set_verbosity(optuna.logging.ERROR)


class JournalLock(JournalFileOpenLock):
    """A lock of the operating system, released when its process ends.

    Optuna's own lock is a file, which a killed writer leaves behind. An incomplete last line of
    such a writer is removed: Optuna would append to it and could read neither afterwards.
    """

    def __init__(self, file: Path):
        super().__init__(str(file))
        self.file, self.lock = file, FileLock(file.with_name(f".{file.name}.lock"))

    def acquire(self) -> bool:
        self.lock.acquire()
        with self.file.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            complete = file.read() in (b"", b"\n")
        if not complete:
            os.truncate(self.file, self.file.read_bytes().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.lock.release()


def open_storage(folder: Path) -> JournalStorage:
    """The storage in a folder, created if there is none. ConfigError if it is damaged."""
    file = folder.absolute() / STUDY
    try:
        storage = JournalStorage(JournalFileBackend(str(file), JournalLock(file)))
        complete = file.read_bytes().rpartition(b"\n")[0]
        # Optuna reports a damaged last line only after another one.
        json.loads(complete.rpartition(b"\n")[2] or "null")
        return storage
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        problem = f"{file}: is damaged ({format_error(error)}); set another sweep=<name>"
        raise ConfigError([problem]) from None


def load_study(folder: Path) -> optuna.Study:
    """The study in a folder, without its sampler and pruner."""
    return _load(open_storage(folder))


def open_trial(folder: Path, number: int) -> optuna.trial.Trial:
    """A running trial, to report intermediate values and attributes to."""
    storage = open_storage(folder)
    study = _load(storage)
    study_id = storage.get_study_id_from_name(study.study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
    return optuna.trial.Trial(study, trial_id)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Without Optuna's warnings of experimental and deprecated features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class PlannedTrial:
    """A trial to be run: its number in the study, its member's name and its overrides."""

    number: int
    name: str
    overrides: list[str]
    values: dict[str, Any]


class SearchStudy:
    """The study in a sweep's folder, created if there is none.

    Args:
        folder: The sweep's folder.
        node: The checked config node `search`.
        seed: Seed of the samplers.

    Raises ConfigError if the existing study has another space, metric or seed.
    """

    def __init__(self, folder: Path, node: DictConfig, *, seed: int):
        with as_config_error("search"), no_warnings():
            self.search: Search = build(node)
        self.folder, self.seed = folder, seed
        self.asked: set[int] = set()  # numbers, by this process
        content: Any = OmegaConf.to_container(node, resolve=True)
        fixed = {"space": content["space"], "metric": self.search.metric, "seed": seed}
        if study := _existing_study(folder):
            before = {key: study.user_attrs.get(key) for key in fixed}
            if problems := _differences(before, fixed):
                raise ConfigError([f"{text} (says {folder})" for text in problems])
        self.study = study or optuna.create_study(
            study_name=folder.absolute().name,
            storage=open_storage(folder),
            direction=self.search.direction,
            sampler=RandomSampler(),
            pruner=NopPruner(),
        )
        # Members read the pruner from here; it and the sampler may change.
        attributes = {**fixed, "sampler": content["sampler"], "pruner": content["pruner"]}
        for key, value in attributes.items():
            if self.study.user_attrs.get(key) != value:
                self.study.set_user_attr(key, value)
        self._retry_failed()

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def ask(self, most: int = 1) -> list[PlannedTrial]:
        """The next trials, at most `most`; none when all are finished or all values are tried.

        First those left by an interruption, with their parameters and names. Then new ones, each
        stored at once with all its parameters, so that a kill leaves no incomplete trial.
        """
        trials = self.trials
        left = [t for t in trials if not t.state.is_finished() and t.number not in self.asked]
        number = len(trials) - len(replaced(trials))
        # A round cut short by a kill is completed: its trials did not know each other's results.
        while number < self.search.trials and len(left) < most and (not left or number % most):
            if (trial := self._new()) is None:
                break
            left.append(trial)
            number += 1
        self.asked |= {trial.number for trial in left[:most]}
        return [self.planned(trial) for trial in left[:most]]

    def tell(self, results: Mapping[int, Mapping[str, Any] | None]) -> None:
        """Record results by trial number: the content of result.json, or None.

        A trial that is not finished will be asked for again. So will a failed one when the search
        is started again, unless it diverged, which depends on its parameters alone.
        """
        trials = self.trials
        for number, result in results.items():
            status = result["status"] if result else None
            if trials[number].state.is_finished() or result is None:
                continue
            if status == "completed":
                value = result["metrics"][self.search.metric]
                self.study.tell(number, value, TrialState.COMPLETE)
            elif status == "pruned":
                self.study.tell(number, state=TrialState.PRUNED)
            elif status == "failed":
                trial = open_trial(self.folder, number)
                trial.set_user_attr(ERROR, result.get("error"))
                trial.set_user_attr(DIVERGED, "not_finite" in result)
                self.study.tell(number, state=TrialState.FAIL)

    def planned(self, trial: FrozenTrial) -> PlannedTrial:
        values = self.search.space.values(trial.params)
        number = trial.system_attrs.get(FIRST, trial.number)  # of the directory
        rounded = {
            o: f"{value:.4g}" if isinstance(value, float) else typed(value)
            for o, value in sorted(values.items())
        }
        name = ",".join([f"trial={number:03}", *(f"{o}={text}" for o, text in rounded.items())])
        return PlannedTrial(trial.number, name, [override(o, v) for o, v in values.items()], values)

    def _new(self) -> FrozenTrial | None:
        """A new trial, stored; None if every combination has been tried."""
        trials, size = self.trials, self.search.space.size
        if size is not None and len({json.dumps(t.params, sort_keys=True) for t in trials}) >= size:
            return None
        trial = suggest_trial(self.search, trials, self.seed, self.study.study_name)
        self.study.add_trial(trial)
        return self.trials[-1]

    def _retry_failed(self) -> None:
        """Add a trial in place of each failed one, as finished trials cannot be changed."""
        trials = self.trials
        for trial in trials:
            retry = trial.state == TrialState.FAIL and not trial.user_attrs.get(DIVERGED)
            if not retry or trial.number in replaced(trials):
                continue
            history = [*trial.system_attrs.get(HISTORY, []), trial.number]
            attributes = {k: v for k, v in trial.user_attrs.items() if k not in (ERROR, DIVERGED)}
            self.study.add_trial(
                create_trial(
                    state=TrialState.RUNNING,
                    params=trial.params,
                    distributions=trial.distributions,
                    intermediate_values=trial.intermediate_values,  # its run is resumed
                    user_attrs=attributes,
                    system_attrs={**trial.system_attrs, FIRST: history[0], HISTORY: history},
                )
            )


def suggest_trial(
    search: Search, trials: Sequence[FrozenTrial], seed: int, name: str
) -> FrozenTrial:
    """The trial that the sampler suggests after these, with all its parameters.

    A pure function: the sampler is created anew, with a seed from `seed` and the number of trials,
    and works on a copy of the study.
    """
    with no_warnings():
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


def replaced(trials: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of failed trials that later ones replace."""
    return {number for trial in trials for number in trial.system_attrs.get(HISTORY, [])}


def _load(storage: JournalStorage) -> optuna.Study:
    passive: Any = {"sampler": RandomSampler(), "pruner": NopPruner()}
    return optuna.load_study(study_name=None, storage=storage, **passive)


def _existing_study(folder: Path) -> optuna.Study | None:
    """The study in a folder if it has trials; one without is deleted."""
    storage = open_storage(folder)
    names = optuna.get_all_study_names(storage)
    if names and (study := _load(storage)).get_trials(deepcopy=False):
        return study
    for name in names:
        optuna.delete_study(study_name=name, storage=storage)
    return None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    def flat(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        inner = [flat(f"{name}.{key}", inner) for key, inner in value.items()]
        return {key: value for table in inner for key, value in table.items()}

    tables = [flat("search", settings) for settings in (before, now)]
    old, new = ({"seed": table.pop("search.seed"), **table} for table in tables)
    return [
        f"{key}={typed(new[key]) if key in new else '(left out)'}: the search was begun with "
        f"{typed(old[key]) if key in old else 'no such option'}; start another with sweep=<name>"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, ...) != new.get(key, ...)
    ]
