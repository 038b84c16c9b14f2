"""The ranks of a distributed run: started on one machine, given their work, watched.

Rank 0 is the run: it alone has the run directory and the terminal. The other ranks receive its
config and train on their shares of every batch. On one machine rank 0 starts them by
torch.multiprocessing; otherwise torchrun or srun has started them.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as torch_mp

from cnntrain.interruption import interruption
from cnntrain.process_info import ProcessInfo
from cnntrain.terminal import write_stderr
from cnntrain.training.distributed import ProcessLost, connect, process_group

SETUP_TIMEOUT = timedelta(minutes=30)  # for the other ranks to start and to prepare their data
SHUTDOWN_TIMEOUT = 30  # seconds for rank 0 to raise by itself after a worker process has died

_work_sent = False


def _no_answer(info: ProcessInfo) -> str:
    text = f"another process of the run has ended, or not answered for {info.timeout:g} s"
    several = "; GLOO_SOCKET_IFNAME may have to name the network interface that reaches the others"
    return f"{text} (trainer.timeout){several if info.nodes > 1 else ''}"


@contextlib.contextmanager
def connection_errors(info: ProcessInfo, workers: "Workers | None" = None) -> Iterator[None]:
    """Turn errors of gloo and NCCL into a ProcessLost that says which process is lost."""
    try:
        yield
    except Exception as error:
        text = str(error).lower()
        backend = isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)
        if backend or isinstance(error, dist.DistError):
            failure = workers.failure(wait=2) if workers else ""
            raise ProcessLost(failure or _no_answer(info)) from error
        raise


@contextlib.contextmanager
def all_ranks(
    info: ProcessInfo,
    device: torch.device,
    work: dict[str, Any],
    worker: Callable[[int, ProcessInfo], None],
    on_worker_lost: Callable[[str], None],
) -> Iterator[None]:
    """On rank 0: the other ranks receive `work` and train within.

    Args:
        worker: Entry of the processes that are started here, called with its index and `info`.
        on_worker_lost: Called with the reason before this process exits with code 1, as rank 0 is
            blocked by a worker that has ended. Where it is not blocked, ProcessLost is raised.
    """
    with contextlib.ExitStack() as stack:
        workers = None
        if info.world_size == 1:
            yield
            return
        if info.launcher is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            info = replace(info, rendezvous=f"file://{folder}/store")
            workers = stack.enter_context(Workers(info, worker, on_worker_lost))
        with connection_errors(info, workers):
            store = connect(info)
            send_work(store, work)
            _wait_until_ready(info, store, workers)
            with process_group(info, store, device):
                yield
        if workers:
            workers.thread.join(SHUTDOWN_TIMEOUT)


def send_work(store: Any, work: dict[str, Any] | None) -> None:
    global _work_sent
    store.set("work", json.dumps(work))
    _work_sent = True


def _wait_until_ready(info: ProcessInfo, store: Any, workers: "Workers | None") -> None:
    deadline = time.monotonic() + SETUP_TIMEOUT.total_seconds()
    keys = [f"ready/{rank}" for rank in range(1, info.world_size)]
    while not store.check(keys):
        if failure := workers.failure() if workers else None:
            raise ProcessLost(failure)
        if time.monotonic() > deadline:
            raise ProcessLost(_no_answer(info))
        time.sleep(0.05)


def dismiss(info: ProcessInfo) -> None:
    """At the end of rank 0: end the processes of a launcher that have not received any work."""
    if _work_sent:
        return
    store = connect(info)
    send_work(store, None)
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT  # srun's store is in this process
    keys = [f"dismissed/{rank}" for rank in range(1, info.world_size)]
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.05)


class Workers:
    """Ranks 1 and up on this machine, started and watched by torch.multiprocessing."""

    def __init__(
        self,
        info: ProcessInfo,
        worker: Callable[[int, ProcessInfo], None],
        on_worker_lost: Callable[[str], None],
    ):
        self.info, self.worker, self.on_worker_lost = info, worker, on_worker_lost
        self.error, self.closed = "", threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Workers":
        # A worker imports nothing of the user's script, which need not be guarded by __name__.
        main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
        try:
            self.context = torch_mp.start_processes(
                self.worker, (self.info,), self.info.world_size - 1, join=False, daemon=True
            )
        finally:
            sys.modules["__main__"] = main
        interruption.children += self.context.processes
        self.thread.start()
        return self

    def _watch(self) -> None:
        try:
            while not self.context.join():
                pass
        except torch_mp.ProcessExitedException as error:
            code = f"has ended with exit code {error.exit_code}"
            how = f"was killed by {error.signal_name}" if error.signal_name else code
            self.error = f"process {error.error_index + 2} of {self.info.world_size} {how}"
        except torch_mp.ProcessRaisedException as error:
            how = f"has ended: {str(error).strip().splitlines()[-1]}"
            self.error = f"process {error.error_index + 2} of {self.info.world_size} {how}"
        # Rank 0 may be blocked in a collective, as on a GPU.
        if self.error and not self.closed.wait(SHUTDOWN_TIMEOUT):
            with contextlib.suppress(Exception):
                self.on_worker_lost(self.error)
            write_stderr(f"\ncnntrain: {self.error}")
            os._exit(1)

    def failure(self, wait: float = 0) -> str:
        """How the first worker that failed has ended; empty if none has within `wait` seconds."""
        deadline = time.monotonic() + wait
        while not self.error and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.error

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        for process in self.context.processes:
            process.kill()
            process.join()
            interruption.children.remove(process)


def detach_worker() -> None:
    """In a worker process: end with rank 0, without output and without the terminal's signals."""

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if hasattr(os, "setsid"):
        os.setsid()
    with open(os.devnull, "w") as null:
        for stream in (1, 2):
            os.dup2(null.fileno(), stream)


def receive_work(info: ProcessInfo, store: Any) -> dict[str, Any] | None:
    """What rank 0 has sent; None if there is nothing to do."""
    store.wait(["work"], SETUP_TIMEOUT)
    if (work := json.loads(store.get("work"))) is None:
        store.set(f"dismissed/{info.rank}", "")
    return work
