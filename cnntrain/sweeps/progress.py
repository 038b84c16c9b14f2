"""What a sweep tells while it runs: a line a member, when it has ended, wherever it runs."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

from cnntrain.config.resume import read_result
from cnntrain.sweeps.member import ENDED, LOG, result_mark

LOOK = 0.2  # seconds between two looks at what the members have written

Mark = tuple[int, int] | None


@dataclass
class Progress:
    """Looks at the members' directories, and says of each how it has ended.

    So a launcher need not report anything, and may run them on machines of which only the disk is
    seen from here.
    """

    folder: Path
    metric: str
    total: int  # members in all
    done: int  # of them those that were completed before
    say: Callable[[str], None]
    ended: Callable[[str], None]  # called with the name of each that has
    while_waiting: Callable[[], None]  # called with every look
    waiting: dict[str, Mark] = field(default_factory=dict)  # with the mark of the result before
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # the last that each has had
    started: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def watching(self, names: list[str]) -> Iterator[None]:
        """Look at these members time and again, and once more at the end."""
        self.waiting |= {name: result_mark(self.folder / name) for name in names}
        over = Event()

        def watch() -> None:
            while not over.wait(LOOK):
                self.while_waiting()
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
            mark = result_mark(self.folder / name)
            result = read_result(self.folder / name) if mark != before else None
            if result is None or result["status"] not in ENDED:
                continue
            self.results[name] = result
            if result["status"] == "interrupted":  # a cluster may start it again
                self.waiting[name] = mark
            else:
                del self.waiting[name]
                self.done += 1
            self.say(self._line(name, result))
            self.ended(name)

    def _line(self, name: str, result: dict[str, Any]) -> str:
        status = result["status"]
        if status == "completed":
            said = f"{self.metric} {formatted(self.metric, result['metrics'].get(self.metric))}"
            said += f", {result['timings']['seconds']:.0f} s"
        elif status == "failed":
            said = f"failed: {result.get('error')} ({short(self.folder / name / LOG)})"
        else:
            epochs = result.get("epochs", 0)
            said = f"{status} after {epochs} epoch{'s' * (epochs != 1)}"
        width = len(str(self.total))
        left = "" if status == "interrupted" else self._left()
        return f"[{self.done:>{width}}/{self.total}] {name}: {said}{left}"

    def _left(self) -> str:
        remaining = self.total - self.done
        if remaining <= 0:
            return ""
        ended = len([name for name in self.results if name not in self.waiting])
        each = (time.monotonic() - self.started) / ended
        return f"; {timedelta(seconds=round(each * remaining))} left"


def formatted(metric: str, value: float | None) -> str:
    """91.20% for an accuracy, 0.2345 for a loss."""
    if value is None:
        return "none"
    return f"{value:.2%}" if metric.endswith("acc") else f"{value:.4f}"


def short(path: Path) -> Path:
    """As one would type it here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
