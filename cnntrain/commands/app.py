"""The way from a command line to a checked config, for every command that has one."""

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
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cnntrain import config
from cnntrain.commands.plan import Plan, places, plan, show_config
from cnntrain.config.cross_checks import cross_check_data
from cnntrain.config.overrides import merged
from cnntrain.process_info import launched

Run = Callable[[DictConfig], float | None]
DryRun = Callable[[DictConfig], None]


class Many(Protocol):
    """What a command does with `-m`."""

    def plan(self, asked: Plan) -> list[DictConfig]:
        """The configs that are to be run; writes nothing, and raises ConfigError."""

    def refuse_options(self) -> None:
        """Raise ConfigError for options that say nothing without `-m`."""

    def run(self) -> None:
        """Run them all, and end the process with another exit code than 0 if not all is well."""


def start(
    name: str,
    run: Run,
    *,
    dry_run: DryRun | None = None,
    resuming: bool = False,
    one: str | None = None,
    many: Callable[[argparse.Namespace], "Many"] | None = None,
) -> None:
    """Check the whole command line against conf/<name>.yaml, then let Hydra call `run`.

    `dry_run` finds what only constructors find, and writes nothing: it is called for every run
    before the first begins. `resuming` says that the run directory holds what is to be continued;
    `one` is what the command takes one of, so that there are no sweeps over it; `many` takes a
    sweep over in place of Hydra.

    Exit codes: 2 for what the person who typed it has to change, 130 for Ctrl-C, 1 for a file that
    cannot be written.
    """
    arguments = command_line()
    flags = [text for text in sys.argv[1:] if text not in arguments.overrides]
    if arguments.config_path:  # which Hydra would look for beside this file
        flags.append(f"--config-path={Path(arguments.config_path).absolute()}")
    sys.argv[1:] = [*flags, *arguments.overrides]
    sweep = many(arguments) if many else None
    try:
        sweeping = _check(arguments, name, dry_run, resuming, one, sweep)
    except config.ConfigError as error:
        exit_with_problems(error)
    if arguments.cfg:
        return

    if sweep and sweeping:
        try:
            sweep.run()
        except config.ConfigError as error:
            exit_with_problems(error)
        return

    @wraps(run)
    def guarded(cfg: DictConfig) -> float | None:
        try:
            config.settle(cfg, HydraConfig.get(), config.ROOTS[name])
            return run(cfg)
        except config.ConfigError as error:
            exit_with_problems(error)
        except KeyboardInterrupt:
            print("\ncnntrain: interrupted", file=sys.stderr)
            sys.exit(130)

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else it swallows the error below
    logging.raiseExceptions = False  # a full disk is told of once, not by every line of a log
    threading.excepthook = _thread_ended
    try:
        hydra.main(config_path=str(config.CONF), config_name=name, version_base="1.3")(guarded)()
    except OSError as error:  # Hydra itself could not write
        print(f"cnntrain: {format_os_error(error)}", file=sys.stderr)
        sys.exit(1)


def command_line() -> argparse.Namespace:
    """What was typed, in Hydra's terms; modules in the folder that one is in are found from now."""
    here = os.getcwd()  # a backend of the user's own may lie here
    if here not in sys.path[1:2]:
        sys.path.insert(1, here)
    if garbled := [text for text in sys.argv[1:] if any(map(_surrogate, text))]:
        exit_with_problems(config.ConfigError([f"{text}: is not UTF-8" for text in garbled]))
    # Hydra's parser takes overrides only in one place; a person writes -m wherever it fits.
    parser = get_args_parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args()
    arguments.typed = len(sys.argv) - 1  # words that follow the program in sys.orig_argv
    flags = [text for text in sys.argv[1:] if text not in arguments.overrides]
    arguments.overrides = merged(arguments.overrides)
    sys.argv[1:] = [*flags, *arguments.overrides]
    return arguments


def restart(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    """A command line that starts this program with other overrides, as one would type it here.

    It has the options that say where configs are, and those of Python itself.
    """
    command = sys.orig_argv[: len(sys.orig_argv) - arguments.typed]
    if len(command) > 1 and shutil.which(Path(command[1]).name) == command[1]:
        command[:2] = [Path(command[1]).name]  # a console script
    for flag in ("config_path", "config_dir", "config_name"):
        if (given := getattr(arguments, flag)) is not None:
            command.append(f"--{flag.replace('_', '-')}={given}")
    return shlex.join([*command, *overrides])


def short(path: Path) -> str:
    """A path as one would type it where the command was typed."""
    here = Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def format_os_error(error: OSError) -> str:
    """What the operating system says, of which file; of a renaming, which to which."""
    names = (error.filename, error.filename2)
    files = " to ".join(os.fsdecode(n) if isinstance(n, bytes) else str(n) for n in names if n)
    return f"{files}: {error.strerror}" if files else str(error.strerror or error)


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    # A thread that writes, TensorBoard's: its error is raised again where it is given work.
    if not issubclass(ended.exc_type, OSError):
        threading.__excepthook__(ended)


def exit_with_problems(error: config.ConfigError) -> NoReturn:
    """Say what is wrong, a line a problem, and end."""
    print("cnntrain: this cannot be run as asked", file=sys.stderr)
    for problem in error.problems:
        print(f"  {printable(problem)}", file=sys.stderr)
    sys.exit(2)


def printable(text: str) -> str:
    """Line breaks, terminal codes and broken characters, of a command line or of a file's name, as
    escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _refuse_flag(message: str) -> NoReturn:
    hint = "; options have no dashes: option=value" if "unrecognized" in message else ""
    exit_with_problems(config.ConfigError([message + hint]))


def _surrogate(character: str) -> bool:
    """Whether Python had to make do with it, for a byte that is no text."""
    return "\ud800" <= character <= "\udfff"


def _only_asks(arguments: argparse.Namespace) -> bool:
    """Whether nothing is to be run."""
    asks = (arguments.help, arguments.hydra_help, arguments.cfg, arguments.info)
    return any(asks) or arguments.shell_completion


def _check(
    arguments: argparse.Namespace,
    name: str,
    dry_run: DryRun | None,
    resuming: bool,
    one: str | None,
    many: "Many | None",
) -> bool:
    """Find all that is wrong with the command line before anything is written; whether it is a
    sweep that is to be run."""
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
    from cnntrain.config.hydra_options import hydra_problems

    required = config.ROOTS[name].required
    if missing := [key for key in required if OmegaConf.is_missing(cfgs[0], key)]:
        raise config.ConfigError([f"{key}: has to be given, {key}=..." for key in missing])
    if sweep and one:
        raise config.ConfigError([f"-m: {name} takes one {one}; start it once for each"])
    if sweep and (place := launched()):
        raise config.ConfigError(
            [
                f"-m: makes many runs, and {place.launcher} has started the processes of one; "
                f"leave {place.launcher} out, each run starts its own: "
                f"python train.py -m ... trainer=ddp trainer.devices={place.devices}"
            ]
        )
    if (chosen := cfgs[0].get("resume")) and f"resume={chosen}" not in sys.argv and not resuming:
        raise config.ConfigError([f"resume={chosen}: has to be typed as it stands here"])
    problems = hydra_problems(cfgs, sweep=sweep, resuming=resuming, placed=sweep and bool(many))
    if problems:
        raise config.ConfigError(problems)
    if many and sweep:
        cfgs = many.plan(planned)
    elif many:
        many.refuse_options()
    with config.searching(**places(arguments), name=name):
        if resuming and dry_run:
            dry_run(cfgs[0])  # of what it continues, whatever is composed here
        elif not resuming:
            for cfg in _different(cfgs):
                problems += build_problems(cfg, dry_run)
    if problems:
        raise config.ConfigError(problems)
    return sweep


def build_problems(cfg: DictConfig, dry_run: DryRun | None) -> list[str]:
    """What only building shows to be wrong with a config that `check` has found nothing in.

    `dry_run` builds from it all that will be built, writes nothing, and raises ConfigError with
    the node and the constructor's message.
    """
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
    """The configs without Hydra's options, and of those that differ only in the seed one."""
    found = {}
    for cfg in cfgs:
        content: Any = OmegaConf.to_container(cfg)
        found[repr({k: v for k, v in content.items() if k not in ("hydra", "seed")})] = cfg
    return list(map(config.without_hydra, found.values()))
