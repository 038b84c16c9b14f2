"""Member processes: each member of a sweep runs in a process of its own, under any launcher.

No device memory, random generator or import passes from one member to the next. The sweep's process
imports no torch; on POSIX, members are forked from a server that has imported it.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import site
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf

from cnntrain.atomic import write_json
from cnntrain.config import ConfigError, adapt_types, config_hash, resume
from cnntrain.interruption import Interrupted, interruption, watching
from cnntrain.terminal import output

STOP_FILE = ".stop"  # in the sweep's folder: no further members are started,
SAVE_AND_EXIT = "leave"  # and with this content running members save and exit
LOG = "train.log"
POLL_INTERVAL = 0.2  # seconds
FINISHED = ("completed", "failed", "interrupted", "pruned")
START_METHODS = multiprocessing.get_all_start_methods()
METHOD = "forkserver" if "forkserver" in START_METHODS else "spawn"  # Windows has no forkserver
PROCESSES: Any = multiprocessing.get_context(METHOD)


@dataclass(frozen=True)
class MemberTask:
    """Hydra task function that runs a member; picklable, for launchers with other processes.

    Returns when result.json records how the member ended; errors of the member are not raised.
    """

    sweep_pid: int
    cwd: str  # of the command
    threads: int | None
    fail_fast: bool
    hparams: dict[str, dict[str, Any]]  # by the name of the member's directory
    trials: dict[str, int]  # numbers of a search's trials, by the same

    def __call__(self, cfg: DictConfig) -> None:
        hydra = HydraConfig.get()
        directory = Path(hydra.runtime.output_dir)
        if os.getpid() != self.sweep_pid:  # a launcher's worker
            os.chdir(self.cwd)
            _end_with_launcher()
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                # The worker waits until its member has saved.
                signal.signal(signal.SIGINT, lambda s, _: setattr(interruption, "received", s))
            mask_sigint("SIG_UNBLOCK")
        adapt_types(cfg, hydra)
        config: Any = OmegaConf.to_container(resume.run_options(cfg), resolve=True)
        logs: Any = OmegaConf.to_container(hydra.job_logging, resolve=True)
        _run(MemberJob(self, config, directory, [*hydra.overrides.task], logs, dict(os.environ)))
        # Here and not in the sweep's process, which might only see it after the next has started.
        if self.fail_fast and (resume.read_result(directory) or {}).get("status") == "failed":
            (directory.parent / STOP_FILE).touch()


@dataclass(frozen=True)
class MemberJob:
    """The arguments of a member's process."""

    task: MemberTask
    config: dict[str, Any]
    directory: Path
    overrides: list[str]
    logging: dict[str, Any]
    environment: dict[str, str]  # that of the fork server may be another


class InterruptibleJobs(list[list[str]]):
    """The members' overrides; a launcher iterating over them gets no more once `stop` exists.

    Workers start with SIGINT blocked, which would end them with a traceback while they import;
    MemberTask unblocks it. For each job it is blocked again, as loky's resource tracker unblocks.
    """

    def __init__(self, jobs: Iterable[list[str]], stop: Path):
        super().__init__(jobs)
        self.stop = stop

    def __iter__(self) -> Iterator[list[str]]:
        for job in super().__iter__():
            if self.stop.exists():
                return
            mask_sigint("SIG_BLOCK")
            yield job


def start_server() -> None:
    """Start the server from which members are forked; its imports take seconds."""
    if METHOD == "forkserver":
        from multiprocessing import forkserver

        PROCESSES.set_forkserver_preload(["cnntrain.training"])
        # Before Python 3.12 the server does not get sys.path: it might import an installed copy.
        root, paths = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")
        if root not in [*site.getsitepackages(), *paths.split(os.pathsep)]:
            os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{paths}" if paths else root
        # Blocked while the server imports; multiprocessing ignores it there afterwards.
        with sigint_blocked():
            forkserver.ensure_running()


@contextlib.contextmanager
def sigint_blocked() -> Iterator[None]:
    """Block SIGINT in processes started within; in this one it is delivered afterwards."""
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # unblocks SIGINT when it starts
    mask_sigint("SIG_BLOCK")
    try:
        yield
    finally:
        mask_sigint("SIG_UNBLOCK")


def mask_sigint(how: str) -> None:
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(getattr(signal, how), [signal.SIGINT])


def result_version(directory: Path) -> tuple[int, int] | None:
    """Differs after each write of result.json; None without one."""
    try:
        found = (directory / resume.RESULT).stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino


def record_failure(directory: Path, config: Any, reason: str) -> None:
    """Write the result.json of a run that could not write it itself."""
    cfg = OmegaConf.create(config)
    facts = {"status": "failed", "config_hash": config_hash(cfg), "seed": cfg.seed}
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / resume.RESULT, resume.add_checksum({**facts, "error": reason}))


@cache
def _end_with_launcher() -> None:
    """End a launcher's worker when its parent is gone; loky's would wait forever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_INTERVAL)
        os._exit(1)  # the member notices, saves and exits

    threading.Thread(target=watch, daemon=True).start()


def _run(job: MemberJob) -> None:
    """Run a member until its result.json records how it ended.

    Waits first for a process that trains in its directory: a cluster's job of an earlier sweep.
    """
    directory, stop = job.directory, job.directory.parent / STOP_FILE
    own_hash = config_hash(OmegaConf.create(job.config))
    while not stop.exists() and resume.is_running(directory):
        time.sleep(POLL_INTERVAL)
    completed = resume.result_with_status(directory, own_hash)
    if completed or resume.holds_another_run(directory, own_hash):
        return
    if stop.exists() or interruption.received is not None:
        return
    before = result_version(directory)
    reason = _run_process(job, stop)
    # It may have exited before it began.
    if not stop.exists() and interruption.received is None:
        _record_unless_recorded(job, before, reason)


def _record_unless_recorded(job: MemberJob, before: Any, reason: str) -> None:
    """Record a failure, unless result.json has it or another process trains in the directory."""
    status = (resume.read_result(job.directory) or {}).get("status")
    recorded = result_version(job.directory) != before and status in FINISHED
    if not recorded and not resume.is_running(job.directory):
        record_failure(job.directory, job.config, reason)


def _run_process(job: MemberJob, stop: Path) -> str:
    """Train in a new process, which the stop file may end; returns how it ended."""
    start_server()
    if multiprocessing.get_start_method(allow_none=True) not in (None, *START_METHODS):
        multiprocessing.set_start_method(METHOD, force=True)  # loky's is unknown to the child
    process = PROCESSES.Process(target=_main, args=(job,), name=job.directory.name)
    try:
        process.start()
    except (EOFError, ConnectionError):
        return "the server of members' processes has ended"
    terminated = False
    while process.is_alive():
        process.join(POLL_INTERVAL)
        if not terminated and stop.exists() and stop.read_text(encoding="utf-8") == SAVE_AND_EXIT:
            process.terminate()  # SIGTERM: it saves a checkpoint and its result.json
            terminated = True
    if process.exitcode >= 0:
        return f"its process ended with exit code {process.exitcode}; its {LOG} may say why"
    name = signal.Signals(-process.exitcode).name
    hint = " (by the system, if memory ran out)" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"


def _main(job: MemberJob) -> None:
    """The member's process."""
    os.environ.clear()
    os.environ.update(job.environment)
    os.chdir(job.task.cwd)
    with (job.directory / LOG).open("ab") as log:
        for standard in (1, 2):  # what libraries print, and tracebacks
            os.dup2(log.fileno(), standard)
    sys.stdout, sys.stderr = output(1, "utf-8"), output(2, "utf-8")
    with watching("leave"):
        mask_sigint("SIG_UNBLOCK")
        threading.Thread(target=_save_with_parent, daemon=True).start()
        configure_log(OmegaConf.create(job.logging), False)
        root = logging.getLogger()  # its own handler writes to the log already
        root.handlers = [h for h in root.handlers if getattr(h, "stream", None) is not sys.stdout]
        before = result_version(job.directory)
        try:
            _train(job)
        except Interrupted as error:
            os._exit(error.exit_code)
        except ConfigError as error:
            _record_unless_recorded(job, before, "; ".join(error.problems))
            sys.exit(2)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            _record_unless_recorded(job, before, reason)
            raise  # its traceback goes to the log


def _train(job: MemberJob) -> None:
    import torch

    from cnntrain.training.run import Pruned, run_training

    name, task = job.directory.name, job.task
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    callbacks = []
    if name in task.trials:
        from cnntrain.sweeps.study import pruning_callback

        callbacks.append(pruning_callback(job.directory.parent, task.trials[name]))
    with contextlib.suppress(Pruned):  # recorded in result.json
        run_training(OmegaConf.create(job.config), job.directory, resume=True,
                     overrides=job.overrides, labels=task.hparams.get(name, {}),
                     callbacks=callbacks)  # fmt: skip


def _save_with_parent() -> None:
    """Wait until the parent process is gone, however it ended; then save and exit."""
    parent: Any = multiprocessing.parent_process()
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
