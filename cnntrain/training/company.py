"""Several processes for one run: how they are started, find each other, and end.

The first one, rank 0, is the run: it alone has the run directory, the terminal and the last word.
The others make the same steps with their shares of every batch, and neither write nor say a thing.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cnntrain.interruption import interruption
from cnntrain.launched import Place, choose_interface
from cnntrain.notebook import OneLine
from cnntrain.terminal import write_stderr
from cnntrain.training.distributed import group

PATIENCE = timedelta(minutes=30)  # for processes that have to come, or to fetch their data
GRACE = 30  # seconds for rank 0 to notice by itself that a process has died
FOLLOW = (
    "import sys; sys.path = sys.argv[2:]; from cnntrain.training.follow import main;"
    "main(sys.argv[1])"
)


class ProcessLost(OneLine, Exception):
    """One of the other processes of a run has ended before its time; the message says how."""


@contextlib.contextmanager
def company(
    place: Place, device: torch.device, work: dict[str, Any], lost: Callable[[str], None]
) -> Iterator[None]:
    """From rank 0: the others are at work within, and gone after it.

    `work` tells them what there is to do. Raises ProcessLost if one of them ends before its time;
    where this process is stuck without it, `lost` is told why instead, and this process ends.
    """
    if place.world == 1:
        yield
        return
    store = meeting_point(place)
    others = Others(place if place.launcher else replace(place, port=store.port), lost)
    try:
        _give(store, work)
        _others_come(place, store, others)
        with group(place, store, device):
            yield
        others.end_by_themselves()
    except Exception as error:
        if broken(error):
            why = others.ended() or unanswered(place)
            raise ProcessLost(why) from error
        raise
    finally:
        others.end()


def meeting_point(place: Place) -> Any:
    """The store through which processes find each other: torchrun's own, or one of rank 0's.

    Raises ProcessLost if the port is in use, or not all have come within the timeout.
    """
    global _met
    if _met is not None:
        return _met
    timeout = timedelta(seconds=place.timeout)
    if problem := choose_interface(place):
        raise ProcessLost(problem)

    def connect() -> Any:
        if place.launcher == "torchrun":
            rendezvous = dist.rendezvous("env://", place.rank, place.world, timeout=timeout)
            return dist.PrefixStore("cnntrain", next(rendezvous)[0])
        return dist.TCPStore(
            place.address,
            place.port,
            place.world,
            is_master=place.rank == 0,
            timeout=timeout,
            wait_for_workers=place.launcher is not None,
        )

    try:
        store = within(place.timeout + 1, connect)
        _met = store if place.launcher else None
        return store
    except (dist.DistError, TimeoutError) as error:
        if "EADDRINUSE" in str(error):
            why = f"MASTER_PORT={place.port}: the port is in use; set it to a free one"
        else:
            who = f"not all {place.world} processes have connected to"
            who = who if place.rank == 0 else "the first process does not answer at"
            why = f"{who} {place.address}:{place.port} (MASTER_ADDR, MASTER_PORT)"
            why += f" within {place.timeout:g} s (trainer.timeout)"
        raise ProcessLost(why) from error


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call of C++ that may block for longer; this thread handles signals."""
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


_met: Any = None  # the store of processes that a launcher has started
_given = False  # whether the others have been told what to do


def _give(store: Any, work: dict[str, Any] | None) -> None:
    global _given
    store.set("work", json.dumps(work))
    _given = True


def dismiss(place: Place) -> None:
    """From rank 0, at its end: nothing is left to do for processes that a launcher has started
    and that still wait to be told."""
    if _given or _met is None:
        return
    store = _met
    _give(store, None)
    deadline = time.monotonic() + GRACE  # srun's tasks meet at this process: it has to stay so long
    while store.add("dismissed", 0) < place.world - 1 and time.monotonic() < deadline:
        time.sleep(0.02)


def wait_for_work(place: Place, store: Any) -> dict[str, Any] | None:
    """From the others: what rank 0 wants them to do; None if nothing."""
    try:  # it may take long to prepare the data, but its store answers
        while not within(place.timeout, lambda: store.check(["work"])):
            time.sleep(0.1)
    except TimeoutError:
        raise ProcessLost(unanswered(place)) from None
    work = json.loads(store.get("work"))
    if work is None:
        store.add("dismissed", 1)
    return work


def unanswered(place: Place) -> str:
    """What is known when another process does not answer."""
    return (
        f"another process of the run has ended, or not answered for {place.timeout:g} s "
        "(trainer.timeout)"
    )


def broken(error: BaseException) -> bool:
    """Whether an error says no more than that another process does not answer."""
    said = str(error).lower()
    lost = isinstance(error, RuntimeError) and any(w in said for w in ("gloo", "nccl"))
    return lost or isinstance(error, dist.DistError)


def _others_come(place: Place, store: Any, others: "Others") -> None:
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while (here := store.add("here", 0)) < place.world - 1:
        if why := others.ended(seconds=0):
            raise ProcessLost(why)
        if time.monotonic() > deadline:
            raise ProcessLost(f"only {here + 1} of {place.world} processes have come")
        time.sleep(0.02)


class Others:
    """The processes that rank 0 has started on its machine; none where a launcher has.

    Each ends when this one does: then its standard input is closed. Signals from the terminal do
    not reach them, as they are no part of its session.
    """

    def __init__(self, place: Place, lost: Callable[[str], None]):
        self.place, self.lost, self.over = place, lost, threading.Event()
        self.started: dict[int, tuple[subprocess.Popen[bytes], Any]] = {}  # with what they say
        for rank in range(1, place.world) if place.launcher is None else ():
            self._start(replace(place, rank=rank, local_rank=rank))

    def _start(self, place: Place) -> None:
        said = tempfile.TemporaryFile()  # noqa: SIM115, as long as the process
        process = subprocess.Popen(
            [sys.executable, "-c", FOLLOW, json.dumps(asdict(place)), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
        interruption.children.append(process)
        self.started[place.rank] = process, said
        threading.Thread(target=self._watch, args=(place.rank,), daemon=True).start()

    def _watch(self, rank: int) -> None:
        # A process that waits for a dead one may wait for ever, as on a GPU.
        code = self.started[rank][0].wait()
        if code and not self.over.wait(GRACE):
            why = self._ending(rank)
            with contextlib.suppress(Exception):
                self.lost(why)
            write_stderr(f"\ncnntrain: {why}")
            os._exit(1)

    def ended(self, seconds: float = 2) -> str | None:
        """How one of them has ended that should not have; `seconds` to become apparent."""
        deadline = time.monotonic() + seconds
        while self.started:
            for rank, (process, _) in self.started.items():
                if process.poll():
                    return self._ending(rank)
            if time.monotonic() >= deadline:
                break
            time.sleep(0.02)
        return None

    def _ending(self, rank: int) -> str:
        process, said = self.started[rank]
        name, code = f"process {rank + 1} of {self.place.world}", process.returncode
        said.seek(0)
        lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
        if code < 0:
            return f"{name} was killed by {signal.Signals(-code).name}"
        return f"{name} has ended: {lines[-1] if lines else f'exit code {code}'}"

    def end_by_themselves(self) -> None:
        """Wait for them when all is done."""
        for process, _ in self.started.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)

    def end(self) -> None:
        """However things stand; they have nothing to lose."""
        self.over.set()
        for process, said in self.started.values():
            process.kill()
            process.wait()
            interruption.children.remove(process)
            if process.stdin:
                process.stdin.close()
            said.close()
