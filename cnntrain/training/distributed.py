"""What several processes that train one network have to know of each other.

Gradients are the business of DDP. All else that they agree on goes through a group of its own, on
the CPU, so that no GPU has to be waited for. A process that trains alone is asked nothing.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment

from cnntrain.interruption import interruption
from cnntrain.launched import Place

_control: Any = None  # the group in which is agreed; there is one for the process, or none


def alone() -> bool:
    """Whether this process trains by itself: it then has nothing to ask."""
    return _control is None


def summed(numbers: Sequence[float]) -> list[float]:
    """The sums of these numbers over all processes, in float64; the same in all of them."""
    if alone():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums, group=_control)
    return sums.tolist()


def anywhere(fact: bool) -> bool:
    """Whether something holds in any of the processes."""
    return agreed(fact, signals=False)[0]


def agreed(wanted: bool, *, signals: bool = True) -> tuple[bool, int | None]:
    """Whether any process wants something, and the signal that any one has been sent, if so."""
    received = interruption.received if signals else None
    if alone():
        return wanted, received
    both = torch.tensor([int(wanted), received or 0])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=_control)
    return bool(both[0]), int(both[1]) or None


def gathered(thing: Any) -> list[Any]:
    """What every process has to give, in the order of their ranks; tensors have to be on the
    CPU."""
    if alone():
        return [thing]
    things: list[Any] = [None] * dist.get_world_size(_control)
    dist.all_gather_object(things, thing, group=_control)
    return things


class Processes(ClusterEnvironment):
    """Tells Lightning where this process stands. It has nothing to start: they are there."""

    creates_processes_externally = True

    def __init__(self, place: Place):
        self.place = place
        super().__init__()

    main_address = property(lambda self: self.place.address)
    main_port = property(lambda self: self.place.port)

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.place.world

    def global_rank(self) -> int:
        return self.place.rank

    def local_rank(self) -> int:
        return self.place.local_rank

    def node_rank(self) -> int:
        return self.place.rank // self.place.devices

    def set_world_size(self, size: int) -> None:
        pass  # it is what it is

    def set_global_rank(self, rank: int) -> None:
        pass


@contextlib.contextmanager
def cores_shared(place: Place) -> Iterator[None]:
    """Gives each process its part of the machine's cores, unless OMP_NUM_THREADS says how many."""
    if place.world == 1 or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    before = torch.get_num_threads()
    threads = max(1, before // place.devices)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the other processes
    try:
        yield
    finally:
        torch.set_num_threads(before)
        del os.environ["OMP_NUM_THREADS"]


@contextlib.contextmanager
def group(place: Place, store: Any, device: torch.device) -> Iterator[None]:
    """All processes of a run are connected within."""
    global _control
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = {"backend": "nccl", "device_id": device}
    store, timeout = dist.PrefixStore("group", store), timedelta(seconds=place.timeout)
    options |= {"rank": place.rank, "world_size": place.world, "timeout": timeout}
    dist.init_process_group(store=store, **options)
    try:
        _control = dist.new_group(backend="gloo", timeout=timeout)
        yield
    finally:
        _control = None
        dist.destroy_process_group()
