"""Many runs from one command line, on any of Hydra's launchers."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from cnntrain.config import quoted
from cnntrain.config.resume import is_running, result_with_status
from cnntrain.interruption import interruption
from cnntrain.sweeps.collect import Collection, collect, write_csv
from cnntrain.sweeps.folder import SweepFolder
from cnntrain.sweeps.hparams import cell, write_schema
from cnntrain.sweeps.member import LEAVE, STOP, MemberTask, record_failure
from cnntrain.sweeps.members import Planned, Run, planned
from cnntrain.sweeps.progress import LOOK, Progress
from cnntrain.sweeps.record import Member, read_member

Metric = Literal["val/acc", "val/loss", "train/acc", "train/loss", "test/acc", "test/loss"]
Launch = Callable[[list[list[str]], MemberTask], None]
Say = Callable[[str], None]

CSV = "sweep.csv"
SHARE = 50  # sweep.csv is written for at most this part of the time
FINAL = ("completed", "failed", "pruned")  # what a member is until it is run again


class Sweep:
    """How a sweep goes about its members: the node `sweep` of a config.

    `name` is that of its folder, `metric` what ranks, `threads` those of PyTorch in each member on
    the CPU (None: its own choice, with which numbers differ from machine to machine), and with
    `fail_fast` no more members begin once one has failed.
    """

    def __init__(
        self,
        *,
        name: str | int | None = None,
        metric: Metric = "val/acc",
        threads: PositiveInt | None = 1,
        fail_fast: bool = False,
    ):
        self.name, self.metric, self.threads, self.fail_fast = name, metric, threads, fail_fast

    @property
    def facts(self) -> dict[str, str]:
        """What sweep.yaml says of these."""
        mode = "max" if self.metric.endswith("acc") else "min"
        return {"metric": self.metric, "mode": mode}


class Sweeping:
    """A sweep under way: the members of one command line in the sweep's folder.

    Making one writes nothing. Raises ConfigError if the folder belongs to a sweep with another
    base config, with the difference.
    """

    def __init__(self, folder: Path, options: Sweep, runs: Sequence[Run], varied: Iterable[str]):
        self.folder, self.options = SweepFolder(folder), options
        keys = list(dict.fromkeys([*self.folder.sheet["over"], *varied]))
        self.members = self.folder.extend(planned(runs, keys), keys)
        self.pending = [
            m
            for m in self.members
            if not result_with_status(self.folder.directory(m.name), m.config_hash)
        ]

    def run(self, launch: Launch, say: Say) -> "Outcome":
        """Run what is not completed; raises no error of a member's.

        Raises ConfigError if another process runs the same sweep, and Interrupted when a signal
        has asked to stop and the members have saved.
        """
        with self.folder.locked():
            self.folder.write(**self.options.facts)
            over = self.folder.sheet["over"]
            write_schema(self.folder.path, over)
            total, pending = len(self.members), len(self.pending)
            outcome = Outcome(self.folder, self.options, over, total, total - pending, say)
            outcome.add(self.members)
            if self.pending:
                outcome.run(self.pending, launch)
            outcome.write()
            return outcome


class Outcome:
    """What has become of the members so far, told and written down as it comes."""

    def __init__(
        self,
        folder: SweepFolder,
        options: Sweep,
        columns: Mapping[str, Sequence[Any]],
        total: int,
        done: int,
        say: Say,
    ):
        """`columns` are the options that vary, with their values; `total` members are to be run in
        all, of which `done` are."""
        self.folder, self.options, self.columns, self.say = folder, options, columns, say
        self.progress = Progress(
            folder.path,
            options.metric,
            total,
            done,
            say,
            lambda name: self.unread.add(name),
            self._while_waiting,
        )
        self.stop = folder.path / STOP
        self.stop.unlink(missing_ok=True)
        self.passed_on = False
        self.collection: Collection | None = None
        self.unread: set[str] = set()  # members that have ended since sweep.csv was written
        self.next_write = 0.0  # on the clock of time.monotonic

    @property
    def failed(self) -> dict[str, str]:
        """What the members that failed in this process's time died of, by name."""
        found = self.progress.results.items()
        return {name: str(r.get("error")) for name, r in found if r["status"] == "failed"}

    @property
    def unfinished(self) -> list[str]:
        """Members that have not come to their end: interrupted, not begun, or run elsewhere."""
        return [*self.progress.waiting]

    def run(self, members: Sequence[Planned], launch: Launch) -> None:
        """Run members on a launcher, until each has a result.json or the launcher gives up."""
        labels = {
            member.name: {key: cell(v, self.columns[key]) for key, v in member.values.items()}
            for member in members
        }
        trials = {m.name: m.trial for m in members if m.trial is not None}
        options = self.options
        task = MemberTask(
            os.getpid(), os.getcwd(), options.threads, options.fail_fast, labels, trials
        )
        jobs = [
            [
                *member.run.typed,
                f"hydra.sweep.dir={quoted(str(self.folder.path.absolute()))}",
                f"hydra.sweep.subdir={quoted(member.name)}",
            ]
            for member in members
        ]
        problem = "its process ended without a word"
        interruption.quiet = True  # `_while_waiting` reports what there is to wait for
        with interruption.answering("note"):
            with self.progress.watching([member.name for member in members]):
                try:
                    launch(jobs, task)
                except Exception as error:  # of the launcher: what it runs raises none
                    problem = " ".join(f"{type(error).__name__}: {error}".split())
                    self.say(f"the launcher failed: {problem}")
                self._wait_for_those_at_work()
            if not self.stop.exists() and interruption.received is None:
                self._bury(members, problem)
            self.stop.unlink(missing_ok=True)
            interruption.quiet = False
            if interruption.received is not None:
                self.write()
            interruption.check()

    def add(self, members: Sequence[Planned]) -> None:
        """Take further members, which sweep.yaml has, into sweep.csv."""
        if self.collection is None:
            self.write()
        assert self.collection is not None
        new = [m for m in members if m.name not in self.shown]
        self.shown |= {m.name for m in new}
        self.unread |= {m.name for m in new}
        found = [Member(m.name, self.folder.directory(m.name), m.values, "pending") for m in new]
        self.collection = replace(self.collection, members=(*self.collection.members, *found))

    def write(self) -> None:
        """sweep.csv, a row for each member that the folder has ever had, as sweep.yaml names it."""
        if self.collection is None:
            self.collection = collect(self.folder.path)
            self.shown = {member.name for member in self.collection.members}
        started, unread = time.monotonic(), self.unread
        self.unread = set()
        members = tuple(
            read_member(m.name, m.directory, dict(m.values))
            if m.name in unread or m.status not in FINAL
            else m
            for m in self.collection.members
        )
        self.collection = replace(self.collection, members=members)
        try:
            write_csv(self.collection, self.folder.path / CSV)
        except OSError as error:  # the members' own records are what counts
            self.say(f"{CSV}: {error.strerror}")
        # The file has a row for each member: written for each that ends, it would take ever longer.
        self.next_write = time.monotonic() + SHARE * (time.monotonic() - started)

    def _while_waiting(self) -> None:
        """Write what has changed, and pass a request to stop on to the members, wherever they are,
        by a file that they see."""
        if self.unread and time.monotonic() >= self.next_write:
            self.write()
        if interruption.received is not None and not self.passed_on:
            self.stop.write_text(LEAVE, encoding="utf-8")
            self.passed_on, interruption.quiet = True, False
            if any(is_running(self.folder.directory(name)) for name in [*self.progress.waiting]):
                self.say("\nrunning members save a checkpoint; Ctrl-C again leaves at once")

    def _wait_for_those_at_work(self) -> None:
        """A launcher that gives up, as one whose workers a signal has ended, leaves some."""
        while any(is_running(self.folder.directory(name)) for name in [*self.progress.waiting]):
            time.sleep(LOOK)

    def _bury(self, members: Sequence[Planned], reason: str) -> None:
        """Record what has ended without a word, with its machine or its launcher's process."""
        for member in members:
            directory, name = self.folder.directory(member.name), member.name
            silent = name in self.progress.waiting and name not in self.progress.results
            if silent and directory.exists():
                record_failure(directory, member.run.config, reason)
        self.progress.look()
