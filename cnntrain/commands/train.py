"""`cnntrain train` and `python train.py`: one run, or a sweep with -m."""

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain import config
from cnntrain.commands import app
from cnntrain.commands.app import short
from cnntrain.commands.plan import places
from cnntrain.commands.sweeping import SweepCommand
from cnntrain.config import ConfigError, quoted, resume
from cnntrain.config.composition import fixed_run_directory
from cnntrain.config.errors import first_line
from cnntrain.interruption import Interrupted, watching
from cnntrain.process_info import ProcessInfo, launched
from cnntrain.terminal import paragraph

# Config and overrides, of all its starts, of a run to be continued; None: as recorded.
Resumed = tuple[DictConfig, list[str] | None]


def main() -> None:
    # Otherwise torch prints a line for every attempt to connect,
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    info = launched()
    if info and info.rank > 0:
        _train_rank(info)
    # and its profiler prints about itself.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # sweep=<name> is short for sweep.name=<name>.
    sys.argv[1:] = [re.sub("^sweep=", "sweep.name=", text) for text in sys.argv[1:]]
    with watching("leave"):
        try:
            if info:
                _connect(info)
            arguments = app.command_line()
            resumed = _resumed(arguments)
            app.start(
                "train",
                lambda cfg: _train(cfg, resumed),
                arguments=arguments,
                dry_run=lambda cfg: _dry_run(cfg, resumed),
                resuming=resumed is not None,
                multirun=SweepCommand,
            )
        except ConfigError as error:
            app.exit_with_problems(error)
        except OSError as error:
            app.exit_with_os_error(error)
        except Interrupted as error:
            _leave(error)
        finally:
            if info:
                from cnntrain.training.distributed import dismiss

                dismiss(info)


def _train_rank(info: ProcessInfo) -> NoReturn:
    """Ranks 1 and up of torchrun or srun: rank 0 alone reads the command line and prints."""
    sys.path.insert(1, os.getcwd())  # as `command_line` does
    from cnntrain.training import NonFiniteError
    from cnntrain.training.building import train_rank

    try:
        train_rank(info)
    except NonFiniteError:
        _end(3)
    except Exception as error:
        lost = type(error).__name__ == "ProcessLost"
        text = str(error) if lost else f"{type(error).__name__}: {first_line(error)}"
        _end(1, f"process {info.rank + 1} of {info.world_size}: {text}")
    _end(0)


def _connect(info: ProcessInfo) -> None:
    """Let the other ranks connect, before anything is written."""
    from cnntrain.training import ProcessLost
    from cnntrain.training.distributed import connect

    try:
        connect(info)
    except ProcessLost as error:
        _end(1, str(error))


def _train(cfg: DictConfig, resumed: Resumed | None) -> float:
    from cnntrain.data import DataError
    from cnntrain.training import CheckpointError, NonFiniteError, ProcessLost, Profile
    from cnntrain.training.run import run_training

    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    again = f"resume={shlex.quote(short(directory))}"
    typed = [text for text in hydra.overrides.task if not _sets(text, "resume", "profile")]
    callbacks = [Profile(directory)] if cfg.get("profile") else []
    cfg, overrides = resumed or (cfg, typed)
    try:
        result = run_training(
            cfg, directory, resume=resumed is not None, overrides=overrides, callbacks=callbacks
        )
    except Interrupted as error:
        _leave(error, f"; resume with {again}")
    except (NonFiniteError, DataError, CheckpointError) as error:
        print(f"cnntrain: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, NonFiniteError) else 1)
    except ProcessLost as error:
        # Not sys.exit: the process group would wait for the lost process once more.
        _end(1, f"{error}; resume with {again}")
    except OSError as error:
        app.exit_with_os_error(error, f"; once that is fixed, resume with {again}")
    _show(result.metrics, result.seconds, directory)
    return result.metrics[cfg.trainer.monitor]


def _dry_run(cfg: DictConfig, resumed: Resumed | None) -> None:
    from cnntrain.training import dry_run

    dry_run(resumed[0] if resumed else cfg, resuming=resumed is not None)


def _resumed(arguments: argparse.Namespace) -> Resumed | None:
    """The run that `resume` continues, if it has begun. Prints one that is completed, and exits."""
    given = [text for text in arguments.overrides if text.startswith("resume=")]
    prints_only = (arguments.help, arguments.hydra_help, arguments.info, arguments.shell_completion)
    chosen = given[-1].partition("=")[2].strip("'\"") if given else "null"
    if chosen == "null" or any(prints_only):
        return None
    overrides = [text for text in arguments.overrides if text not in given]
    hydra = [t for t in overrides if t.lstrip("+~").startswith("hydra") or _sets(t, "profile")]
    own = [text for text in overrides if text not in hydra]
    files: dict[str, Any] = {"name": arguments.config_name or "train"} | places(arguments)
    if arguments.multirun:
        raise ConfigError([f"{given[-1]}: continues one run; leave out -m"])

    def compose(chosen: Sequence[str]) -> DictConfig:
        return config.compose_all(chosen, **files, command="train", types=False)

    if chosen == "auto":
        cfg = compose(overrides)
        directory = fixed_run_directory(cfg)
        if arguments.cfg or not resume.has_run(directory):
            return None
    else:
        directory = Path(chosen)
        if not chosen or not resume.has_run(directory):
            raise ConfigError([f"{given[-1]}: holds no run; give the folder of one, or auto"])
        if arguments.cfg:
            problem = "--cfg: shows a new run; the config of this one is"
            raise ConfigError([f"{problem} {directory / resume.CONFIG}"])
        if placed := [text for text in hydra if _sets(text, "hydra.run.dir")]:
            raise ConfigError([f"{placed[0]}: goes with resume=auto; a run stays where it is"])
    if resume.is_running(directory):
        raise ConfigError([resume.in_use(directory)])
    run = resume.run_config(directory, _newest_checkpoint)
    if chosen == "auto":
        wanted = resume.run_options(cfg)
    else:
        wanted = resume.with_overrides(
            run, directory, own, lambda texts: config.without_hydra(compose(texts))
        )
    if result := resume.completed(directory, wanted):  # was checked when it ran
        print("already completed")
        _show(result["metrics"], result["timings"]["seconds"], directory)
        sys.exit(0)
    problems = config.check(wanted) or config.cross_check(wanted)
    if problems := problems or resume.resume_problems(run, wanted):
        raise ConfigError(problems)
    # Hydra gets the run directory and its own options.
    arguments.overrides = [text for text in hydra if not _sets(text, "hydra.run.dir")]
    arguments.overrides.append(f"hydra.run.dir={quoted(str(directory))}")
    before = resume.read_overrides(directory) if own and chosen != "auto" else []
    return wanted, [*before, *own] if own else None


def _newest_checkpoint(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    from cnntrain.training.checkpoint_file import newest  # imports torch

    return newest(folder)


def _leave(interrupted: Interrupted, hint: str = "") -> NoReturn:
    # Not sys.exit: shutting Python down takes a second, in which another signal may come.
    _end(interrupted.exit_code, f"interrupted by {interrupted}{hint}", before="\n")


def _end(code: int, message: str = "", before: str = "") -> NoReturn:
    """Exit at once, after a line on stderr if there is a message."""
    if message:
        print(f"{before}cnntrain: {message}", file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _sets(override: str, *keys: str) -> bool:
    return override.lstrip("+").partition("=")[0] in keys


def _show(metrics: dict[str, Any], seconds: float, directory: Path) -> None:
    paragraph(
        f"\ntest accuracy   {metrics['test/acc']:.2%}   (loss "
        f"{metrics['test/loss']:.4f}, {seconds:.0f} s in all)\n"
        f"run directory   {short(directory)}\n"
        f"TensorBoard     tensorboard --logdir {shlex.quote(short(directory))}"
    )
