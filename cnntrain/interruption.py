"""Signal handling: SIGINT, SIGTERM and SIGUSR1 save a checkpoint and end the run. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Literal

from cnntrain.terminal import NoTraceback, write_stderr

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

# Slurm sends SIGUSR1 before a job's time limit if asked to, submitit has it send SIGUSR2.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]

Answer = Literal["leave", "raise", "note"]

SIGNAL_TIMEOUT = 30  # seconds for the main thread to handle a first signal


class Interrupted(BaseException):
    """A signal was received. A BaseException, so that `except Exception` does not catch it."""

    def __init__(self, signum: int):
        self.signal = signal.Signals(signum)
        super().__init__(self.signal.name)

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as in a shell."""
        return 128 + self.signal


class InterruptedCall(NoTraceback, Interrupted, KeyboardInterrupt):
    """Raised by `train` and the like after a signal; the message says how to resume."""

    def __init__(self, signum: int, hint: str = ""):
        super().__init__(signum)
        self.args = (f"interrupted by {self.signal.name}{hint}",)


class InterruptedScript(InterruptedCall, SystemExit):
    """Uncaught, it exits a script with the code of the signal and without a traceback."""

    code = Interrupted.exit_code


class Interruption:
    """The signal state of the process; there is one instance.

    A signal exits at once (`answer` is `leave`, as while modules are imported), raises Interrupted
    (`raise`) or is recorded for `check` (`note`, as while training). A second SIGINT exits at once,
    or raises Interrupted where the process belongs to a caller, such as a notebook.

    Python runs handlers in the main thread, which may be blocked in a collective. A watcher thread
    then exits in its place: at once where the handler would, otherwise after SIGNAL_TIMEOUT.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.answer: Answer = "raise"
        self.before_leaving: Callable[[], None] | None = None
        self.quiet = False  # on ranks > 0, which print nothing
        self.owns_process = False  # a second SIGINT may exit it
        self.children: list[BaseProcess] = []  # killed when this process exits
        self.leaving = threading.Lock()
        self.wakeup: socket.socket | None = None  # the interpreter writes signal numbers there

    def install(self) -> None:
        """Install the handlers, also in place of those that a library has installed since."""
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self._handle)
            if self.owns_process and self.wakeup is None:
                numbers, self.wakeup = socket.socketpair()
                self.wakeup.setblocking(False)
                signal.set_wakeup_fd(self.wakeup.fileno())
                threading.Thread(target=self._watch, args=(numbers,), daemon=True).start()

    def uninstall(self) -> None:
        """Stop the watcher thread, also in a forked process."""
        if self.wakeup is not None:
            signal.set_wakeup_fd(-1)
            self.wakeup.close()
            self.wakeup = None

    def check(self) -> None:
        """Raise Interrupted if a signal was received."""
        if self.received is not None:
            raise Interrupted(self.received)

    @contextlib.contextmanager
    def answering(self, answer: Answer) -> Iterator[None]:
        """Set `answer` within."""
        before, self.answer = self.answer, answer
        try:
            yield
        finally:
            self.answer = before

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again = self.received is not None and signum == signal.SIGINT
        self.received = signum
        if self.answer == "leave" or (again and self.owns_process):
            return self._leave(signum)
        if self.answer == "raise" or again:
            raise Interrupted(signum)
        hint = "; interrupt again to stop at once" if signum == signal.SIGINT else ""
        self._print(f"{signal.Signals(signum).name}: saving a checkpoint{hint}")

    def _watch(self, numbers: socket.socket) -> None:
        first: int | None = None
        deadline = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                if not (number := numbers.recv(1)):
                    return
                if (signum := number[0]) in SIGNALS:
                    if self.answer == "leave" or (first is not None and signum == signal.SIGINT):
                        self._leave(signum)
                    if first is None:
                        first, deadline = signum, time.monotonic() + SIGNAL_TIMEOUT
                        numbers.settimeout(1)
            if self.received is not None:
                numbers.settimeout(None)
            elif first is not None and time.monotonic() > deadline:
                self._leave(first, f"; stuck for {SIGNAL_TIMEOUT} s, no checkpoint was saved")

    def _leave(self, signum: int, why: str = "") -> None:
        """Exit the process from one thread; if another one is exiting, a handler returns."""
        main = threading.current_thread() is threading.main_thread()
        if not self.leaving.acquire(timeout=0 if main else 5) and main:
            return
        with contextlib.suppress(Exception):
            if self.before_leaving is not None:
                self.before_leaving()
        self._print(f"interrupted by {signal.Signals(signum).name}{why}")
        for child in self.children:  # a stopped one does not notice that its parent is gone
            child.kill()
        os._exit(Interrupted(signum).exit_code)

    def _print(self, text: str) -> None:
        # Not print or logging: the signal may have come in the middle of one.
        if not self.quiet:
            write_stderr(f"\ncnntrain: {text}")


interruption = Interruption()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=interruption.uninstall)


@contextlib.contextmanager
def watching(answer: Answer = "raise") -> Iterator[None]:
    """Handle signals within, unless they are handled already or this is not the main thread."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    main = threading.current_thread() is threading.main_thread()
    if not main or interruption._handle in before.values():
        yield
        return
    interruption.received, interruption.answer = None, answer
    interruption.owns_process = answer == "leave"
    interruption.install()
    try:
        yield
    finally:
        interruption.before_leaving = None
        if answer != "leave":  # else a signal while Python shuts down would print a traceback
            interruption.received = None
            for signum, handler in before.items():
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)


@contextlib.contextmanager
def interruptible(hint: str = "") -> Iterator[None]:
    """Turn Interrupted into InterruptedCall, with `hint` at the end of its message."""
    try:
        with watching():
            yield
    except Interrupted as error:
        if hasattr(sys, "ps1"):  # a notebook or interactive Python, which must not exit
            raise InterruptedCall(error.signal, hint) from None
        print(f"cnntrain: interrupted by {error.signal.name}{hint}", file=sys.stderr)
        raise InterruptedScript(error.signal, hint) from None
