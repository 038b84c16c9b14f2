"""From a command line to the configs of all its runs, checked."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cnntrain import config
from cnntrain.config import ConfigError
from cnntrain.config.hydra_options import as_if_running
from cnntrain.config.overrides import combinations, key_of, one_line, sweeps

MOST_RUNS = 10_000  # a sweep of which all configs are composed before the first run begins
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def places(arguments: argparse.Namespace) -> dict[str, Any]:
    """The folders that hold the configs, as `cnntrain.config` calls them."""
    extra = Path(arguments.config_dir).absolute() if arguments.config_dir else None
    return {"folder": Path(arguments.config_path or config.CONF), "extra": extra}


@dataclass(frozen=True)
class Plan:
    """The checked config of every run that is asked for, Hydra's own options in it."""

    cfgs: list[DictConfig]
    sweep: bool
    varied: list[str]  # the options that have several values, in the order typed


def plan(arguments: argparse.Namespace, name: str) -> Plan:
    """What a command line for conf/<name>.yaml asks for. Raises ConfigError with all that is wrong
    with it."""
    if problems := _flag_problems(arguments):
        raise ConfigError(problems)
    where: dict[str, Any] = {
        "name": arguments.config_name or name,
        "command": name,
        **places(arguments),
    }
    overrides: list[str] = arguments.overrides
    fixed = [text for text in overrides if not sweeps(text)]
    cfgs = _composed([fixed], where, problems)
    sweep = arguments.multirun or _asked(cfgs, "mode") == RunMode.MULTIRUN
    varied: list[str] = []
    if not sweep and fixed != overrides:
        cfgs = _composed([overrides], where, problems)
    # Another sweeper than Hydra's own is alone to know what its sweeps stand for.
    elif sweep and _asked(cfgs, "sweeper._target_") in (None, BASIC_SWEEPER):
        problems.clear()  # what does not vary need not make a run without what does
        params = _asked(cfgs, "sweeper.params") or {}
        overrides = [*(f"{key}={value}" for key, value in params.items()), *overrides]
        varied = [key_of(text) for text in overrides if sweeps(text)]
        runs = combinations(overrides, where["folder"], MOST_RUNS + 1)
        if len(runs) > MOST_RUNS:
            problems.append(f"-m: makes more than {MOST_RUNS:,} runs; sweep over fewer values")
        else:
            cfgs = _composed(runs, where, problems)
        empty = [o for o in overrides if sweeps(o) and not combinations([o], where["folder"], 1)]
        problems += [f"{text}: stands for no value at all" for text in empty]
    if problems:
        raise ConfigError(problems)
    return Plan(cfgs, sweep, list(dict.fromkeys(varied)))


def show_config(arguments: argparse.Namespace, name: str) -> None:
    """`--cfg`: print the config as it is used, with what can be applied of an invalid command line;
    then raise ConfigError with all that is wrong."""
    if problems := _flag_problems(arguments):
        raise ConfigError(problems)
    root = arguments.config_name or name
    cfg, problems = config.compose_valid(arguments.overrides, root, name, **places(arguments))
    if cfg is None:
        raise ConfigError(problems)
    if arguments.resolve:
        resolved = cfg.copy()
        OmegaConf.set_readonly(resolved.hydra, None)
        try:
            with as_if_running(resolved, 0):
                OmegaConf.resolve(resolved)
            cfg = resolved
        except (OmegaConfBaseException, RecursionError) as error:
            problems = problems or [f"--resolve: {one_line(error)}"]
    job = [str(key) for key in cfg if key != "hydra"]
    keys = {"job": job, "hydra": ["hydra"], "all": ["hydra", *job]}[arguments.cfg]
    shown: Any = OmegaConf.masked_copy(cfg, keys)
    if arguments.package not in (None, "_global_"):
        shown = OmegaConf.select(shown, arguments.package)
        if shown is None:
            raise ConfigError([*problems, f"--package={arguments.package}: there is no such node"])
        print(f"# @package {arguments.package}")
    print(OmegaConf.to_yaml(shown).rstrip() if OmegaConf.is_config(shown) else shown)
    if problems:
        raise ConfigError(problems)


def _composed(
    runs: Sequence[Sequence[str]], where: dict[str, Any], problems: list[str]
) -> list[DictConfig]:
    cfgs = []
    for overrides in runs:
        try:
            cfgs.append(config.compose_all(overrides, **where))
        except ConfigError as error:
            problems += error.problems
    return cfgs


def _asked(cfgs: Sequence[DictConfig], option: str) -> Any:
    return OmegaConf.select(cfgs[0], f"hydra.{option}") if cfgs else None


def _flag_problems(arguments: argparse.Namespace) -> list[str]:
    """Flags of Hydra's that name nothing, contradict each other, or run what they are given."""
    problems = []
    for flag in ("config_path", "config_dir"):
        given = getattr(arguments, flag)
        if given is not None and not os.path.isdir(given):
            problems.append(f"--{flag.replace('_', '-')}={given}: is not a folder")
    if arguments.config_name == "":
        problems.append("--config-name=: must name a root config")
    if arguments.experimental_rerun is not None:
        problems.append("--experimental-rerun: unpickles a file, which may run anything; leave out")
    if arguments.resolve and not arguments.cfg:
        problems.append("--resolve: goes with --cfg")
    if arguments.package is not None and not arguments.cfg:
        problems.append("--package: goes with --cfg")
    modes = {
        "--run": arguments.run,
        "-m": arguments.multirun,
        "--cfg": arguments.cfg,
        "--info": arguments.info,
        "--shell-completion": arguments.shell_completion,
    }
    if len(given := [flag for flag, on in modes.items() if on]) > 1:
        problems.append(f"{' '.join(given)}: only one of them at a time")
    return problems
