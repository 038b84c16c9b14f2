"""Optuna study stored in the sweep folder: asks for trials, records results, resumes."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from optuna.storages import JournalStorage, journal
from optuna.trial import FrozenTrial, TrialState

from cnntrain.config import ConfigError, as_config_error, build, flat
from cnntrain.config.errors import format_error
from cnntrain.config.overrides import parsed
from cnntrain.sweeps.members import OTHER_NAME, differences
from cnntrain.sweeps.records import number, text, unit
from cnntrain.sweeps.search import Search

STUDY = "study.journal"  # not SQLite, whose locks do not work on clusters' network file systems

optuna.logging.set_verbosity(optuna.logging.ERROR)


class JournalLock(journal.JournalFileOpenLock):
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
        storage = JournalStorage(journal.JournalFileBackend(str(file), JournalLock(file)))
        complete = file.read_bytes().rpartition(b"\n")[0]
        # Optuna reports a damaged last line only after another one.
        json.loads(complete.rpartition(b"\n")[2] or "null")
        return storage
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        problem = f"{file}: is damaged ({format_error(error)}); {OTHER_NAME}"
        raise ConfigError([problem]) from None


def open_trial(folder: Path, number: int) -> optuna.trial.Trial:
    """A running trial, to report intermediate values and attributes to."""
    storage = open_storage(folder)
    study = optuna.load_study(study_name=None, storage=storage)
    study_id = storage.get_study_id_from_name(study.study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
    return optuna.trial.Trial(study, trial_id)


def pruning_callback(folder: Path, number: int) -> Any:
    """A Lightning callback that reports the metric of a trial, and raises Pruned."""
    from lightning.pytorch.callbacks import LambdaCallback

    from cnntrain.training import Pruned

    trial = open_trial(folder, number)
    settings, metric = trial.study.user_attrs, trial.study.user_attrs["settings"]["search.metric"]
    stage = metric.partition("/")[0]
    with no_warnings():
        trial.study.pruner = build(OmegaConf.create(settings["pruner"]))

    def report(trainer: Any, module: Any) -> None:
        epoch = trainer.current_epoch + 1
        with no_warnings():
            # Of an epoch that is repeated after an interruption, Optuna keeps the first report.
            trial.report(module.totals[stage].metrics(stage)[metric], epoch)
            pruned = trial.should_prune()
        if pruned and epoch != trainer.max_epochs:
            raise Pruned(f"the pruner stopped the trial in epoch {epoch}")

    return LambdaCallback(on_train_epoch_end=report)


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

    @classmethod
    def of(cls, trial: FrozenTrial) -> "PlannedTrial":
        params = trial.params
        name = [f"trial={trial.number:03}", *(f"{o}={text(params[o])}" for o in sorted(params))]
        typed = [f"{option}={value}" for option, value in params.items()]
        values = {o: parsed(t).value() for o, t in zip(params, typed, strict=True)}
        return cls(trial.number, ",".join(name), typed, values)


class SearchStudy:
    """The study in a sweep's folder, created if there is none.

    Raises ConfigError if an existing one has another space, metric or seed of its samplers.
    """

    def __init__(self, folder: Path, node: DictConfig, *, seed: int):
        with as_config_error("search"), no_warnings():
            self.search: Search = build(node)
        self.folder, self.seed = folder, seed
        self.asked: set[int] = set()  # numbers, by this process
        space = OmegaConf.to_container(node.space, resolve=True)
        fixed = {"search": {"space": space, "metric": self.search.metric}, "seed": seed}
        settings = flat(OmegaConf.create(fixed))
        self.study = optuna.create_study(
            study_name="search",
            storage=open_storage(folder),
            direction=self.search.direction,
            load_if_exists=True,
        )
        if problems := differences(self.study.user_attrs.get("settings", settings), settings):
            raise ConfigError(problems)
        # Members read the pruner from here; it may change.
        pruner = OmegaConf.to_container(node.pruner, resolve=True)
        self.study.set_user_attr("settings", settings)
        self.study.set_user_attr("pruner", pruner)

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
        number = len(trials)
        # A round cut short by a kill is completed: its trials did not know each other's results.
        while number < self.search.trials and len(left) < most and (not left or number % most):
            if (trial := suggest_trial(self.search, self.trials, self.seed)) is None:
                break
            self.study.add_trial(trial)
            left.append(self.trials[-1])
            number += 1
        self.asked |= {trial.number for trial in left[:most]}
        return [PlannedTrial.of(trial) for trial in left[:most]]

    def tell(self, results: Mapping[int, Mapping[str, Any] | None]) -> None:
        """Record results by trial number: the content of result.json, or None.

        Other trials are asked for again by the next start, failed ones too, unless they diverged.
        """
        trials = self.trials
        for n, result in results.items():
            if trials[n].state.is_finished() or result is None:
                continue
            if result["status"] == "completed":
                self.study.tell(n, result["metrics"][self.search.metric])
            elif result["status"] == "pruned":
                self.study.tell(n, state=TrialState.PRUNED)
            elif result["status"] == "failed" and "not_finite" in result:
                self.study.tell(n, state=TrialState.FAIL)


def suggest_trial(search: Search, trials: Sequence[FrozenTrial], seed: int) -> FrozenTrial | None:
    """The trial that the sampler suggests after these; None if a grid search has tried all.

    A pure function: the sampler is created anew, with a seed from `seed` and the number of trials,
    and works on a copy of the study.
    """
    with no_warnings():
        own_seed = np.random.SeedSequence([seed, len(trials)]).generate_state(1)
        sampler = search.sampler(seed=int(own_seed[0]))
        study = optuna.create_study(
            direction=search.direction, sampler=sampler, pruner=search.pruner
        )
        study.add_trials(trials)
        search.space.suggest(study.ask())
        found = study.get_trials()[-1]
    # 0.35, not 0.35000000000000003
    params = {k: float(f"{v:.12g}") if isinstance(v, float) else v for k, v in found.params.items()}
    grid = isinstance(sampler, optuna.samplers.BruteForceSampler)
    if grid and any(trial.params == params for trial in trials):
        return None
    found.params = params
    return found


def summary(study: SearchStudy, command: Callable[[Sequence[str]], str]) -> list[str]:
    """Lines for the end of a search: counts, the best trial and its command, from its overrides."""
    states = [trial.state for trial in study.trials]
    completed, pruned = states.count(TrialState.COMPLETE), states.count(TrialState.PRUNED)
    counts = f"{completed} completed, {pruned} pruned, {len(states) - completed - pruned} failed"
    lines = [f"search       {len(states)} of {study.search.trials} trials: {counts}"]
    if completed:
        best, metric = study.study.best_trial, study.search.metric
        value = f"{number(metric, best.value)}{unit(metric)}"
        lines.append(f"best trial   trial={best.number:03}, {metric} {value}")
        lines.append(f"             {command(PlannedTrial.of(best).overrides)}")
    return lines
