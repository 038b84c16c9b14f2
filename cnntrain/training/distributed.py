"""Distributed training: the process group, and collectives for metrics, stops and signals.

DDP synchronises gradients; everything else that the ranks must agree on is exchanged over a
separate gloo group on the CPU, which avoids GPU synchronisation. In a single-process run every
collective returns its argument unchanged.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from cnntrain.interruption import interruption
from cnntrain.process_info import ProcessInfo
from cnntrain.terminal import NoTraceback

_cpu_group: Any = None  # gloo group of the run, for the collectives below
_store: Any = None  # where processes started by a launcher have met


class ProcessLost(NoTraceback, Exception):
    """Another process of the run has ended or does not answer; the message says which and how."""


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
    return any_stop(flag, signals=False)[0]


def any_stop(flag: bool, *, signals: bool = True) -> tuple[bool, int | None]:
    """Whether the flag is set on any rank, and the signal that any rank has received, if one."""
    received = interruption.received if signals else None
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


class ProcessEnvironment(LightningEnvironment):
    """Tells Lightning the rank of a process that exists already."""

    creates_processes_externally = True

    def __init__(self, info: ProcessInfo):
        super().__init__()
        self.info = info

    def local_rank(self) -> int:
        return self.info.local_rank

    def node_rank(self) -> int:
        return self.info.rank // self.info.devices


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
    """The key-value store through which the processes meet.

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
    timeout = timedelta(seconds=info.timeout)

    def rendezvous() -> Any:
        found = dist.rendezvous(info.rendezvous, info.rank, info.world_size, timeout=timeout)
        return dist.PrefixStore("cnntrain", next(found)[0])

    try:
        store = _within(info.timeout + 1, rendezvous)
    except (dist.DistError, TimeoutError) as error:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if "EADDRINUSE" in str(error):
            raise ProcessLost(f"MASTER_PORT={port}: the port is in use; set a free one") from error
        raise ProcessLost(
            f"not all {info.world_size} processes have connected to {address}:{port} (MASTER_ADDR, "
            f"MASTER_PORT) within {info.timeout:g} s (trainer.timeout)"
        ) from error
    _store = store if info.launcher else None
    return store


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call; TimeoutError after `seconds`.

    TCPStore has no timeout where another program answers at its port.
    """
    results: list[Any] = []

    def target() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise TimeoutError
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


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
