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
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cnntrain import config
from cnntrain.commands.plan import Plan, check_flags, places, plan, show_config
from cnntrain.config.composition import output_problems
from cnntrain.config.cross_checks import cross_check_data
from cnntrain.config.errors import collect, format_error, format_os_error
from cnntrain.config.hydra_compat import get_args_parser
from cnntrain.config.overrides import merged
from cnntrain.process_info import launched
from cnntrain.terminal import printable

Run = Callable[[DictConfig], float | None]
DryRun = Callable[[DictConfig], None]


def start(
    name: str,
    run: Run,
    *,
    arguments: argparse.Namespace | None = None,
    dry_run: DryRun | None = None,
    resuming: bool = False,
    one: str | None = None,
    multirun: Callable[[argparse.Namespace, Plan], Any] | None = None,
) -> None:
    """Check the command line against conf/<name>.yaml, then call `run` with the config.

    Exit codes: 2 for a wrong command line or config, 1 for a file that cannot be written.

    Args:
        dry_run: Builds what a run builds, for every run before the first, and writes nothing.
        resuming: The run directory holds a run to be continued.
        one: What the command takes one of, so that it has no `-m`.
        multirun: Returns an object whose method `run` runs `-m` in place of Hydra, and whose
            `configs` are those still to be run.
    """
    arguments = arguments or command_line()
    try:
        check_flags(arguments)
        if arguments.cfg:
            return show_config(arguments, name)
        if not (arguments.hydra_help or arguments.shell_completion):
            planned = plan(arguments, name)
            if arguments.help:
                from cnntrain.commands.help import show_help

                root = arguments.config_name or name
                return show_help(planned.cfgs[0], root, **places(arguments))
            if not arguments.info:
                own_sweep = multirun if planned.sweep else None
                _check(arguments, name, planned, resuming, one, by_program=own_sweep is not None)
                sweep = own_sweep(arguments, planned) if own_sweep else None
                with config.config_folders(**places(arguments), name=name):
                    _build(sweep.configs if sweep else planned.cfgs, dry_run, resuming)
                if sweep:
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

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra replaces the exception
    logging.raiseExceptions = False  # a full disk is reported once, not by every line of a log
    threading.excepthook = _on_thread_error
    sys.argv[1:] = [*arguments.flags, *arguments.overrides]
    try:
        hydra.main(config_path=str(config.CONF), config_name=name, version_base="1.3")(guarded)()
    except OSError as error:  # Hydra itself could not write
        exit_with_os_error(error)
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
    if garbled := [text for text in sys.argv[1:] if any("\ud800" <= c <= "\udfff" for c in text)]:
        exit_with_problems(config.ConfigError([f"{text}: is not UTF-8" for text in garbled]))
    # Hydra accepts overrides only before or after the flags; users write -m anywhere.
    parser = get_args_parser()
    parser.error = _reject_flag  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args()
    arguments.flags = [text for text in sys.argv[1:] if text not in arguments.overrides]
    if arguments.config_path:  # Hydra would look for it beside the file that calls it
        arguments.flags.append(f"--config-path={Path(arguments.config_path).absolute()}")
    arguments.overrides = merged(arguments.overrides)
    return arguments


def restart(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    """A command line, quoted for the shell, that starts this program with other overrides."""
    command = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
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


def exit_with_problems(error: config.ConfigError) -> NoReturn:
    """Print the problems, one line each, and exit with code 2."""
    print("cnntrain: invalid configuration", file=sys.stderr)
    for problem in error.problems:
        print(f"  {printable(problem)}", file=sys.stderr)
    sys.exit(2)


def exit_with_os_error(error: OSError, hint: str = "") -> NoReturn:
    """Print the file and the system's message, and exit with code 1."""
    print(f"cnntrain: {format_os_error(error)}{hint}", file=sys.stderr)
    sys.exit(1)


def build_problems(cfg: DictConfig, dry_run: DryRun | None) -> list[str]:
    """Problems of a valid config that only constructors find, or the size of the data."""
    problems: list[str] = []
    if dry_run:
        with collect(problems):
            dry_run(cfg)
            if "data" in cfg:
                with config.as_config_error("data"):
                    data = config.build(cfg.data)
                    data.open()
                    problems += cross_check_data(cfg, data)
    return problems


def _check(
    arguments: argparse.Namespace,
    name: str,
    planned: Plan,
    resuming: bool,
    one: str | None,
    by_program: bool,
) -> None:
    """Raise ConfigError with the problems of composed configs, before anything is written."""
    cfgs, sweep = planned.cfgs, planned.sweep
    required = [key for key in config.ROOTS[name].required if OmegaConf.is_missing(cfgs[0], key)]
    problems = [f"{key}: has to be given, {key}=..." for key in required]
    if sweep and one:
        problems.append(f"-m: {name} takes one {one}; start it once for each")
    if sweep and (info := launched()):
        problems.append(
            f"-m: {info.launcher} has started the processes of one run; leave {info.launcher} out, "
            f"and add trainer=ddp trainer.devices={info.devices}"
        )
    if not sweep:
        typed = [t for t in arguments.overrides if t.lstrip("+~").startswith(("sweep.", "search"))]
        problems += [f"{text}: is an option of a sweep; add -m" for text in typed]
    chosen = cfgs[0].get("resume")
    if chosen and f"resume={chosen}" not in arguments.overrides and not resuming:
        problems.append(f"resume={chosen}: has to be on the command line, exactly so")
    problems = problems or output_problems(
        cfgs, sweep=sweep, resuming=resuming, by_program=by_program
    )
    if problems:
        raise config.ConfigError(problems)


def _build(cfgs: list[DictConfig], dry_run: DryRun | None, resuming: bool) -> None:
    """Dry runs of the configs, one of those that differ only in the seed. Raises ConfigError."""
    if resuming and dry_run:
        return dry_run(cfgs[0])
    different = {}
    for cfg in map(config.without_hydra, cfgs):
        content: Any = OmegaConf.to_container(cfg)
        different[repr({k: v for k, v in content.items() if k != "seed"})] = cfg
    if problems := [line for cfg in different.values() for line in build_problems(cfg, dry_run)]:
        raise config.ConfigError(problems)


def _on_thread_error(error: threading.ExceptHookArgs) -> None:
    # TensorBoard's writer thread: its OSError is raised again by the next write.
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def _reject_flag(message: str) -> NoReturn:
    hint = "; options have no dashes: option=value" if "unrecognized" in message else ""
    exit_with_problems(config.ConfigError([message + hint]))
