"""Command-line plan: the checked configs of all runs that a command line asks for."""

import argparse
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from cnntrain import config
from cnntrain.config import ConfigError
from cnntrain.config.composition import as_if_running
from cnntrain.config.errors import format_error
from cnntrain.config.overrides import combinations, key_of, parsed, sweeps

PLAIN = (bool, int, float, str)
MOST_RUNS = 10_000  # of a sweep: all configs are composed before the first run starts


def places(arguments: argparse.Namespace) -> dict[str, Any]:
    """The folders with configs, as keyword arguments for `cnntrain.config`."""
    extra = Path(arguments.config_dir).absolute() if arguments.config_dir else None
    return {"folder": Path(arguments.config_path or config.CONF), "extra": extra}


def is_basic(plugin: DictConfig | None) -> bool:
    """Whether a config node is Hydra's own launcher or sweeper."""
    return plugin is None or str(plugin._target_).rpartition(".")[2].startswith("Basic")


@dataclass(frozen=True)
class Plan:
    """The checked runs of a command line."""

    cfgs: list[DictConfig]  # with the node `hydra`
    sweep: bool
    varied: list[str]  # the options with several values, in the order typed


def plan(arguments: argparse.Namespace, name: str) -> Plan:
    """Compose and check a command line for conf/<name>.yaml. ConfigError with all problems."""
    if arguments.multirun and name == "train":
        print("sweep: checking the config of every run", flush=True)
    where = {"name": arguments.config_name or name, "command": name, **places(arguments)}
    overrides, types = arguments.overrides, not arguments.help
    fixed = [text for text in overrides if not sweeps(text)]
    cfg, problems = config.compose_valid(fixed, **where, types=types)
    varied: list[str] = []
    sweep = arguments.multirun or _select(cfg, "hydra.mode") == RunMode.MULTIRUN
    if not sweep and fixed != overrides:
        cfg, problems = config.compose_valid(overrides, **where, types=types)
    cfgs = [cfg] if cfg else []
    # Only Hydra's own sweeper expands overrides in a known way.
    if sweep and is_basic(_select(cfg, "hydra.sweeper")):
        problems.clear()  # the fixed overrides alone need not be a valid run
        params = _select(cfg, "hydra.sweeper.params") or {}
        overrides = [*(f"{key}={value}" for key, value in params.items()), *overrides]
        varied = [key_of(text) for text in overrides if sweeps(text)]
        expanded = combinations(overrides, where["folder"], MOST_RUNS + 1)
        if len(expanded) > MOST_RUNS:
            problems.append(f"-m: makes more than {MOST_RUNS:,} runs; sweep over fewer values")
        else:
            plain = [k for k in varied if _is_plain(_select(cfg, k)) and "_target_" not in k]
            cfgs = _compose_runs(expanded, plain, where, problems)
        empty = [o for o in overrides if sweeps(o) and not combinations([o], where["folder"], 1)]
        problems += [f"{text}: expands to no value" for text in empty]
    if problems:
        raise ConfigError(problems)
    return Plan(cfgs, sweep, list(dict.fromkeys(varied)))


def show_config(arguments: argparse.Namespace, name: str) -> None:
    """`--cfg`: print the config, as far as it can be composed; ConfigError with all problems."""
    cfg, problems = config.compose_valid(
        arguments.overrides, arguments.config_name or name, name, **places(arguments), types=False
    )
    if cfg is None:
        raise ConfigError(problems)
    if arguments.resolve:
        OmegaConf.set_readonly(cfg.hydra, None)
        try:
            with as_if_running(cfg, 0):
                OmegaConf.resolve(cfg)
        except (OmegaConfBaseException, RecursionError) as error:
            problems = problems or [f"--resolve: {format_error(error)}"]
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


def _compose_runs(
    expanded: Sequence[Sequence[str]],
    plain: Collection[str],
    where: dict[str, Any],
    problems: list[str],
) -> list[DictConfig]:
    """The config of every run of a sweep.

    Hydra takes about 150 ms per config. Of runs that differ only in the values of `plain` options,
    it composes one; in copies of that config the values are replaced.
    """
    cfgs, composed = list[DictConfig](), dict[tuple[str, ...], DictConfig | None]()
    for overrides in expanded:
        values = {}
        for text in overrides:
            key = text.partition("=")[0]
            if key in plain and _is_plain(value := parsed(text).value()):
                values[text] = key, value
        kind = tuple(values[text][0] if text in values else text for text in overrides)
        if kind not in composed:
            cfg, new = config.compose_valid(overrides, **where, types=False)
            problems += new
            cfg = composed[kind] = None if new else cfg  # the others have the same problems
        elif (cfg := composed[kind]) is not None:
            cfg = cfg.copy()
            for key, value in values.values():
                OmegaConf.update(cfg, key, value)
            task = [text for text in overrides if not text.lstrip("+~").startswith("hydra")]
            with read_write(cfg.hydra):
                cfg.hydra.overrides.task = task
            config.adapt_types(cfg, cfg.hydra)
        if cfg is not None:
            cfgs.append(cfg)
            command = config.ROOTS[where["command"]]
            problems += config.config_problems(config.without_hydra(cfg), command)
    return cfgs


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) and "${" not in str(value) and value != "???"


def _select(cfg: DictConfig | None, option: str) -> Any:
    return OmegaConf.select(cfg, option) if cfg else None


def check_flags(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for Hydra's flags: missing folders, contradictions, unsafe ones."""
    problems = []
    for flag in ("config_path", "config_dir"):
        given = getattr(arguments, flag)
        if given is not None and not os.path.isdir(given):
            problems.append(f"--{flag.replace('_', '-')}={given}: is not a folder")
    if arguments.experimental_rerun is not None:
        problems.append("--experimental-rerun: unpickles a file, which may run anything; leave out")
    for flag in ("resolve", "package"):
        if getattr(arguments, flag) and not arguments.cfg:
            problems.append(f"--{flag}: requires --cfg")
    modes = {"--run": "run", "-m": "multirun", "--cfg": "cfg", "--info": "info"}
    modes["--shell-completion"] = "shell_completion"
    if len(given := [flag for flag, name in modes.items() if getattr(arguments, name)]) > 1:
        problems.append(f"{' '.join(given)}: only one of them at a time")
    if problems:
        raise ConfigError(problems)
