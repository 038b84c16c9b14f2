"""A member of a sweep in a process of its own, wherever a launcher has put it.

The process is fresh: no device memory, generator or import passes from one member to the next. Its
parent has no torch; processes come from a server that has imported it, so that each starts at once.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf

from cnntrain.atomic import write_json
from cnntrain.config import ConfigError, adapt_types, config_hash
from cnntrain.config.resume import (
    RESULT,
    add_checksum,
    holds_another_run,
    is_running,
    read_result,
    result_with_status,
    run_options,
)
from cnntrain.interruption import Interrupted, interruption, watching
from cnntrain.sweeps.processes import METHOD, PROCESSES, STANDARD, mask_sigint, prepare_processes
from cnntrain.sweeps.record import METRICS, history
from cnntrain.terminal import output

STOP = ".stop"  # in the sweep's folder: no more members are to begin,
LEAVE = "leave"  # and if it says so, those at work are to save and end
LOG = "train.log"
LOOK = 0.2  # seconds between two looks at that file
ENDED = ("completed", "failed", "interrupted", "pruned")


@dataclass(frozen=True)
class Job:
    """All that a member's process has to know."""

    config: dict[str, Any]
    directory: Path
    overrides: list[str]
    labels: dict[str, Any]  # the options that vary, for HParams
    logging: dict[str, Any]
    threads: int | None
    cwd: str
    trial: int | None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MemberTask:
    """What a launcher calls for each member: a Hydra task function that can be sent elsewhere.

    It returns when the member's result.json says how it ended, and raises no error of the member's.
    """

    driver: int  # the process id of the sweep itself
    cwd: str  # where the command was typed
    threads: int | None
    fail_fast: bool
    labels: dict[str, dict[str, Any]]  # what varies, of each member by its directory's name
    trials: dict[str, int]  # the numbers of those that are a search's

    def __call__(self, cfg: DictConfig) -> None:
        hydra = HydraConfig.get()
        directory = Path(hydra.runtime.output_dir)
        if os.getpid() != self.driver:  # a launcher's worker, started who knows where
            os.chdir(self.cwd)
            _end_with_launcher()
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, _begin_no_other)
            mask_sigint("SIG_UNBLOCK")
        adapt_types(cfg, hydra)
        job = Job(
            OmegaConf.to_container(run_options(cfg), resolve=True),  # type: ignore[arg-type]
            directory,
            [*hydra.overrides.task],
            self.labels.get(directory.name, {}),
            OmegaConf.to_container(hydra.job_logging, resolve=True),  # type: ignore[arg-type]
            self.threads,
            self.cwd,
            self.trials.get(directory.name),
            dict(os.environ),
        )
        _run(job)
        # Said here, not when the sweep has looked: by then the next member would have begun.
        if self.fail_fast and (read_result(directory) or {}).get("status") == "failed":
            (directory.parent / STOP).touch()


def _begin_no_other(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C is for the sweep and its members; a launcher's worker waits for its own to save."""
    interruption.received = signum


def result_mark(directory: Path) -> tuple[int, int] | None:
    """Changes with every result.json that is written there; None while there is none."""
    try:
        found = (directory / RESULT).stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino


@cache
def _end_with_launcher() -> None:
    """Have a launcher's worker end when what started it is gone: loky's would wait for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os._exit(1)  # by which the member, if there is one, knows that it is to save and leave

    threading.Thread(target=watch, daemon=True).start()


def _run(job: Job) -> None:
    """The member from its start to a result.json that says how it ended.

    One that another process trains already, of a sweep that was killed or of a job in a cluster's
    queue, is waited for.
    """
    stop = job.directory.parent / STOP
    while True:
        while not stop.exists() and is_running(job.directory):
            time.sleep(LOOK)
        # After Ctrl-C a member has left at once, and in this process no other is to begin.
        if stop.exists() or interruption.received is not None:
            return
        mine = config_hash(OmegaConf.create(job.config))
        if result_with_status(job.directory, mine):  # by the one waited for
            return
        if holds_another_run(job.directory, mine):  # copied there since the sweep has looked
            return
        before = result_mark(job.directory)
        reason = _in_a_process(job, stop)
        if not is_running(job.directory):  # else another one was faster
            break
    if stop.exists() or interruption.received is not None:  # it may have ended before it began
        return
    result = read_result(job.directory) or {}
    if result_mark(job.directory) == before or result.get("status") not in ENDED:
        record_failure(job.directory, job.config, reason)


def _in_a_process(job: Job, stop: Path) -> str:
    """Train in a process of its own, which a file `stop` may ask to leave; what it died of."""
    prepare_processes()
    if multiprocessing.get_start_method(allow_none=True) not in (None, *STANDARD):
        multiprocessing.set_start_method(
            METHOD, force=True
        )  # loky's is its own, unknown to a child
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_member, args=(job, sender), name=job.directory.name)
    try:
        process.start()
    except (EOFError, ConnectionError):  # SIGINT has ended the server while it imported
        return "the server of members' processes has ended"
    finally:
        sender.close()
    asked = False
    while process.is_alive():
        process.join(LOOK)
        if not asked and stop.exists() and stop.read_text(encoding="utf-8") == LEAVE:
            process.terminate()  # it saves, and says so in its result.json
            asked = True
    try:
        return str(receiver.recv())
    except EOFError:  # nothing was said
        return _cause_of_death(process.exitcode)


def record_failure(directory: Path, config: Any, reason: str) -> None:
    """Write the result.json of a run that could not write it itself."""
    cfg = OmegaConf.create(config)
    facts = {"config_hash": config_hash(cfg), "seed": cfg.seed}
    rows = history(directory)
    metrics = {k: v for k, v in rows[-1].items() if k in METRICS} if rows else {}
    so_far = {"metrics": metrics, "epochs": len(rows)}
    directory.mkdir(parents=True, exist_ok=True)
    write_json(
        directory / RESULT, add_checksum({"status": "failed", **facts, **so_far, "error": reason})
    )


def _cause_of_death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = " (by the system, if memory ran out)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with exit code {exit_code}; its {LOG} may say why"


def _member(job: Job, reason: Any) -> None:
    """The member's process."""
    os.environ.clear()
    os.environ.update(job.environment)
    os.chdir(job.cwd)
    _write_all_to(job.directory / LOG)
    with watching("leave"):
        _leave_with_parent()
        configure_log(OmegaConf.create(job.logging), False)
        root = logging.getLogger()  # the log's own file is what the terminal would be
        root.handlers = [h for h in root.handlers if getattr(h, "stream", None) is not sys.stdout]
        try:
            _train(job)
        except Interrupted as error:
            os._exit(error.exit_code)
        except ConfigError as error:
            reason.send("; ".join(error.problems))
            sys.exit(2)
        except Exception as error:
            said = " ".join(str(error).split())
            reason.send(f"{type(error).__name__}: {said}")
            raise  # its traceback goes to the log


def _train(job: Job) -> None:
    import torch

    from cnntrain.training.run import Pruned, run_training

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    callbacks = []
    if job.trial is not None:
        from cnntrain.sweeps.pruning import Pruning

        callbacks.append(Pruning(job.directory.parent, job.trial))
    with contextlib.suppress(Pruned):  # as its result.json says
        run_training(
            OmegaConf.create(job.config),
            job.directory,
            resume=True,
            overrides=job.overrides,
            labels=job.labels,
            callbacks=callbacks,
        )


def _write_all_to(log: Path) -> None:
    """What libraries print, and a traceback, go where the run's own lines go."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)
    sys.stdout, sys.stderr = output(1, "utf-8"), output(2, "utf-8")


def _leave_with_parent() -> None:
    """Have this process save and leave when the one that started it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
