"""`cnntrain train` and `python train.py`: one run, or a sweep with -m."""

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain.commands.app import command_line, exit_with_problems, short, start
from cnntrain.commands.plan import places
from cnntrain.commands.sweeping import SweepCommand
from cnntrain.config import (
    ConfigError,
    check,
    compose_all,
    cross_check,
    fixed_run_directory,
    quoted,
    without_hydra,
)
from cnntrain.config.errors import format_os_error
from cnntrain.config.resume import (
    CONFIG,
    completed,
    has_run,
    in_use,
    read_overrides,
    resume_problems,
    run_config,
    run_options,
    with_overrides,
)
from cnntrain.interruption import Interrupted, watching
from cnntrain.process_info import ProcessInfo, launched
from cnntrain.terminal import paragraph


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
            resumed = _resumed(command_line())
            start(
                "train",
                lambda cfg: _train(cfg, resumed),
                dry_run=lambda cfg: _dry_run(resumed.cfg if resumed else cfg),
                resuming=resumed is not None,
                multirun=SweepCommand,
            )
        except ConfigError as error:
            exit_with_problems(error)
        except OSError as error:
            print(f"cnntrain: {format_os_error(error)}", file=sys.stderr)
            sys.exit(1)
        except Interrupted as error:
            _leave(error)
        finally:
            if info:
                from cnntrain.training.workers import dismiss

                dismiss(info)


def _train_rank(info: ProcessInfo) -> NoReturn:
    """Ranks 1 and up of torchrun or srun: rank 0 alone reads the command line and prints."""
    sys.path.insert(1, os.getcwd())  # as `command_line` does
    from cnntrain.training import NonFiniteError
    from cnntrain.training.fit import train_rank

    try:
        train_rank(info)
    except NonFiniteError:
        _end(3)
    except Exception as error:
        kind = "" if type(error).__name__ == "ProcessLost" else f"{type(error).__name__}: "
        text = str(error).partition("\n")[0]
        name = f"process {info.rank + 1} of {info.world_size}"
        print(f"cnntrain: {name}: {kind}{text}", file=sys.stderr)
        _end(1)
    _end(0)


def _connect(info: ProcessInfo) -> None:
    """Let the other ranks connect, before anything is written."""
    from cnntrain.training import ProcessLost
    from cnntrain.training.distributed import connect

    try:
        connect(info)
    except ProcessLost as error:
        print(f"cnntrain: {error}", file=sys.stderr)
        _end(1)


@dataclass(frozen=True)
class Resumed:
    """A run to be continued."""

    cfg: DictConfig
    overrides: list[str] | None  # of all its starts; None: as recorded


def _train(cfg: DictConfig, resumed: Resumed | None) -> float:
    from cnntrain.data import DataError
    from cnntrain.training import CheckpointError, NonFiniteError, ProcessLost, Profile
    from cnntrain.training.run import run_training

    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    again = f"resume={shlex.quote(short(directory))}"
    not_of_run = ("resume", "profile")  # options of this process
    typed = [o for o in hydra.overrides.task if not any(_is(o, key) for key in not_of_run)]
    run = resumed or Resumed(cfg, typed)
    callbacks = [Profile(directory)] if cfg.get("profile") else []
    try:
        result = run_training(
            run.cfg,
            directory,
            resume=resumed is not None,
            overrides=run.overrides,
            callbacks=callbacks,
        )
    except Interrupted as error:
        _leave(error, f"; resume with {again}")
    except NonFiniteError as error:
        print(f"cnntrain: {error}", file=sys.stderr)
        sys.exit(3)
    except (DataError, CheckpointError) as error:
        print(f"cnntrain: {error}", file=sys.stderr)
        sys.exit(1)
    except ProcessLost as error:
        print(f"cnntrain: {error}; resume with {again}", file=sys.stderr)
        _end(1)  # the process group would wait for the lost process once more
    except OSError as error:
        print(
            f"cnntrain: {format_os_error(error)}; once that is fixed, resume with {again}",
            file=sys.stderr,
        )
        sys.exit(1)
    _show(result.metrics, result.seconds, directory)
    return result.metrics[run.cfg.trainer.monitor]


def _dry_run(cfg: DictConfig) -> None:
    from cnntrain.training import dry_run

    dry_run(cfg)


def _resumed(arguments: argparse.Namespace) -> Resumed | None:
    """The run that `resume` continues, if it has begun.

    If it is completed, its result is printed and the process exits.
    """
    given = [text for text in arguments.overrides if text.startswith("resume=")]
    prints_only = (arguments.help, arguments.hydra_help, arguments.info, arguments.shell_completion)
    chosen = _unquoted(given[-1].partition("=")[2]) if given else "null"
    if chosen == "null" or any(prints_only):
        return None
    overrides = [text for text in arguments.overrides if text not in given]
    hydra = [text for text in overrides if text.lstrip("+~").startswith("hydra")]
    profile = [text for text in overrides if _is(text, "profile")]
    own = [text for text in overrides if text not in [*hydra, *profile]]
    files: dict[str, Any] = {"name": arguments.config_name or "train"} | places(arguments)
    if arguments.multirun:
        raise ConfigError([f"{given[-1]}: continues one run; leave out -m"])

    def load(chosen: Sequence[str]) -> DictConfig:
        return without_hydra(compose_all(chosen, **files, command="train", types=False))

    if chosen == "auto":
        composed = run_options(load(own))
        directory = fixed_run_directory(arguments.overrides, **files)
        if arguments.cfg or not has_run(directory):
            return None
    else:
        directory = Path(chosen)
        problem = None
        if not chosen or not has_run(directory):
            home = "; ~ is not expanded there" if chosen.startswith("~") else ""
            problem = f"{given[-1]}: holds no run; give the folder of one, or auto{home}"
        elif arguments.cfg:
            problem = f"--cfg: shows a new run; the config of this one is {directory / CONFIG}"
        elif placed := [text for text in hydra if _is(text, "hydra.run.dir")]:
            problem = f"{placed[0]}: goes with resume=auto; a run stays where it is"
        if problem:
            raise ConfigError([problem])
    if busy := in_use(directory):
        raise ConfigError([busy])
    run = run_config(directory, _newest_checkpoint)
    wanted = composed if chosen == "auto" else with_overrides(run, directory, own, load)
    if result := completed(directory, wanted):  # was checked when it ran
        print("already completed")
        _show(result["metrics"], result["timings"]["seconds"], directory)
        sys.exit(0)
    problems = check(wanted) or cross_check(wanted) or resume_problems(run, wanted)
    if problems:
        raise ConfigError(problems)
    # Hydra gets only the run directory.
    others = [*profile, *(text for text in hydra if not _is(text, "hydra.run.dir"))]
    flags = [text for text in sys.argv[1:] if text not in arguments.overrides]
    sys.argv[1:] = [*flags, *others, f"hydra.run.dir={quoted(str(directory))}"]
    before = read_overrides(directory) if own and chosen != "auto" else []
    return Resumed(wanted, [*before, *own] if own else None)


def _newest_checkpoint(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    from cnntrain.training.checkpoint_file import newest  # imports torch

    return newest(folder)


def _leave(interrupted: Interrupted, hint: str = "") -> NoReturn:
    print(f"\ncnntrain: interrupted by {interrupted}{hint}", file=sys.stderr)
    # Not sys.exit: shutting Python down takes a second, in which another signal may come.
    _end(interrupted.exit_code)


def _end(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is(override: str, key: str) -> bool:
    return override.lstrip("+").partition("=")[0] == key


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _show(metrics: dict[str, Any], seconds: float, directory: Path) -> None:
    paragraph(
        f"\ntest accuracy   {metrics['test/acc']:.2%}   (loss "
        f"{metrics['test/loss']:.4f}, {seconds:.0f} s in all)\n"
        f"run directory   {short(directory)}\n"
        f"TensorBoard     tensorboard --logdir {shlex.quote(short(directory))}"
    )
