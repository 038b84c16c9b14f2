"""Distributed training: processes, process group, and collectives for metrics, stops and signals.

Rank 0 is the run: it alone has the run directory and the terminal. The other ranks receive its
config and train on their shares of every batch. On one machine rank 0 starts them by
torch.multiprocessing; otherwise torchrun or srun has started them.

DDP synchronises gradients; everything else is exchanged over a gloo group on the CPU, which avoids
GPU synchronisation. In a single-process run every collective returns its argument.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as torch_mp
from lightning.fabric.plugins.environments import SLURMEnvironment

from cnntrain.interruption import interruption
from cnntrain.process_info import ProcessInfo
from cnntrain.terminal import NoTraceback, write_stderr

SETUP_TIMEOUT = timedelta(minutes=30)  # for the other ranks to start and to prepare their data
SHUTDOWN_TIMEOUT = 30  # seconds for rank 0 to raise by itself after a worker process has died

_cpu_group: Any = None  # gloo group of the run, for the collectives below
_store: Any = None  # of the processes that a launcher has started


class ProcessLost(NoTraceback, Exception):
    """Another process of the run has ended or does not respond; the message says which and how."""


def is_single_process() -> bool:
    return _cpu_group is None


def all_sum(numbers: Sequence[float]) -> list[float]:
    """Sums of the numbers over all ranks, in float64; the same on all ranks."""
    if is_single_process():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums, group=_cpu_group)
    return sums.tolist()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return all_sum([flag])[0] > 0


def any_stop(flag: bool) -> tuple[bool, int | None]:
    """Whether the flag is set on any rank, and the signal that any rank has received, if one."""
    received = interruption.received
    if is_single_process():
        return flag, received
    both = torch.tensor([int(flag), received or 0])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=_cpu_group)
    return bool(both[0]), int(both[1]) or None


def all_gather(value: Any) -> list[Any]:
    """The picklable values of all ranks, in the order of the ranks; tensors on the CPU."""
    if is_single_process():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(_cpu_group)
    dist.all_gather_object(values, value, group=_cpu_group)
    return values


@contextlib.contextmanager
def share_cores(info: ProcessInfo) -> Iterator[None]:
    """Divide the machine's cores among its processes, unless OMP_NUM_THREADS is set."""
    before = torch.get_num_threads()
    if info.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, before // info.devices))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def connect(info: ProcessInfo) -> Any:
    """The key-value store that all processes connect to.

    Raises ProcessLost if the port is in use, or not all have connected within the timeout.
    """
    global _store
    if _store is not None:
        return _store
    if info.launcher == "srun":
        slurm, step = SLURMEnvironment(), int(os.environ.get("SLURM_STEP_ID", 0))
        os.environ.setdefault("MASTER_ADDR", slurm.main_address)
        # Steps of a job may run side by side: each has a port of its own.
        os.environ.setdefault("MASTER_PORT", str(slurm.main_port + 97 * step % 10_000))

    def rendezvous() -> Any:
        timeout = timedelta(seconds=info.timeout)
        found = dist.rendezvous(info.rendezvous, info.rank, info.world_size, timeout=timeout)
        return dist.PrefixStore("cnntrain", next(found)[0])

    try:
        # In a thread, as TCPStore has no timeout where another program listens at its port.
        with ThreadPool(1) as pool:
            store = pool.apply_async(rendezvous).get(info.timeout + 1)
    except (dist.DistError, multiprocessing.TimeoutError) as error:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if "EADDRINUSE" in str(error):
            raise ProcessLost(f"MASTER_PORT={port}: the port is in use; set a free one") from error
        raise ProcessLost(
            f"not all {info.world_size} processes have connected to {address}:{port} (MASTER_ADDR, "
            f"MASTER_PORT) within {info.timeout:g} s (trainer.timeout)"
        ) from error
    _store = store if info.launcher else None
    return store


@contextlib.contextmanager
def process_group(info: ProcessInfo, store: Any, device: torch.device) -> Iterator[None]:
    """Within: the default process group, for DDP, and the gloo group for the collectives."""
    global _cpu_group
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = {"backend": "nccl", "device_id": device}
    store, timeout = dist.PrefixStore("group", store), timedelta(seconds=info.timeout)
    options |= {"rank": info.rank, "world_size": info.world_size, "timeout": timeout}
    dist.init_process_group(store=store, **options)
    try:
        _cpu_group = dist.new_group(backend="gloo", timeout=timeout)
        yield
    finally:
        _cpu_group = None
        dist.destroy_process_group()


@contextlib.contextmanager
def connection_errors(info: ProcessInfo, workers: "Workers | None" = None) -> Iterator[None]:
    """Turn errors of gloo and NCCL into a ProcessLost that says which process is lost."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text:
            silent = f"not responded for {info.timeout:g} s (trainer.timeout)"
            lost = f"another process of the run has ended, or {silent}"
            if workers:
                workers.thread.join(2)
                lost = workers.error or lost
            raise ProcessLost(lost) from error
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
        on_worker_lost: Called with the reason before this process exits with code 1, if rank 0 is
            blocked by a worker that has ended; otherwise ProcessLost is raised.
    """
    if info.world_size == 1:
        yield
        return
    with contextlib.ExitStack() as stack:
        workers = None
        if info.launcher is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            info = replace(info, rendezvous=f"file://{folder}/store")
            workers = Workers(info, worker, on_worker_lost)
            stack.callback(workers.close)
        stack.enter_context(connection_errors(info, workers))
        store = connect(info)
        store.set("work", json.dumps(work, default=str))
        keys = [f"ready/{rank}" for rank in range(1, info.world_size)]
        deadline = time.monotonic() + SETUP_TIMEOUT.total_seconds()
        while not store.check(keys):
            if time.monotonic() > deadline or (workers and workers.error):
                raise dist.DistError
            time.sleep(0.05)
        with process_group(info, store, device):
            yield
        if workers:
            workers.thread.join(SHUTDOWN_TIMEOUT)


def receive_work(info: ProcessInfo, store: Any) -> dict[str, Any] | None:
    """What rank 0 has sent; None if there is nothing to do."""
    store.wait(["work"], SETUP_TIMEOUT)
    if (work := json.loads(store.get("work"))) is None:
        store.set(f"dismissed/{info.rank}", "")
    return work


def dismiss(info: ProcessInfo) -> None:
    """At the end of rank 0: end the processes of a launcher that have not received any work."""
    store = connect(info)
    # srun's store is in this process. A rank that does not respond has ended.
    with contextlib.suppress(dist.DistError):
        if not store.check(["work"]):
            store.set("work", json.dumps(None))
            keys = [f"dismissed/{rank}" for rank in range(1, info.world_size)]
            store.wait(keys, timedelta(seconds=SHUTDOWN_TIMEOUT))


class Workers:
    """Ranks 1 and up on this machine, started and watched by torch.multiprocessing."""

    def __init__(
        self,
        info: ProcessInfo,
        worker: Callable[[int, ProcessInfo], None],
        on_worker_lost: Callable[[str], None],
    ):
        # A worker imports nothing of the user's script, which need not be guarded by __name__.
        main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
        try:
            self.context = torch_mp.start_processes(
                worker, (info,), info.world_size - 1, join=False, daemon=True
            )
        finally:
            sys.modules["__main__"] = main
        interruption.children += self.context.processes
        self.world_size, self.on_worker_lost = info.world_size, on_worker_lost
        self.error, self.closed = "", threading.Event()  # how the first worker has failed
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        try:
            while not self.context.join():
                pass
        except (torch_mp.ProcessExitedException, torch_mp.ProcessRaisedException) as error:
            how = f"has ended: {str(error).strip().splitlines()[-1]}"
            if isinstance(error, torch_mp.ProcessExitedException):
                ended = f"has ended with exit code {error.exit_code}"
                how = f"was killed by {error.signal_name}" if error.signal_name else ended
            self.error = f"process {error.error_index + 2} of {self.world_size} {how}"
        # Rank 0 may be blocked in a collective, as on a GPU.
        if self.error and not self.closed.wait(SHUTDOWN_TIMEOUT):
            with contextlib.suppress(Exception):
                self.on_worker_lost(self.error)
            write_stderr(f"\ncnntrain: {self.error}")
            os._exit(1)

    def close(self) -> None:
        self.closed.set()
        for process in self.context.processes:
            process.kill()
        self.thread.join()  # it waits for the same processes, which two threads must not do
        for process in self.context.processes:
            process.join()
            interruption.children.remove(process)


def detach_worker() -> None:
    """In a worker process: end with rank 0, without output and without the terminal's signals."""

    def end_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.setsid()
    with open(os.devnull, "w") as null:
        for stream in (1, 2):
            os.dup2(null.fileno(), stream)
