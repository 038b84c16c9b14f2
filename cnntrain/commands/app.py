"""The way from a command line to a checked config, for every command that has one."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain import config
from cnntrain.overrides import combinations

Run = Callable[[DictConfig], float | None]


def start(
    name: str,
    run: Run,
    *,
    rehearse: Callable[[DictConfig], None] | None = None,
    resuming: bool = False,
) -> None:
    """Check the whole command line against conf/<name>.yaml, then let Hydra call `run`.

    `rehearse` finds what only constructors find, and writes nothing. `resuming` says that the run
    directory holds what is to be continued.

    Exit codes: 2 for what the person who typed it has to change, 130 for Ctrl-C.
    """
    arguments = command_line()
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in arguments.overrides] + arguments.overrides
    asks = (arguments.help, arguments.hydra_help, arguments.info, arguments.shell_completion)
    if not any(asks):
        _check(arguments, name, rehearse, resuming)

    @wraps(run)
    def guarded(cfg: DictConfig) -> float | None:
        try:
            return run(cfg)
        except config.ConfigError as error:
            refuse(error)
        except KeyboardInterrupt:
            print("\ncnntrain: interrupted", file=sys.stderr)
            sys.exit(130)

    hydra.main(config_path=str(config.CONF), config_name=name, version_base="1.3")(guarded)()


def command_line() -> argparse.Namespace:
    """What was typed, in Hydra's terms; modules in the folder that one is in are found from now."""
    here = os.getcwd()  # a backend of the user's own may lie here
    if here not in sys.path[1:2]:
        sys.path.insert(1, here)
    # Hydra's parser takes overrides only in one place; a person writes -m wherever it fits.
    return get_args_parser().parse_intermixed_args()


def short(path: Path) -> str:
    """A path as one would type it where the command was typed."""
    here = Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _check(
    arguments: argparse.Namespace,
    name: str,
    rehearse: Callable[[DictConfig], None] | None,
    resuming: bool,
) -> None:
    """Say everything that is wrong with the command line before anything is written."""
    folder = Path(arguments.config_path or config.CONF)
    extra = Path(arguments.config_dir).absolute() if arguments.config_dir else None
    overrides: list[str] = arguments.overrides
    problems = []
    if extra and not extra.is_dir():
        problems.append(f"--config-dir={arguments.config_dir}: is not a folder")
        extra = None
    if arguments.resolve and not arguments.cfg:
        problems.append("--resolve: goes with --cfg")
    runs = [overrides]
    if arguments.multirun or any("hydra.mode=MULTIRUN" in o for o in overrides):
        runs = combinations(overrides, folder)
    for chosen in [o for o in overrides if o.startswith("hydra.run.dir=")]:
        if not resuming and (
            problem := config.run_directory_problem(chosen.partition("=")[2].strip("'\""))
        ):
            problems.append(problem)
    for run in runs:
        try:
            config.compose(run, name=arguments.config_name or name, folder=folder, extra=extra)
        except config.ConfigError as error:
            problems += error.problems
    if problems:
        refuse(config.ConfigError(problems))


def refuse(error: config.ConfigError) -> NoReturn:
    """Say what is wrong, a line a problem, and end."""
    print("cnntrain: this cannot be run as asked", file=sys.stderr)
    for problem in error.problems:
        print(f"  {problem}", file=sys.stderr)
    sys.exit(2)
