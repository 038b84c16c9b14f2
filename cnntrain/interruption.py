"""SIGINT, SIGTERM and SIGUSR1: requests to stop, met where nothing is lost.

Nothing here imports torch: a signal may come while that is imported.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Literal

from cnntrain.notebook import OneLine
from cnntrain.terminal import write_stderr

# SIGUSR1 is what Slurm can be asked to send ahead of a job's end, SIGUSR2 what submitit asks it to;
# Windows has neither.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]

Answer = Literal["leave", "raise", "note"]

SIGNAL_TIMEOUT = 30  # seconds for the main thread to handle a first signal


class Interrupted(BaseException):
    """A signal asked to stop. Not an Exception, so that nothing takes it for an error."""

    def __init__(self, signum: int):
        self.signal = signal.Signals(signum)
        super().__init__(self.signal.name)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count."""
        return 128 + self.signal


class InterruptedCall(OneLine, Interrupted, KeyboardInterrupt):
    """What a function called from Python raises after a signal; the message says how to continue.

    A KeyboardInterrupt, so that callers stop as they do after Ctrl-C.
    """

    def __init__(self, signum: int, hint: str = ""):
        super().__init__(signum)
        self.args = (f"interrupted by {self.signal.name}{hint}",)


class InterruptedScript(InterruptedCall, SystemExit):
    """Uncaught, it ends a script with the exit code of the signal and without a traceback."""

    code = Interrupted.exit_code


class Interruption:
    """What signals ask for. There is one for the process, as signals are the process's.

    The answer to a signal is to `leave` at once where there is nothing to lose, as while modules
    are imported, which an exception would leave half made; to `raise` Interrupted; or to `note`
    it until `check` is called, as while training. A second SIGINT leaves at once in any case; where
    the process is the caller's, as in a notebook, it raises Interrupted at once instead.

    Python calls handlers in the main thread, which it cannot do while that waits in a collective
    for a process that is stuck. A thread then leaves in its place: at once where the handler would,
    and after SIGNAL_TIMEOUT where it would not.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.answer: Answer = "raise"
        self.before_leaving: Callable[[], None] | None = None
        self.quiet = False  # in processes for which another one speaks
        self.owns_process = False  # else the caller's process must survive a second SIGINT
        self.children: list[subprocess.Popen[bytes]] = []  # killed when this process leaves
        self.leaving = threading.Lock()
        self.wakeup: socket.socket | None = None  # the interpreter writes signal numbers there
        self.wakeup_before = -1

    def install(self) -> None:
        """Handle the signals from here on, also those that a library has taken over."""
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self._handle)
            if self.owns_process and self.wakeup is None:
                numbers, self.wakeup = socket.socketpair()
                self.wakeup.setblocking(False)
                self.wakeup_before = signal.set_wakeup_fd(self.wakeup.fileno())
                threading.Thread(target=self._watch, args=(numbers,), daemon=True).start()

    def uninstall(self) -> None:
        """End the thread; in a forked process as well, whose signals are not its parent's."""
        if self.wakeup is not None:
            signal.set_wakeup_fd(self.wakeup_before)
            self.wakeup.close()
            self.wakeup = None

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    @contextlib.contextmanager
    def answering(self, answer: Answer) -> Iterator[None]:
        """Another answer for a while."""
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
        again_leaves = "Ctrl-C again leaves" if self.owns_process else "interrupt again to stop"
        hint = f"; {again_leaves} at once" if signum == signal.SIGINT else ""
        self._say(f"{signal.Signals(signum).name}: saving a checkpoint{hint}")

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
        """End the process. By one thread; that of a handler returns to what it interrupted."""
        main = threading.current_thread() is threading.main_thread()
        if not self.leaving.acquire(timeout=0 if main else 5) and main:
            return
        with contextlib.suppress(Exception):
            if self.before_leaving is not None:
                self.before_leaving()
        self._say(f"interrupted by {signal.Signals(signum).name}{why}")
        for child in self.children:  # one that is stopped does not notice that its parent is gone
            child.kill()
        os._exit(Interrupted(signum).exit_code)

    def _say(self, text: str) -> None:
        # Not by way of print or logging, in the middle of which the signal may have come.
        if not self.quiet:
            write_stderr(f"\ncnntrain: {text}")


interruption = Interruption()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=interruption.uninstall)


@contextlib.contextmanager
def watching(answer: Answer = "raise") -> Iterator[None]:
    """Handle signals within; nothing changes where they are handled already, or cannot be.

    With `leave`, which is for a whole process, they are handled until that has ended: Python takes
    a second to take down what was imported, and would answer with a traceback.
    """
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
        if answer != "leave":
            interruption.uninstall()
            interruption.received = None
            for signum, handler in before.items():
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)


@contextlib.contextmanager
def interruptible(hint: str = "") -> Iterator[None]:
    """For a function called from Python: after a signal, raise what its caller shows as one line.

    A decorator as well. The error starts with the message and ends with `hint`.
    """
    try:
        with watching():
            yield
    except Interrupted as error:
        if hasattr(sys, "ps1"):  # a notebook, IPython or Python's own prompt: it must not be closed
            raise InterruptedCall(error.signal, hint) from None
        print(f"cnntrain: interrupted by {error.signal.name}{hint}", file=sys.stderr)
        raise InterruptedScript(error.signal, hint) from None
