"""A training that is killed repeatedly and resumed."""

import contextlib
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

from cnntrain.training import CheckpointError, Trainer, checkpoint_file, checkpoints
from cnntrain.training.classifier import Classifier
from cnntrain.training.run_directory import RunDirectory
from cnntrain.training.tensorboard import TensorBoard
from torturing.runs import (
    TIMEOUT,
    before_call,
    differences,
    ended,
    facts,
    finish,
    launch,
    record,
)

# Phases of a training: a process is in that of the innermost of these functions that is running.
# They are in the order in which they first occur.
PHASES: list[tuple[str, Any, str]] = [
    ("starting", None, ""),
    ("beginning the record", RunDirectory, "begin"),
    ("resuming TensorBoard", TensorBoard, "resume"),
    ("writing result.json", RunDirectory, "write_result"),
    ("training", Trainer, "fit"),
    ("reading a checkpoint", checkpoints, "read"),
    ("validating", Classifier, "validation_step"),
    ("saving", checkpoints.Checkpoints, "_save"),
    ("writing a checkpoint", checkpoints, "write"),
    ("testing", Trainer, "test"),
]
BATCHES = 45  # in an epoch
LATE = 0.95  # share of the training after which only the test is killed
NAMES = [name for name, _, _ in PHASES]
IN_WRITE = "SIGKILL in a write"  # before an fsync or a rename, rarely hit at a random time
SIGNALS = {
    "SIGKILL": 25,
    IN_WRITE: 15,
    "SIGTERM": 35,
    "SIGINT": 10,
    "SIGINT twice": 5,
    "SIGUSR1": 10,
}


def kill(
    options: list[str], folder: Path, kills: int, rng: random.Random
) -> tuple[Counter[str], list[str]]:
    """Kill a training `kills` times, and further trainings when it has completed before; counts by
    signal and phase, and problems."""
    phase, counts, problems = mmap.mmap(-1, 1), Counter[str](), list[str]()
    folder.mkdir(parents=True)
    uninterrupted = folder / "uninterrupted"
    arguments = [*options, f"hydra.run.dir={uninterrupted}"]
    begins = phase_begins(arguments, uninterrupted.with_suffix(".log"), phase)
    trainings = 0
    while counts.total() < kills and not problems:
        trainings += 1
        run = folder / f"killed{trainings}"
        arguments = [*options, "resume=auto", f"hydra.run.dir={run}"]
        while facts(run).get("status") != "completed" and counts.total() < kills and not problems:
            share = progress(run)
            at = random_time(share, begins, kills - counts.total(), rng)
            name = rng.choices(list(SIGNALS), list(SIGNALS.values()))[0] if counts else IN_WRITE
            what, problem = kill_once(arguments, run, name, at, share, phase, rng)
            counts.update([what] if what else [])
            problems += [f"{run}: {what}: {problem}"] if problem else []
        if not problems and (code := finish(launch(arguments, run.with_suffix(".log")))):
            problems.append(f"{run}: exit code {code} of the last resume")
        if not problems:
            problems = list(differences(record(uninterrupted), record(run), str(run)))
    print(f"{counts.total()} kills over {trainings} training(s)")
    return counts, problems


def phase_begins(arguments: list[str], log: Path, phase: mmap.mmap) -> dict[str, float]:
    """Seconds to the begin of each phase of an uninterrupted training, and to its end."""
    pid, started = launch(arguments, log, prepare=partial(show_phase, phase)), time.monotonic()
    seen: dict[str, float] = {}
    while (code := ended(pid, 0.001)) is None:
        seen.setdefault(NAMES[phase[0]], time.monotonic() - started)
    assert code == 0, log.read_text(encoding="utf-8")
    return {**seen, "end": time.monotonic() - started}


def random_time(
    share: float, begins: dict[str, float], kills: int, rng: random.Random
) -> tuple[str, float]:
    """A phase, and seconds after its begin, at which to kill the run, of which `share` is done. The
    run should be completed at about the last kill."""
    start = begins["training"]
    if rng.random() < 0.3:
        return "starting", rng.uniform(0, start)
    if share > LATE:
        return "testing", rng.uniform(0, (begins["end"] - begins["testing"]) / 2)
    due = (1 - share) * (begins["testing"] - start)  # seconds of training
    return "training", rng.uniform(0, min(2 * due / (0.7 * 0.85 * kills), due / 2))


def progress(run: Path) -> float:
    """Share of the epochs that are done in the last intact checkpoint."""
    for name in ("last.ckpt", "previous.ckpt"):
        with contextlib.suppress(CheckpointError, OSError):
            content = checkpoint_file.read(run / "checkpoints" / name)
            epochs = content["position"]["epoch"] + content["position"]["batch"] / BATCHES
            return epochs / content["config"]["trainer"]["max_epochs"]
    return 0


def kill_once(
    arguments: list[str],
    run: Path,
    name: str,
    at: tuple[str, float],
    share: float,
    phase: mmap.mmap,
    rng: random.Random,
) -> tuple[str, str | None]:
    """Start a training and kill it: the signal and the phase, empty if it was completed before; and
    the problem, if any."""
    signum = signal.Signals[name.split()[0]]
    in_write = name == IN_WRITE
    late = share > LATE  # the run would be completed before it is killed
    fresh = not in_write and not late and rng.random() < 0.1
    call = rng.choice([(os, "fsync"), (Path, "replace")])
    number = rng.randint(1, 6 if late else 20)
    before, log, phase[0] = stamp(run), run.with_suffix(".log"), 0

    def prepare() -> None:
        show_phase(phase)
        if in_write:
            before_call(*call, number, signum)

    pid = launch(arguments, log, prepare=prepare, fresh=fresh)
    until_phase, delay = at
    if fresh and until_phase == "starting":  # at first Python handles the signals itself
        delay = import_seconds() * rng.uniform(0.1, 1)

    def reached() -> bool:
        if in_write or until_phase == "starting":
            return True
        return stamp(run) != before if fresh else phase[0] >= NAMES.index(until_phase)

    deadline, code = time.monotonic() + TIMEOUT, None
    while code is None and not reached() and time.monotonic() < deadline:
        code = ended(pid, 0.001)
    if code is None:
        code = ended(pid, TIMEOUT if in_write else delay)
    during = NAMES[phase[0]]
    if code is None:
        os.kill(pid, signum)
        if "twice" in name:
            time.sleep(rng.uniform(0, 0.05))
            os.kill(pid, signum)  # not reaped yet, so that the process id is still valid
        code = finish(pid)
    elif not in_write or code == 0:
        return "", f"exit code {code} before the signal" if code else None
    begun = stamp(run) != before
    if fresh:
        during = "fresh process" + (", run begun" if begun else ", run not begun")
    text = log.read_text()
    problem = wrong(signum, code, text, begun=begun, status=facts(run).get("status", "none"))
    return f"{name}, {during}", problem and f"{problem}\n{text}"


def wrong(signum: int, code: int | None, text: str, *, begun: bool, status: str) -> str | None:
    """The problem with how a training ended, if any; `begun`: it had written result.json."""
    if code is None:
        return f"does not end within {TIMEOUT} s"
    if "Traceback" in text:
        return "a traceback"
    if code in (0, -signum, 128 + signum) and status == "completed":
        return None
    if signum == signal.SIGKILL:
        return None if code == -signum else f"exit code {code}"
    if code != 128 + signum and (begun or code != -signum):  # the latter before it has a handler
        return f"exit code {code}"
    if begun and status not in ("interrupted", "completed"):
        return f"status in result.json is {status}"
    return None


def stamp(run: Path) -> int:
    """Modification time of result.json; 0 without one."""
    file = run / "result.json"
    return file.stat().st_mtime_ns if file.exists() else 0


@cache
def import_seconds() -> float:
    """Seconds that a fresh process takes to import its modules."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import cnntrain.commands.train, cnntrain.training"])
    return time.monotonic() - started


def show_phase(phase: mmap.mmap) -> None:
    """Keep the number of the current phase in memory that is shared with the parent."""

    def shown(function: Any, number: int) -> Any:
        @wraps(function)
        def called(*args: Any, **options: Any) -> Any:
            before, phase[0] = phase[0], number
            try:
                return function(*args, **options)
            finally:
                phase[0] = before

        return called

    for number, (_, owner, name) in enumerate(PHASES[1:], 1):
        setattr(owner, name, shown(getattr(owner, name), number))
