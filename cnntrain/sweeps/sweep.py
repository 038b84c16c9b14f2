"""Sweep: the runs of one command line with several values, on any of Hydra's launchers."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

from pydantic import PositiveInt

from cnntrain.config import quoted
from cnntrain.config.resume import is_running, read_result
from cnntrain.interruption import interruption
from cnntrain.metric_names import METRICS, Metric
from cnntrain.sweeps import processes
from cnntrain.sweeps.members import ComposedRun, PlannedMember, SweepFolder, plan_members
from cnntrain.sweeps.records import as_typed, collect, is_number, number, unit
from cnntrain.terminal import paragraph

# A launcher, called with the overrides of each member.
Launch = Callable[[list[list[str]], processes.MemberTask], None]

CSV = "sweep.csv"


@dataclass(kw_only=True)
class Sweep:
    """Options of a sweep.

    Args:
        name: Of its folder; default: the time, or the name of the search.
        metric: For the ranking.
        threads: CPU threads of PyTorch in each member. With None PyTorch chooses, and results
            differ between machines.
        fail_fast: Start no further members once one has failed.
    """

    name: str | int | None = None
    metric: Metric = "val/acc"
    threads: PositiveInt | None = 1
    fail_fast: bool = False


class SweepRunner:
    """Runs members on a launcher; prints a line as each ends and keeps sweep.csv up to date.

    It watches the members' directories, so a launcher need not report anything and may use machines
    that share only the disk.
    """

    def __init__(self, folder: SweepFolder, options: Sweep):
        self.folder, self.options = folder, options
        self.columns: Mapping[str, Sequence[Any]] = {}  # the varying options and their values
        self.total = self.done = 0  # members in all, and completed ones
        # Members not finished or not started, with the version of an earlier result.json.
        self.waiting: dict[str, tuple[int, int] | None] = {}
        self.results: dict[str, dict[str, Any]] = {}  # the last of each member
        self.summary: list[str] = []  # lines for the end, of a search
        self.started = 0.0
        self.stop = folder.path / processes.STOP_FILE
        self.stop_requested = False

    @property
    def failed(self) -> list[str]:
        """Names of the failed members."""
        return [name for name, result in self.results.items() if result["status"] == "failed"]

    def run_members(self, members: Sequence[PlannedMember], launch: Launch) -> None:
        """Run members until each has a result.json or the launcher has ended.

        Their errors are not raised. Raises Interrupted after a signal, when they have saved.
        """
        self.started = self.started or time.monotonic()
        hparams = {
            member.name: {k: hparam_value(v, self.columns[k]) for k, v in member.values.items()}
            for member in members
        }
        trials = {m.name: m.trial for m in members if m.trial is not None}
        options = self.options
        task = processes.MemberTask(
            os.getpid(), os.getcwd(), options.threads, options.fail_fast, hparams, trials
        )
        above = f"hydra.sweep.dir={quoted(str(self.folder.path.absolute()))}"
        jobs = [[*m.run.typed, above, f"hydra.sweep.subdir={quoted(m.name)}"] for m in members]
        reason = "its process ended without a result"
        self.stop.unlink(missing_ok=True)
        interruption.quiet = True  # `_watching` reports signals
        with interruption.answering("note"):
            with self._watching([member.name for member in members]):
                try:
                    launch(jobs, task)
                except Exception as error:  # of the launcher; MemberTask raises none
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    paragraph(f"the launcher failed: {reason}")
                while self._running():  # of a launcher that has given up
                    time.sleep(processes.POLL_INTERVAL)
            if not self.stop.exists() and interruption.received is None:
                for member in members:  # whose machine or launcher ended without a result
                    name, directory = member.name, self.folder.path / member.name
                    if name in self.waiting and name not in self.results and directory.exists():
                        processes.record_failure(directory, member.run.config, reason)
                self.check_results()
            self.stop.unlink(missing_ok=True)
            interruption.quiet = False
            self.write_csv()
            interruption.check()

    def check_results(self) -> None:
        """Print a line for each member that has ended since the last call; update sweep.csv."""
        ended = False
        for name, before in list(self.waiting.items()):
            directory = self.folder.path / name
            version = processes.result_version(directory)
            result = read_result(directory) if version != before else None
            if result is None or result["status"] not in processes.FINISHED:
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
        """Poll these members in a thread, which passes a signal on to them through a file."""
        self.waiting |= {name: processes.result_version(self.folder.path / name) for name in names}
        over = Event()

        def watch() -> None:
            while not over.wait(processes.POLL_INTERVAL):
                self.check_results()
                if interruption.received is not None and not self.stop_requested:
                    self.stop.write_text(processes.SAVE_AND_EXIT, encoding="utf-8")
                    self.stop_requested, interruption.quiet = True, False
                    if self._running():
                        paragraph(
                            "\nrunning members save a checkpoint; Ctrl-C again leaves at once"
                        )

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.check_results()

    def _running(self) -> bool:
        return any(is_running(self.folder.path / name) for name in [*self.waiting])

    def _line(self, name: str, result: dict[str, Any]) -> str:
        status, metric = result["status"], self.options.metric
        if status == "completed":
            ending = f"{metric} {number(metric, result['metrics'].get(metric))}{unit(metric)}"
            ending += f", {result['timings']['seconds']:.0f} s"
        elif status == "failed":
            log = self.folder.path / name / processes.LOG
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


class GridSweep(SweepRunner):
    """The sweep over given runs; construction writes nothing. Raises as `SweepFolder.extend`."""

    def __init__(
        self, folder: Path, options: Sweep, runs: Sequence[ComposedRun], varied: Iterable[str]
    ):
        super().__init__(SweepFolder(folder), options)
        keys = list(dict.fromkeys([*self.folder.record.over, *varied]))
        members = self.folder.extend(plan_members(runs, keys), keys)
        self.pending = [m for m in members if not self.folder.ended(m, "completed")]
        self.columns, self.total = self.folder.record.over, len(members)
        self.done = self.total - len(self.pending)
        self.size = f"{self.total} members"
        self.size += f", {self.done} completed before" if self.done else ""

    def run(self, launch: Launch) -> None:
        """`run_members` for those not completed; ConfigError if another process runs the sweep."""
        with self.folder.locked():
            self.folder.write(self.options.metric)
            write_hparams_schema(self.folder.path, self.columns)
            self.write_csv()
            if self.pending:
                self.run_members(self.pending, launch)


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
