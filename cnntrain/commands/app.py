"""Entry of every command with a config: parse, check everything, then call Hydra."""

import argparse
import logging
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, Protocol

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cnntrain import config
from cnntrain.commands.plan import Plan, places, plan, show_config
from cnntrain.config.cross_checks import cross_check_data
from cnntrain.config.errors import format_error, format_os_error
from cnntrain.config.hydra_compat import get_args_parser
from cnntrain.config.overrides import merged
from cnntrain.config.paths import output_problems
from cnntrain.process_info import launched

Run = Callable[[DictConfig], float | None]
DryRun = Callable[[DictConfig], None]


class Multirun(Protocol):
    """How a command runs `-m`, instead of Hydra's sweeper."""

    def plan(self, planned: Plan) -> list[DictConfig]:
        """The configs that are still to be run; writes nothing. Raises ConfigError."""

    def reject_options(self) -> None:
        """Raise ConfigError for options that have no effect without `-m`."""

    def run(self) -> None:
        """Run them all; exits with code 1 if one has failed."""


def start(
    name: str,
    run: Run,
    *,
    dry_run: DryRun | None = None,
    resuming: bool = False,
    one: str | None = None,
    multirun: Callable[[argparse.Namespace], Multirun] | None = None,
) -> None:
    """Check the command line against conf/<name>.yaml, then call `run` with the config.

    Exit codes: 2 for a wrong command line or config, 130 for Ctrl-C, 1 for a file that cannot be
    written.

    Args:
        dry_run: Builds what a run builds, for every run before the first begins, and writes
            nothing.
        resuming: The run directory holds a run to be continued.
        one: What the command takes one of, so that it has no `-m`.
        multirun: Runs `-m` in place of Hydra.
    """
    arguments = command_line()
    flags = [text for text in sys.argv[1:] if text not in arguments.overrides]
    if arguments.config_path:  # Hydra would look for it beside this file
        flags.append(f"--config-path={Path(arguments.config_path).absolute()}")
    sys.argv[1:] = [*flags, *arguments.overrides]
    sweep = multirun(arguments) if multirun else None
    try:
        sweeping = _check(arguments, name, dry_run, resuming, one, sweep)
        if arguments.cfg:
            return
        if sweep and sweeping:
            return sweep.run()
    except config.ConfigError as error:
        exit_with_problems(error)
    running = False

    @wraps(run)
    def guarded(cfg: DictConfig) -> float | None:
        nonlocal running
        running = True
        try:
            config.adapt_types(cfg, HydraConfig.get())
            return run(cfg)
        except config.ConfigError as error:
            exit_with_problems(error)
        except KeyboardInterrupt:
            print("\ncnntrain: interrupted", file=sys.stderr)
            sys.exit(130)

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra replaces the exception
    logging.raiseExceptions = False  # a full disk is reported once, not by every line of a log
    threading.excepthook = _on_thread_error
    try:
        hydra.main(config_path=str(config.CONF), config_name=name, version_base="1.3")(guarded)()
    except OSError as error:  # Hydra itself could not write
        print(f"cnntrain: {format_os_error(error)}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if running:
            raise
        cause = error.__cause__ or error  # of logging's or a plugin's constructor
        exit_with_problems(config.ConfigError([f"hydra: {format_error(cause)}"]))


def command_line() -> argparse.Namespace:
    """Parse the command line as Hydra does, and add the working directory to sys.path."""
    here = os.getcwd()  # for a backend of the user's own
    if here not in sys.path[1:2]:
        sys.path.insert(1, here)
    if garbled := [text for text in sys.argv[1:] if any(map(_surrogate, text))]:
        exit_with_problems(config.ConfigError([f"{text}: is not UTF-8" for text in garbled]))
    # Hydra accepts overrides only before or after the flags; users write -m anywhere.
    parser = get_args_parser()
    parser.error = _reject_flag  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args()
    arguments.typed = len(sys.argv) - 1  # words that follow the program in sys.orig_argv
    flags = [text for text in sys.argv[1:] if text not in arguments.overrides]
    arguments.overrides = merged(arguments.overrides)
    sys.argv[1:] = [*flags, *arguments.overrides]
    return arguments


def restart(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    """A command line, quoted for the shell, that starts this program with other overrides."""
    command = sys.orig_argv[: len(sys.orig_argv) - arguments.typed]
    if len(command) > 1 and shutil.which(Path(command[1]).name) == command[1]:
        command[:2] = [Path(command[1]).name]  # a console script
    for flag in ("config_path", "config_dir", "config_name"):
        if (given := getattr(arguments, flag)) is not None:
            command.append(f"--{flag.replace('_', '-')}={given}")
    return shlex.join([*command, *overrides])


def short(path: Path) -> str:
    """A path relative to the working directory of the command, if below it."""
    here = Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _on_thread_error(error: threading.ExceptHookArgs) -> None:
    # TensorBoard's writer thread: its OSError is raised again by the next write.
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def exit_with_problems(error: config.ConfigError) -> NoReturn:
    """Print the problems, one line each, and exit with code 2."""
    print("cnntrain: invalid configuration", file=sys.stderr)
    for problem in error.problems:
        print(f"  {printable(problem)}", file=sys.stderr)
    sys.exit(2)


def printable(text: str) -> str:
    """The text with control and invalid characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _reject_flag(message: str) -> NoReturn:
    hint = "; options have no dashes: option=value" if "unrecognized" in message else ""
    exit_with_problems(config.ConfigError([message + hint]))


def _surrogate(character: str) -> bool:
    """Whether Python has decoded an invalid byte to this."""
    return "\ud800" <= character <= "\udfff"


def _only_asks(arguments: argparse.Namespace) -> bool:
    """Whether nothing is run."""
    asks = (arguments.help, arguments.hydra_help, arguments.cfg, arguments.info)
    return any(asks) or arguments.shell_completion


def _check(
    arguments: argparse.Namespace,
    name: str,
    dry_run: DryRun | None,
    resuming: bool,
    one: str | None,
    multirun: Multirun | None,
) -> bool:
    """Find every problem before anything is written. Returns whether it is a sweep."""
    if arguments.hydra_help or arguments.shell_completion:
        return False
    if arguments.cfg:
        show_config(arguments, name)
        return False
    planned = plan(arguments, name)
    cfgs, sweep = planned.cfgs, planned.sweep
    if arguments.help:
        from cnntrain.commands.help import show_help

        show_help(cfgs[0], arguments.config_name or name, **places(arguments))
        sys.exit()
    if _only_asks(arguments):
        return False
    required = config.ROOTS[name].required
    if missing := [key for key in required if OmegaConf.is_missing(cfgs[0], key)]:
        raise config.ConfigError([f"{key}: has to be given, {key}=..." for key in missing])
    if sweep and one:
        raise config.ConfigError([f"-m: {name} takes one {one}; start it once for each"])
    if sweep and (info := launched()):
        raise config.ConfigError(
            [
                f"-m: makes many runs, and {info.launcher} has started the processes of one; "
                f"leave {info.launcher} out, each run starts its own: "
                f"python train.py -m ... trainer=ddp trainer.devices={info.devices}"
            ]
        )
    if (chosen := cfgs[0].get("resume")) and f"resume={chosen}" not in sys.argv and not resuming:
        raise config.ConfigError([f"resume={chosen}: has to be on the command line, exactly so"])
    by_program = sweep and multirun is not None
    problems = output_problems(cfgs, sweep=sweep, resuming=resuming, by_program=by_program)
    if problems:
        raise config.ConfigError(problems)
    if multirun and sweep:
        cfgs = multirun.plan(planned)
    elif multirun:
        multirun.reject_options()
    with config.config_folders(**places(arguments), name=name):
        if resuming and dry_run:
            dry_run(cfgs[0])
        elif not resuming:
            for cfg in _different(cfgs):
                problems += build_problems(cfg, dry_run)
    if problems:
        raise config.ConfigError(problems)
    return sweep


def build_problems(cfg: DictConfig, dry_run: DryRun | None) -> list[str]:
    """Problems of a valid config that only constructors find, or the size of the data."""
    try:
        if dry_run:
            dry_run(cfg)
        if dry_run and "data" in cfg:
            with config.as_config_error("data"):
                return cross_check_data(cfg, config.build(cfg.data))
    except config.ConfigError as error:
        return list(error.problems)
    return []


def _different(cfgs: list[DictConfig]) -> list[DictConfig]:
    """The configs without `hydra`; one of those that differ only in the seed."""
    found = {}
    for cfg in cfgs:
        content: Any = OmegaConf.to_container(cfg)
        found[repr({k: v for k, v in content.items() if k not in ("hydra", "seed")})] = cfg
    return list(map(config.without_hydra, found.values()))
