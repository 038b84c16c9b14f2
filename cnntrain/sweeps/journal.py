"""A study's file in the sweep's folder: Optuna's journal, whose lines any process may add to.

A journal rather than SQLite, whose locks do not hold on the network disks of clusters.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from cnntrain.config import ConfigError
from cnntrain.config.errors import format_error

STUDY = "study.journal"

optuna.logging.set_verbosity(optuna.logging.ERROR)  # what there is to say, the sweep says


class Lock(JournalFileOpenLock):
    """The system's lock, which is gone with the process that had it.

    Optuna's own are files that a killed writer leaves behind, and others wait half a minute for
    him. The half line that he may have left is cut off: Optuna would write the next one behind it,
    and could then read neither.
    """

    def __init__(self, file: Path):
        super().__init__(str(file))
        # Not under the name of Optuna's own, which would take it for one that was left behind.
        self.file, self.lock = file, FileLock(file.with_name(f".{file.name}.lock"))

    def acquire(self) -> bool:
        self.lock.acquire()
        with self.file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            whole = file.read() in (b"", b"\n")
        if not whole:
            os.truncate(self.file, self.file.read_bytes().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.lock.release()


def storage(folder: Path) -> JournalStorage:
    """The study's file in a folder, begun if there is none. ConfigError if it is damaged."""
    file = folder.absolute() / STUDY
    try:
        found = JournalStorage(JournalFileBackend(str(file), Lock(file)))
        whole_lines = file.read_bytes().rpartition(b"\n")[0]
        # Of the last one Optuna would tell only when another stands behind it.
        json.loads(whole_lines.rpartition(b"\n")[2] or "null")
        return found
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(
            [f"{file}: is damaged ({format_error(error)}); set another sweep=<name>"]
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
