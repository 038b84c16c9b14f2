"""Many runs from one command line, on any of Hydra's launchers."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

from omegaconf import DictConfig
from pydantic import PositiveInt

from cnntrain.config import quoted
from cnntrain.config.resume import in_use, read_result
from cnntrain.interruption import Interrupted, interruption
from cnntrain.sweeps.folder import SweepFolder
from cnntrain.sweeps.member import ENDED, LOG, STOP, MemberTask, record_failure, result_mark
from cnntrain.sweeps.members import Planned

Metric = Literal["val/acc", "val/loss", "train/acc", "train/loss", "test/acc", "test/loss"]
Launch = Callable[[list[list[str]], MemberTask], None]
Say = Callable[[str], None]

LOOK = 0.2  # seconds between two looks at what the members have written


class Sweep:
    """What a sweep is called and how it goes about its members."""

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
    def mode(self) -> str:
        return "max" if self.metric.endswith("acc") else "min"


@dataclass
class Progress:
    """Tells of every member when it has ended, wherever it runs: by what it has written."""

    folder: SweepFolder
    total: int  # members of the sweep
    done: int  # that were completed before
    say: Say
    metric: str
    after: Callable[[], None]  # called when a member has ended
    waiting: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # of those ended since
    started: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at all that is `waiting`, time and again."""
        over = Event()

        def watch() -> None:
            while not over.wait(LOOK):
                self.look()

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.look()

    def look(self) -> None:
        for name, before in list(self.waiting.items()):
            directory = self.folder.directory(name)
            if result_mark(directory) == before:
                continue
            result = read_result(directory)
            if result is not None and result["status"] in ENDED:
                del self.waiting[name]
                self.results[name] = result
                self.done += 1
                self.say(self._line(name, result))
                self.after()

    def _line(self, name: str, result: dict[str, Any]) -> str:
        width = len(str(self.total))
        status, metrics = result["status"], result.get("metrics", {})
        if status == "completed":
            shown = f"{self.metric} {_formatted(self.metric, metrics.get(self.metric))}"
            shown += f"  {result['timings']['seconds']:.0f} s"
        elif status == "failed":
            log = self.folder.directory(name) / LOG
            shown = f"failed: {result.get('error', 'for no known reason')} ({_short(log)})"
        else:
            shown = f"{status} after {result.get('epochs', 0)} epochs"
        return f"[{self.done:>{width}}/{self.total}] {name}  {shown}{self._left()}"

    def _left(self) -> str:
        if not self.waiting or not self.results:
            return ""
        passed = time.monotonic() - self.started
        left = timedelta(seconds=round(passed / len(self.results) * len(self.waiting)))
        return f"  {left} left"


def run_members(
    members: Sequence[Planned],
    folder: SweepFolder,
    options: Sweep,
    launch: Launch,
    progress: Progress,
) -> None:
    """Run members on a launcher, to a result.json each; raises no error of theirs.

    Raises Interrupted when a signal asks to stop, after members of this process have saved.
    """
    stop = folder.path / STOP
    stop.unlink(missing_ok=True)
    progress.waiting = {m.name: result_mark(folder.directory(m.name)) for m in members}
    after = progress.after

    def look_for_failures() -> None:
        after()
        failed = any(r["status"] == "failed" for r in progress.results.values())
        if options.fail_fast and failed:
            stop.touch()

    progress.after = look_for_failures
    task = MemberTask(os.getcwd(), options.threads, {m.name: m.values for m in members})
    jobs = [
        [
            *member.overrides,
            f"hydra.sweep.dir={quoted(str(folder.path.absolute()))}",
            f"hydra.sweep.subdir={quoted(member.name)}",
        ]
        for member in members
    ]
    problem = None
    try:
        with interruption.answering("raise"), progress.watching():
            interruption.check()
            try:
                launch(jobs, task)
            except Exception as error:  # of the launcher: what it runs raises none
                interruption.check()
                problem = " ".join(f"{type(error).__name__}: {error}".split())
                progress.say(f"the launcher failed: {problem}")
    finally:
        progress.after = after
    if not stop.exists():
        _bury(members, folder, progress, problem)
    stop.unlink(missing_ok=True)


def _bury(
    members: Sequence[Planned], folder: SweepFolder, progress: Progress, problem: str | None
) -> None:
    """Record what has ended without a word, with its machine or its launcher's process."""
    for member in members:
        directory = folder.directory(member.name)
        if member.name not in progress.waiting:
            continue
        if busy := in_use(directory):
            progress.say(f"{member.name}: {busy}")
        elif directory.exists():
            reason = problem or "its process ended without a word"
            record_failure(directory, dict(member.config), reason)
    progress.look()


def _formatted(metric: str, value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.2%}" if metric.endswith("acc") else f"{value:.4f}"


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


log = logging.getLogger(__name__)


def open_folder(cfg: DictConfig) -> SweepFolder:
    """The folder of the sweep that a composed config with `hydra` is of."""
    return SweepFolder(Path(str(cfg.hydra.sweep.dir)))
