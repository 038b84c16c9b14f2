"""Training run: compose -> validate -> build -> fit -> test once -> result.json."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from omegaconf import DictConfig, OmegaConf
from torch import nn

from cnntrain.config import ConfigError, folder_problem, run_directory_problem
from cnntrain.config import resume as run_files
from cnntrain.data import ImageData
from cnntrain.interruption import interruptible, interruption, watching
from cnntrain.metric_names import EPOCH_METRICS
from cnntrain.models import layer_table
from cnntrain.process_info import launched
from cnntrain.terminal import UNLIMITED, NoTraceback, table_text, width
from cnntrain.training import building
from cnntrain.training.checkpoint_file import BEST, LAST, CheckpointError, Content, newest, read
from cnntrain.training.checkpoints import shape_differences
from cnntrain.training.classifier import Classifier
from cnntrain.training.distributed import all_ranks, share_cores
from cnntrain.training.epoch_log import EpochLog
from cnntrain.training.profile import Profile
from cnntrain.training.run_directory import Result, RunDirectory, conditions, logged
from cnntrain.training.trainer import Trainer, device_text

log = logging.getLogger(__name__)


class Pruned(NoTraceback, Exception):
    """A pruning callback has ended the run; the message says why."""


_one_run = threading.Lock()


def train(
    cfg: DictConfig,
    directory: str | os.PathLike[str],
    *,
    resume: bool = False,
    callbacks: Sequence[lightning.Callback] = (),
) -> Result:
    """Train, validate every epoch, test once, and write the run directory.

    Prints what the command line prints, and logs it to train.log. One run at a time: it seeds the
    global random number generators.

    Args:
        cfg: A config from `compose`.
        directory: The run directory; created if missing.
        resume: Continue the run in `directory` from its last checkpoint, bitwise as if it had not
            been interrupted, or return its result if it is completed.
        callbacks: Lightning callbacks, called after the run's own and before its checkpoints.

    Raises:
        InterruptedCall: SIGINT, SIGTERM or SIGUSR1 was received; a checkpoint has been saved. It
            is a KeyboardInterrupt; a script that does not catch it exits with 128 + signal.
        Others as `run_training`.
    """
    if not isinstance(cfg, DictConfig):
        raise ConfigError([f"cfg: is {type(cfg).__name__}; pass what compose([...]) returns"])
    path = Path(directory)
    check_directory = folder_problem if resume else run_directory_problem
    problem = check_directory(os.fspath(directory), "directory")
    if cfg.get("resume"):
        problem = f"resume={cfg.resume}: in Python, call train(cfg, directory, resume=True)"
    if cfg.get("search"):
        problem = "search: is an option of the command line only; leave it out"
    if not problem and not _one_run.acquire(blocking=False):
        problem = f"directory={path}: another run is training in this process; wait for it"
    if problem:
        raise ConfigError([problem])
    if cfg.get("profile"):
        callbacks = [*callbacks, Profile(path)]
    writes_log = True  # a completed run is not changed, train.log included
    with contextlib.suppress(OSError, run_files.DamagedRecord):
        writes_log = run_files.read_sealed(path / run_files.RESULT)["status"] != "completed"
    try:
        with interruptible(f"; resume with train(cfg, {str(path)!r}, resume=True)"):
            result = run_training(
                cfg,
                path,
                resume=resume,
                callbacks=callbacks,
                option="directory",
                console=logged(path, writes_log),
            )
            with logged(path, writes_log):
                log.info(result.text())
            return result
    finally:
        _one_run.release()


def run_training(
    cfg: DictConfig,
    directory: Path,
    *,
    resume: bool = False,
    overrides: Sequence[str] | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    labels: Mapping[str, Any] | None = None,
    option: str = "hydra.run.dir",
    console: AbstractContextManager[None] | None = None,
) -> Result:
    """As `train`, for commands, which have configured logging and handle signals themselves.

    Args:
        overrides: The command-line overrides of the run, for .hydra/overrides.yaml.
        labels: For a member of a sweep: hyperparameters that the HParams tab shows beside those of
            the config.
        option: How errors name the directory.
        console: Entered once the directory is locked by this run.

    Raises:
        ConfigError: The config cannot be built, the directory holds another run, or its run cannot
            be resumed with this config.
        CheckpointError: The checkpoint is damaged, of another network or of a newer version.
        DataError: The data cannot be loaded.
        NonFiniteError: A loss or gradient is NaN or Inf.
        Pruned: A callback has ended the run.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 was received; a checkpoint has been saved.
        ProcessLost: Another process of this run has ended.
        OSError: A file cannot be written.
    """
    cfg = run_files.run_options(cfg)
    data, module = building.build_run(cfg)
    info = building.this_process(cfg, launched())
    locked = RunDirectory(directory, resume=resume, option=option)
    with watching(), share_cores(info), locked as run, console or contextlib.nullcontext():
        if resume and (recorded := run_files.completed(directory, cfg)):
            log.info("already completed")
            return Result.of(recorded, directory, lambda: _tested_network(directory, cfg, module))
        saved = _checkpoint_to_resume(directory, cfg, data, module) if resume else None
        if not saved:  # other ranks receive the weights from this one
            building.load_initial_weights(module.network)
        run.begin(cfg, overrides)
        record = building.build_record(cfg, directory, data)
        with _final_status(run, record):
            started = time.perf_counter()
            with interruption.answering("raise"):  # a partial download is removed
                data.prepare()
            if data.found:
                OmegaConf.update(cfg, "data.recorded", data.found, force_add=True)
                run.write_config(cfg)
            trainer = building.build_trainer(cfg, info, directory, data, module, record, callbacks)
            log.info(f"device: {device_text(trainer)}")
            table = layer_table(module.network, data.shape)
            optional = "output", "type", "parameters"  # left out if there is no room
            fitted = table_text(table, optional, width())
            log.info(table_text(table, optional, UNLIMITED), extra={"terminal": fitted})
            checkpoint = saved[0] if saved else None
            if saved:
                record.resume(*saved)
            else:
                record.tensorboard.begin(cfg, labels)
                record.insights.begin(cfg, module.network)
            config = trainer.checkpoints.facts["config"]
            work = {"config": config, "directory": directory.absolute(), "checkpoint": checkpoint}

            def on_worker_lost(reason: str) -> None:
                run.write_result("failed", **record.so_far(), error=f"ProcessLost: {reason}")

            device = trainer.strategy.root_device
            with all_ranks(trainer.info, device, work, building.spawned_rank, on_worker_lost):
                building.fit_and_test(trainer, data, module, checkpoint)
            content = _final_metrics(cfg, trainer, module, record)
            seconds = record.seconds_before + time.perf_counter() - started
            speed = record.images / record.seconds
            content["timings"] = {"seconds": seconds, "images_per_second": speed}
            run.write_result("completed", **content)
        return Result.of(content, directory, module.network.cpu().eval)


def _tested_network(directory: Path, cfg: DictConfig, module: Classifier) -> nn.Module:
    """The network of a completed run with the weights that were tested."""
    name = LAST if cfg.trainer.get("test_checkpoint") == "last" else BEST
    module.load_state_dict(read(directory / run_files.CHECKPOINTS / name)["state_dict"])
    return module.network.eval()


def _checkpoint_to_resume(
    directory: Path, cfg: DictConfig, data: ImageData, module: Classifier
) -> tuple[Path, Content] | None:
    """The newest checkpoint; None if there is none. Raises if this config cannot resume it."""
    saved = newest(directory / run_files.CHECKPOINTS)
    if not saved:
        if before := run_files.read_config(directory / run_files.CONFIG):
            _reject(run_files.resume_problems(before, cfg), directory / run_files.CONFIG)
        return None
    path, content = saved
    problems = run_files.resume_problems(DictConfig(content["config"]), cfg)
    recorded = content["config"]["data"].get("recorded", {})
    if recorded.get("files") != data.found.get("files"):
        problems.append(
            f"data.root={cfg.data.root}: has other images than when the run was started; restore "
            "them, or start a new run"
        )
    done, begun = content["position"]["epoch"], content["position"]["batch"] > 0
    epochs, least = cfg.trainer.max_epochs, done + begun
    if least > epochs:
        what = f"epoch {least} has begun" if begun else f"{done} epochs are done"
        problems.append(f"trainer.max_epochs={epochs}: {what}; set {least} or more")
    _reject(problems, path)
    if different := shape_differences(content["state_dict"], module.state_dict()):
        raise CheckpointError(f"{path}: is of another network: {'; '.join(different)}")
    for what, now in conditions().items():
        if (before := content["conditions"].get(what)) != now:
            log.warning(f"{what}: {now}, before {before}: results may differ in their last bits")
    return path.absolute(), content


def _reject(problems: Sequence[str], path: Path) -> None:
    if problems:
        raise ConfigError([f"{problem} (recorded in {path})" for problem in problems])


@contextlib.contextmanager
def _final_status(run: RunDirectory, record: EpochLog) -> Iterator[None]:
    """Write to result.json how a run ends that is not completed."""
    interruption.before_leaving = lambda: run.write_result("interrupted", **record.so_far())
    try:
        yield
    except BaseException as error:
        status = "pruned" if isinstance(error, Pruned) else "failed"
        # A signal may have caused another error, somewhere in the libraries.
        status = status if interruption.received is None else "interrupted"
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        details = getattr(error, "details", {})
        with contextlib.suppress(OSError):  # the first error is the one to report
            run.write_result(status, **record.so_far(), error=reason, **details)
        interruption.check()
        raise
    finally:
        interruption.before_leaving = None


def _final_metrics(
    cfg: DictConfig, trainer: Trainer, module: Classifier, record: EpochLog
) -> dict[str, Any]:
    """Log the metrics of the test; the content of result.json without timings."""
    test = module.totals["test"].metrics("test")
    record.tensorboard.log_metrics(test, record.epochs[-1]["epoch"])
    record.tensorboard.end(cfg)
    tested = record.epochs[trainer.tested["epoch"] if trainer.tested else -1]
    return {
        "metrics": {name: tested[name] for name in EPOCH_METRICS if name in tested} | test,
        "epochs": len(record.epochs),
        "tested_epoch": tested["epoch"],
    }
