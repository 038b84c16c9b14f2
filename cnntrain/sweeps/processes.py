"""Processes for the members of a sweep: their server, and SIGINT in a launcher's workers."""

import contextlib
import multiprocessing
import os
import signal
import site
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

# Where processes can be had from a server that has torch imported; Windows has none.
STANDARD = multiprocessing.get_all_start_methods()
METHOD = "forkserver" if "forkserver" in STANDARD else "spawn"
PROCESSES: Any = multiprocessing.get_context(METHOD)


def prepare_processes() -> None:
    """Start the server that members' processes come from, which takes it seconds, ahead of need."""
    if METHOD == "forkserver":
        from multiprocessing import forkserver

        PROCESSES.set_forkserver_preload(["cnntrain.sweeps.preload"])
        # It is to import this very code, which need not be what is installed.
        root, before = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
        if root not in site.getsitepackages():
            os.environ["PYTHONPATH"] = os.pathsep.join([root, *([before] if before else [])])
        with sigint_blocked():
            forkserver.ensure_running()
        os.environ.pop("PYTHONPATH", None)
        if before is not None:
            os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def sigint_blocked() -> Iterator[None]:
    """Processes started within do not receive SIGINT until they unblock it; this one does later."""
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # unblocks SIGINT when it starts
    mask_sigint("SIG_BLOCK")
    try:
        yield
    finally:
        mask_sigint("SIG_UNBLOCK")


def mask_sigint(how: str) -> None:
    if hasattr(signal, "pthread_sigmask"):  # Windows has none
        signal.pthread_sigmask(getattr(signal, how), [signal.SIGINT])


class JobsUntilStopped(list[list[str]]):
    """The overrides of members; a launcher that iterates over them gets no more once there is the
    file `stop`.

    One that starts `workers` has them start with SIGINT blocked, which would end them with a
    traceback while they import; `MemberTask` unblocks it. Blocked anew for each job, as loky's
    resource tracker unblocks it when it starts.
    """

    def __init__(self, jobs: Iterable[list[str]], stop: Path, *, workers: bool):
        super().__init__(jobs)
        self.stop, self.workers = stop, workers

    def __iter__(self) -> Iterator[list[str]]:
        for job in super().__iter__():
            if self.stop.exists():
                return
            if self.workers:
                mask_sigint("SIG_BLOCK")
            yield job
