"""A study's file in the sweep's folder: Optuna's journal, whose lines any process may add to.

A journal rather than SQLite, whose locks do not hold on the network disks of clusters.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from cnntrain.config import ConfigError
from cnntrain.config.overrides import one_line

STUDY = "study.journal"

optuna.logging.set_verbosity(optuna.logging.ERROR)  # what there is to say, the sweep says


class Lock(JournalFileOpenLock):
    """Optuna's lock, which also cuts off the half line of a writer who was killed.

    Optuna itself would write the next line behind it, and could then read neither.
    """

    def __init__(self, file: Path):
        super().__init__(str(file))
        self.file = file

    def acquire(self) -> bool:
        held = super().acquire()
        with self.file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            whole = file.read() in (b"", b"\n")
        if not whole:
            os.truncate(self.file, self.file.read_bytes().rfind(b"\n") + 1)
        return held


def storage(folder: Path) -> JournalStorage:
    """The study's file in a folder, begun if there is none. ConfigError if it is damaged."""
    file = folder.absolute() / STUDY
    try:
        return JournalStorage(JournalFileBackend(str(file), Lock(file)))
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(
            [f"{file}: is damaged ({one_line(error)}); give the search another name: sweep=<name>"]
        ) from None


def load(folder: Path) -> optuna.Study:
    """The study in a folder, to be read and reported to: its sampler and pruner do nothing."""
    return optuna.load_study(
        study_name=None,
        storage=storage(folder),
        sampler=RandomSampler(),
        pruner=NopPruner(),
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Optuna's warnings of what is experimental in it, or is to change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
