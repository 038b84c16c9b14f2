"""Sweep: the runs of one command line with several values, on any of Hydra's launchers."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

from pydantic import PositiveInt

from cnntrain.config import quoted
from cnntrain.config.resume import is_running, read_result, result_with_status
from cnntrain.interruption import interruption
from cnntrain.sweeps.members import ComposedRun, PlannedMember, SweepFolder, plan_members
from cnntrain.sweeps.processes import (
    FINISHED,
    LOG,
    POLL_INTERVAL,
    SAVE_AND_EXIT,
    STOP_FILE,
    MemberTask,
    record_failure,
    result_version,
)
from cnntrain.sweeps.records import METRICS, Metric, as_typed, collect, is_number, number, unit
from cnntrain.terminal import paragraph

Launch = Callable[[list[list[str]], MemberTask], None]  # a launcher, called with overrides

CSV = "sweep.csv"


class Sweep:
    """Options of a sweep.

    Args:
        name: Of its folder; default: the time, or the name of the search.
        metric: For the ranking.
        threads: CPU threads of PyTorch in each member. With None PyTorch chooses, and results
            differ between machines.
        fail_fast: Start no further members once one has failed.
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


class GridSweep:
    """The sweep over given runs.

    Construction writes nothing. Raises ConfigError if the folder belongs to a sweep with another
    base config, with the differences.
    """

    def __init__(
        self, folder: Path, options: Sweep, runs: Sequence[ComposedRun], varied: Iterable[str]
    ):
        self.folder, self.options = SweepFolder(folder), options
        keys = list(dict.fromkeys([*self.folder.record.over, *varied]))
        self.members = self.folder.extend(plan_members(runs, keys), keys)
        self.pending = [
            m
            for m in self.members
            if not result_with_status(self.folder.path / m.name, m.config_hash)
        ]

    @property
    def size(self) -> str:
        done = len(self.members) - len(self.pending)
        return f"{len(self.members)} members" + (f", {done} completed before" if done else "")

    def run(self, launch: Launch) -> "SweepRunner":
        """Run the members that are not completed; their errors are not raised.

        Raises ConfigError if another process runs the same sweep, and Interrupted after a signal,
        when the members have saved.
        """
        with self.folder.locked():
            self.folder.write(self.options.metric)
            over = self.folder.record.over
            write_hparams_schema(self.folder.path, over)
            total, done = len(self.members), len(self.members) - len(self.pending)
            runner = SweepRunner(self.folder, self.options, over, total, done)
            runner.write_csv()
            if self.pending:
                runner.run(self.pending, launch)
            runner.write_csv()
            return runner


class SweepRunner:
    """Runs members on a launcher; prints a line as each ends and keeps sweep.csv up to date.

    It watches the members' directories, so a launcher need not report anything and may use machines
    that share only the disk.

    Args:
        columns: The varying options and their values.
        total: Number of members in all, of which `done` are completed.
    """

    def __init__(
        self,
        folder: SweepFolder,
        options: Sweep,
        columns: Mapping[str, Sequence[Any]],
        total: int,
        done: int,
    ):
        self.folder, self.options, self.columns = folder, options, columns
        self.total, self.done = total, done
        # Members not finished or not started, with the version of an earlier result.json.
        self.waiting: dict[str, tuple[int, int] | None] = {}
        self.results: dict[str, dict[str, Any]] = {}  # the last of each member
        self.summary: list[str] = []  # lines, of a search
        self.started = time.monotonic()
        self.stop = folder.path / STOP_FILE
        self.stop_requested = False

    @property
    def failed(self) -> list[str]:
        """Names of the failed members."""
        return [name for name, result in self.results.items() if result["status"] == "failed"]

    def run(self, members: Sequence[PlannedMember], launch: Launch) -> None:
        """Run members until each has a result.json or the launcher has ended."""
        hparams = {
            member.name: {k: hparam_value(v, self.columns[k]) for k, v in member.values.items()}
            for member in members
        }
        trials = {m.name: m.trial for m in members if m.trial is not None}
        options, parent = self.options, str(self.folder.path.absolute())
        task = MemberTask(
            os.getpid(), os.getcwd(), options.threads, options.fail_fast, hparams, trials
        )
        jobs = [
            [
                *member.run.typed,
                f"hydra.sweep.dir={quoted(parent)}",
                f"hydra.sweep.subdir={quoted(member.name)}",
            ]
            for member in members
        ]
        reason = "its process ended without a result"
        self.stop.unlink(missing_ok=True)
        interruption.quiet = True  # `_poll` reports signals
        with interruption.answering("note"):
            with self._watching([member.name for member in members]):
                try:
                    launch(jobs, task)
                except Exception as error:  # of the launcher; MemberTask raises none
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    paragraph(f"the launcher failed: {reason}")
                while self._running():  # of a launcher that has given up
                    time.sleep(POLL_INTERVAL)
            if not self.stop.exists() and interruption.received is None:
                self._record_failures(members, reason)
            self.stop.unlink(missing_ok=True)
            interruption.quiet = False
            if interruption.received is not None:
                self.write_csv()
            interruption.check()

    def check_results(self) -> None:
        """Print a line for each member that has ended since the last call; update sweep.csv."""
        ended = False
        for name, before in list(self.waiting.items()):
            directory = self.folder.path / name
            version = result_version(directory)
            result = read_result(directory) if version != before else None
            if result is None or result["status"] not in FINISHED:
                continue
            self.results[name], ended = result, True
            if result["status"] == "interrupted":  # a cluster may start it again
                self.waiting[name] = version
            else:
                del self.waiting[name]
                self.done += 1
            paragraph(self._line(name, result))
        if ended:
            self.write_csv()

    def write_csv(self) -> None:
        """Write sweep.csv, with a row per member that the folder has ever had."""
        from cnntrain.sweeps.tables import write_member_csv

        try:
            write_member_csv(collect(self.folder.path), self.folder.path / CSV)
        except OSError as error:  # the members' own records are complete
            paragraph(f"{CSV}: {error.strerror}")

    @contextlib.contextmanager
    def _watching(self, names: list[str]) -> Iterator[None]:
        """Poll these members in a thread, and once more at the end."""
        self.waiting |= {name: result_version(self.folder.path / name) for name in names}
        over = Event()

        def watch() -> None:
            while not over.wait(POLL_INTERVAL):
                self._poll()

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.check_results()

    def _poll(self) -> None:
        """Report results; pass a signal on to the members through a file."""
        self.check_results()
        if interruption.received is not None and not self.stop_requested:
            self.stop.write_text(SAVE_AND_EXIT, encoding="utf-8")
            self.stop_requested, interruption.quiet = True, False
            if self._running():
                paragraph("\nrunning members save a checkpoint; Ctrl-C again leaves at once")

    def _running(self) -> bool:
        return any(is_running(self.folder.path / name) for name in [*self.waiting])

    def _record_failures(self, members: Sequence[PlannedMember], reason: str) -> None:
        """Record members whose machine or launcher ended without a result."""
        for member in members:
            directory, name = self.folder.path / member.name, member.name
            if name in self.waiting and name not in self.results and directory.exists():
                record_failure(directory, member.run.config, reason)
        self.check_results()

    def _line(self, name: str, result: dict[str, Any]) -> str:
        status, metric = result["status"], self.options.metric
        if status == "completed":
            ending = f"{metric} {number(metric, result['metrics'].get(metric))}{unit(metric)}"
            ending += f", {result['timings']['seconds']:.0f} s"
        elif status == "failed":
            log = self.folder.path / name / LOG
            ending = f"failed: {result.get('error')} ({log})"
        else:
            epochs = result.get("epochs", 0)
            ending = f"{status} after {epochs} epoch{'s' * (epochs != 1)}"
        width, remaining = len(str(self.total)), self.total - self.done
        if status != "interrupted" and remaining > 0:
            finished = len([name for name in self.results if name not in self.waiting])
            each = (time.monotonic() - self.started) / finished
            ending += f"; {timedelta(seconds=round(each * remaining))} left"
        return f"[{self.done:>{width}}/{self.total}] {name}: {ending}"


def write_hparams_schema(folder: Path, over: Mapping[str, Sequence[Any]]) -> None:
    """Write the schema of TensorBoard's HParams tab: the varying options, and the metrics.

    The values are in the members' own event files. Without a schema TensorBoard would show every
    option of every member, and every scalar as a metric.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams import summary_v2 as hp
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    hparams = []
    for option, values in over.items():
        domain = hp.Discrete([hparam_value(value, values) for value in values])
        if all(map(is_number, values)) and values:
            domain = hp.RealInterval(float(min(values)), float(max(values)))
        hparams.append(hp.HParam(option, domain))
    schema = hp.hparams_config_pb(hparams, [hp.Metric(metric) for metric in METRICS])
    old = list(folder.glob("events.out.tfevents.*"))
    writer = EventFileWriter(str(folder), filename_suffix=".hparams")
    writer.add_event(Event(summary=schema))
    writer.close()
    for file in old:  # of a schema with fewer options or values
        file.unlink()


def hparam_value(value: Any, values: Sequence[Any]) -> Any:
    """A value in a column of `values`, which has one type: number or text."""
    return value if all(map(is_number, values)) else as_typed(value)
