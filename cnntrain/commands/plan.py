"""Command-line plan: the checked configs of all runs that a command line asks for."""

import argparse
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cnntrain import config
from cnntrain.config import ConfigError
from cnntrain.config.composition import as_if_running
from cnntrain.config.errors import collect, format_error
from cnntrain.config.overrides import combinations, key_of, parsed, sweeps
from cnntrain.config.resume import run_options
from cnntrain.sweeps.members import ComposedRun, without_sweep_options

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

    cfgs: list[DictConfig]  # composed by Hydra, with the node `hydra`
    runs: list[ComposedRun]  # all runs of a sweep
    sweep: bool
    varied: list[str]  # the options with several values, in the order typed


def plan(arguments: argparse.Namespace, name: str) -> Plan:
    """Compose and check a command line for conf/<name>.yaml. ConfigError with all problems."""
    if problems := _flag_problems(arguments):
        raise ConfigError(problems)
    if arguments.multirun and name == "train":
        print("sweep: checking the config of every run", flush=True)
    where: dict[str, Any] = {
        "name": arguments.config_name or name,
        "command": name,
        **places(arguments),
        "types": not arguments.help,
    }
    overrides: list[str] = arguments.overrides
    fixed = [text for text in overrides if not sweeps(text)]
    cfgs = _compose([fixed], where, problems)
    sweep = arguments.multirun or _select(cfgs, "hydra.mode") == RunMode.MULTIRUN
    varied, runs = list[str](), list[ComposedRun]()
    if not sweep and fixed != overrides:
        cfgs = _compose([overrides], where, problems)
    # Only Hydra's own sweeper expands overrides in a known way.
    elif sweep and is_basic(_select(cfgs, "hydra.sweeper")):
        problems.clear()  # the fixed overrides alone need not be a valid run
        params = _select(cfgs, "hydra.sweeper.params") or {}
        overrides = [*(f"{key}={value}" for key, value in params.items()), *overrides]
        varied = [key_of(text) for text in overrides if sweeps(text)]
        expanded = combinations(overrides, where["folder"], MOST_RUNS + 1)
        if len(expanded) > MOST_RUNS:
            problems.append(f"-m: makes more than {MOST_RUNS:,} runs; sweep over fewer values")
        elif name == "train":
            plain = [k for k in varied if not cfgs or isinstance(_select(cfgs, k), PLAIN)]
            cfgs, runs = _compose_sweep(expanded, plain, where, problems)
        else:
            cfgs = _compose(expanded, where, problems)
        empty = [o for o in overrides if sweeps(o) and not combinations([o], where["folder"], 1)]
        problems += [f"{text}: expands to no value" for text in empty]
    if problems:
        raise ConfigError(problems)
    return Plan(cfgs, runs, sweep, list(dict.fromkeys(varied)))


def show_config(arguments: argparse.Namespace, name: str) -> None:
    """`--cfg`: print the config, as far as it can be composed; ConfigError with all problems."""
    if problems := _flag_problems(arguments):
        raise ConfigError(problems)
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


def _compose(
    runs: Sequence[Sequence[str]], where: dict[str, Any], problems: list[str]
) -> list[DictConfig]:
    cfgs = []
    for overrides in runs:
        with collect(problems):
            cfgs.append(config.compose_all(overrides, **where))
    return cfgs


def _compose_sweep(
    expanded: Sequence[Sequence[str]],
    plain: Collection[str],
    where: dict[str, Any],
    problems: list[str],
) -> tuple[list[DictConfig], list[ComposedRun]]:
    """The runs of a sweep, and those of their configs that were composed by Hydra.

    Hydra takes about 150 ms per config. Of runs that differ only in the values of `plain` options,
    it composes one; in copies of that config the values are replaced.
    """
    cfgs, runs, invalid = list[DictConfig](), list[ComposedRun](), set[tuple[str, ...]]()
    alike: dict[tuple[str, ...], tuple[DictConfig, ComposedRun]] = {}
    for overrides in expanded:
        values = {t: pair for t in overrides if (pair := _assigned(t)) and pair[0] in plain}
        kind = tuple(values[text][0] if text in values else text for text in overrides)
        if kind in alike:
            full, like = alike[kind]
            full = full.copy()
            for key, value in values.values():
                OmegaConf.update(full, key, value)
            problems += config.config_problems(full, config.ROOTS["train"])
            typed = [text for text in overrides if not text.lstrip("+~").startswith("hydra")]
            run = ComposedRun(run_options(full), without_sweep_options(typed), like.choices)
            runs.append(run)
        elif kind not in invalid:
            composed = _compose([overrides], where, new := list[str]())
            if new and not set(new) - set(problems):
                invalid.add(kind)  # the others have the same problems
            problems += new
            for cfg in composed:
                cfgs.append(cfg)
                runs.append(ComposedRun.of(cfg))
                full = config.without_hydra(cfg)
                if all(OmegaConf.select(full, key) == value for key, value in values.values()):
                    alike[kind] = full, runs[-1]
    return cfgs, runs


@cache
def _assigned(text: str) -> tuple[str, Any] | None:
    """The option and the value of an override with a plain value."""
    try:
        key, value = text.partition("=")[0], parsed(text).value()
    except HydraException:
        return None
    fixed = key.endswith("_target_") or not isinstance(value, PLAIN)
    return None if fixed or "${" in str(value) or value == "???" else (key, value)


def _select(cfgs: Sequence[DictConfig], option: str) -> Any:
    return OmegaConf.select(cfgs[0], option) if cfgs else None


def _flag_problems(arguments: argparse.Namespace) -> list[str]:
    """Problems of Hydra's flags: missing folders, contradictions, unsafe ones."""
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
    return problems
