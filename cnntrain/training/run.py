"""One run, from a config to a result."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
from omegaconf import DictConfig, OmegaConf
from torch import nn

from cnntrain.config import (
    ConfigError,
    blame,
    build,
    config_hash,
    folder_problem,
    run_directory_problem,
)
from cnntrain.config.resume import (
    CHECKPOINTS,
    CONFIG,
    RESULT,
    Damaged,
    completed,
    recorded,
    refused_changes,
    run_only,
    sealed,
)
from cnntrain.data import ImageData
from cnntrain.interruption import interruptible, interruption, watching
from cnntrain.launched import TIMEOUT, Place, launched
from cnntrain.models import layer_table
from cnntrain.notebook import OneLine
from cnntrain.terminal import UNLIMITED, table_text, width
from cnntrain.training.building import build_run, build_trainer
from cnntrain.training.checkpoint_file import BEST, LAST, CheckpointError, Content, newest, read
from cnntrain.training.checkpoints import shape_differences
from cnntrain.training.classifier import Classifier
from cnntrain.training.company import company
from cnntrain.training.distributed import cores_shared
from cnntrain.training.insights import Insights
from cnntrain.training.memory import keep_freed_memory
from cnntrain.training.profile import Profile
from cnntrain.training.record import Record
from cnntrain.training.result import Result, logged
from cnntrain.training.run_directory import RunDirectory, conditions
from cnntrain.training.tensorboard import METRICS, TensorBoard
from cnntrain.training.trainer import Trainer, device_text

log = logging.getLogger(__name__)


class Pruned(OneLine, Exception):
    """A run was ended on purpose, by a callback: others do better. The message says why."""


_one_run = threading.Lock()


def train(
    cfg: DictConfig,
    directory: str | os.PathLike[str],
    *,
    resume: bool = False,
    callbacks: Sequence[lightning.Callback] = (),
) -> Result:
    """Train, validate every epoch, test once, and leave the whole record in `directory`.

    Shows what the command line shows, on stdout, and logs it to train.log; logging need not be
    configured. One run at a time: it seeds the generators of the process.

    Args:
        cfg: What `compose` returns.
        directory: The run directory; made where there is none.
        resume: Continue the run that `directory` holds from its last checkpoint, as if it had
            never stopped, or return its result if it is completed.
        callbacks: Called after the run's own and before its checkpoints.

    Raises:
        InterruptedCall: SIGINT, SIGTERM or SIGUSR1 came; a checkpoint has been saved. It is a
            KeyboardInterrupt. A notebook shows it as one line; a script that does not catch it
            ends with one line and exit code 128 + signal.
        As `run_training` apart from that.
    """
    if not isinstance(cfg, DictConfig):
        raise ConfigError([f"cfg: is {type(cfg).__name__}; give what compose([...]) returns"])
    path = Path(directory)
    wrong = folder_problem if resume else run_directory_problem
    problem = wrong(os.fspath(directory), "directory")
    if cfg.get("resume"):
        problem = f"resume={cfg.resume}: in Python, call train(cfg, directory, resume=True)"
    if cfg.get("search"):
        problem = "search: is of the command line only; leave it out"
    if not problem and not _one_run.acquire(blocking=False):
        problem = f"directory={path}: another run is training in this process; wait for it"
    if problem:
        raise ConfigError([problem])
    further = [*callbacks, *([Profile(path)] if cfg.get("profile") else [])]
    how: dict[str, Any] = {"resume": resume, "callbacks": further, "option": "directory"}
    record = True  # a completed run is left as it is, train.log included
    with contextlib.suppress(OSError, Damaged):
        record = sealed(path / RESULT)["status"] != "completed"
    try:
        with interruptible(f"; continue with train(cfg, {str(path)!r}, resume=True)"):
            result = run_training(cfg, path, lines=logged(path, record), **how)
            with logged(path, record):
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
    lines: AbstractContextManager[None] | None = None,
) -> Result:
    """As `train`, for commands, which have logging configured and handle signals themselves.

    `overrides` are what was typed for the run, for its record. `labels` are for a member of a
    sweep: options by name that the HParams tab shows beside those of the config, in columns that
    the sweep lays down. `option` is what errors call the directory. `lines` is entered once the
    directory is this run's own.

    Raises:
        ConfigError: The config cannot be built, the directory holds another run, or the run that
            it holds cannot go on with this config.
        CheckpointError: The checkpoint is no such thing, or of a newer version.
        DataError: The data cannot be had.
        NonFiniteError: A loss or a gradient is not a number.
        Pruned: A callback has ended the run.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came; a checkpoint has been saved.
        ProcessLost: Another process that trains with this one has died.
        OSError: Something cannot be written.
    """
    cfg = run_only(cfg)
    data, module = build_run(cfg)
    place = _place(cfg)
    owned = RunDirectory(directory, resume=resume, option=option)
    with watching(), cores_shared(place), owned as run, lines or contextlib.nullcontext():
        if resume and (result := completed(directory, cfg)):
            log.info("already completed")
            return Result.of(result, directory, lambda: _tested(directory, cfg, module))
        saved = newest(directory / CHECKPOINTS) if resume else None
        if saved:
            _check(*saved, cfg, module)
        elif resume and (before := recorded(directory / CONFIG)):
            _refuse(refused_changes(before, cfg), directory / CONFIG)
        facts = {"config_hash": config_hash(cfg), "seed": cfg.seed}
        run.begin(cfg, facts, overrides)
        tensorboard = TensorBoard(directory)
        record = Record(directory, tensorboard, _insights(cfg, tensorboard, data))
        interruption.before_leaving = lambda: run.write_result("interrupted", **record.so_far())

        def lost(why: str) -> None:
            run.write_result("failed", **record.so_far(), error=f"ProcessLost: {why}")

        try:
            content = _run(
                cfg, place, directory, data, module, record, saved, labels, callbacks, lost
            )
            run.write_result("completed", **content)
        except BaseException as error:
            # A signal may have made another error, somewhere in the libraries.
            status = "pruned" if isinstance(error, Pruned) else "failed"
            status = status if interruption.received is None else "interrupted"
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            details = getattr(error, "details", {})
            with contextlib.suppress(OSError):  # the first error is the one to tell
                run.write_result(status, **record.so_far(), error=reason, **details)
            interruption.check()
            raise
        finally:
            interruption.before_leaving = None
        return Result.of(content, directory, module.network.cpu().eval)


def _tested(directory: Path, cfg: DictConfig, module: Classifier) -> nn.Module:
    """The network of a completed run with the weights that were tested."""
    name = LAST if cfg.trainer.get("test_checkpoint") == "last" else BEST
    module.load_state_dict(read(directory / CHECKPOINTS / name)["state_dict"])
    return module.network.eval()


def fit_and_test(
    trainer: Trainer,
    place: Place,
    cfg: DictConfig,
    data: ImageData,
    module: Classifier,
    checkpoint: Path | None,
) -> None:
    """What every process of a run does with its share of the data."""
    device, share = trainer.strategy.root_device, {"rank": place.rank, "world": place.world}
    loaders = data.train_loader(cfg.seed, device, **share), data.val_loader(device, **share)
    # Lightning's rule for overfit_batches, which it applies to PyTorch's DataLoader alone.
    loaders[0].shuffle = not trainer.overfit_batches  # type: ignore[attr-defined]
    if device.type == "cpu":
        keep_freed_memory()
    with interruption.answering("note"):
        trainer.fit(module, *loaders, ckpt_path=checkpoint, weights_only=True)
    interruption.check()
    module.load_state_dict(trainer.chosen_weights)
    with interruption.answering("raise"):  # nothing is lost but the test, which is made again
        trainer.test(module, data.test_loader(device, **share), verbose=False)
    interruption.check()


def _place(cfg: DictConfig) -> Place:
    """Where this process stands among those that train together."""
    nodes = cfg.trainer.get("num_nodes", 1)
    place = launched() or Place(world=cfg.trainer.get("devices", 1) * nodes, nodes=nodes)
    return replace(place, timeout=cfg.trainer.get("timeout", TIMEOUT))


def _insights(cfg: DictConfig, tensorboard: TensorBoard, data: ImageData) -> Insights:
    if "tensorboard" not in cfg:  # ~tensorboard, or a run that an earlier version has begun
        return Insights.none(board=tensorboard, data=data)
    with blame("tensorboard"):
        return build(cfg.tensorboard, board=tensorboard, data=data)


def _check(path: Path, content: Content, cfg: DictConfig, module: Classifier) -> None:
    """Refuse to go on from a checkpoint with which this config has nothing to do."""
    different = shape_differences(content["state_dict"], module.state_dict())
    if different:
        raise CheckpointError(f"{path}: is of another network: {'; '.join(different)}")
    problems = refused_changes(DictConfig(content["config"]), cfg)
    done, begun = content["position"]["epoch"], content["position"]["batch"] > 0
    epochs, least = cfg.trainer.max_epochs, done + begun
    if least > epochs:
        what = f"epoch {least} is begun" if begun else f"{done} epochs are done"
        problems.append(f"trainer.max_epochs={epochs}: {what}; take {least} or more")
    _refuse(problems, path)
    for what, now in conditions().items():
        before = content["conditions"].get(what)
        if before != now:
            log.warning(
                f"{what}: {now}, and {before} before: results may differ in their last bits"
            )


def _refuse(problems: Sequence[str], path: Path) -> None:
    if problems:
        raise ConfigError([f"{problem} (says {path})" for problem in problems])


def _run(
    cfg: DictConfig,
    place: Place,
    directory: Path,
    data: ImageData,
    module: Classifier,
    record: Record,
    saved: tuple[Path, Content] | None,
    labels: Mapping[str, Any] | None,
    callbacks: Sequence[lightning.Callback],
    lost: Callable[[str], None],
) -> dict[str, Any]:
    """The run itself; what result.json says of it."""
    started = time.perf_counter()
    with interruption.answering("raise"):  # a download is ended, and its folder removed
        data.prepare()
    tensorboard = record.tensorboard
    trainer = build_trainer(cfg, place, directory, data, module, record, callbacks)
    log.info(f"device: {device_text(trainer)}")
    table, optional = layer_table(module.network, data.shape), ("output", "type", "parameters")
    whole, fitted = (table_text(table, optional, columns) for columns in (UNLIMITED, width()))
    log.info(whole, extra={"terminal": fitted})

    before = 0.0
    if saved:
        path, content = saved
        epoch, batch = content["position"]["epoch"] + 1, content["position"]["batch"] + 1
        log.info(f"going on from {path.name} at epoch {epoch}, batch {batch}")
        tensorboard.go_on(content["callbacks"]["Record"]["tensorboard"])
        before = content["callbacks"]["Record"]["seconds"][0]
        shown = content["config"].get("tensorboard") or {}
        record.insights.begin(cfg, module.network, shown)
    else:
        tensorboard.begin(cfg, labels)
        record.insights.begin(cfg, module.network)
    trainer.checkpoints.facts = {
        "config": OmegaConf.to_container(cfg, resolve=True),
        "config_hash": config_hash(cfg),
    }
    checkpoint = saved[0].absolute() if saved else None
    work = {
        "config": OmegaConf.to_container(cfg, resolve=True),
        "directory": str(directory.absolute()),
        "checkpoint": checkpoint and str(checkpoint),
    }
    with company(place, trainer.strategy.root_device, work, lost):
        fit_and_test(trainer, place, cfg, data, module, checkpoint)
    test = module.totals["test"].metrics("test")
    tensorboard.log_metrics(test, record.epochs[-1]["epoch"])
    tensorboard.end(cfg)
    chosen = record.chosen(trainer)
    return {
        "metrics": {name: chosen[name] for name in METRICS if name in chosen} | test,
        "epochs": len(record.epochs),
        "tested_epoch": chosen["epoch"],
        "timings": {
            "seconds": before + time.perf_counter() - started,
            "images_per_second": record.images / record.in_all,
        },
    }
