"""From a command line to the configs of all its runs, checked."""

import argparse
import os
import pickle
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
from cnntrain.config.errors import format_error
from cnntrain.config.overrides import combinations, key_of, parsed, sweeps
from cnntrain.config.paths import as_if_running
from cnntrain.config.resume import NOT_RUN_OPTIONS
from cnntrain.sweeps.members import Run

MOST_RUNS = 10_000  # a sweep of which all configs are composed before the first run begins
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def places(arguments: argparse.Namespace) -> dict[str, Any]:
    """The folders that hold the configs, as `cnntrain.config` calls them."""
    extra = Path(arguments.config_dir).absolute() if arguments.config_dir else None
    return {"folder": Path(arguments.config_path or config.CONF), "extra": extra}


@dataclass(frozen=True)
class Plan:
    """The checked runs that are asked for."""

    cfgs: list[DictConfig]  # composed by Hydra, with its own options in them
    runs: list[Run]  # all runs of a sweep
    sweep: bool
    varied: list[str]  # the options that have several values, in the order typed


def plan(arguments: argparse.Namespace, name: str) -> Plan:
    """What a command line for conf/<name>.yaml asks for. Raises ConfigError with all that is wrong
    with it."""
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
    cfgs = _composed([fixed], where, problems)
    sweep = arguments.multirun or _asked(cfgs, "hydra.mode") == RunMode.MULTIRUN
    varied, of_sweep = list[str](), list[Run]()
    if not sweep and fixed != overrides:
        cfgs = _composed([overrides], where, problems)
    # Another sweeper than Hydra's own is alone to know what its sweeps stand for.
    elif sweep and _asked(cfgs, "hydra.sweeper._target_") in (None, BASIC_SWEEPER):
        problems.clear()  # what does not vary need not make a run without what does
        params = _asked(cfgs, "hydra.sweeper.params") or {}
        overrides = [*(f"{key}={value}" for key, value in params.items()), *overrides]
        varied = [key_of(text) for text in overrides if sweeps(text)]
        runs = combinations(overrides, where["folder"], MOST_RUNS + 1)
        if len(runs) > MOST_RUNS:
            problems.append(f"-m: makes more than {MOST_RUNS:,} runs; sweep over fewer values")
        else:
            if name == "train":
                plain = [
                    key
                    for key in varied
                    if not key.endswith("_target_") and (not cfgs or _is_plain(_asked(cfgs, key)))
                ]
                cfgs, of_sweep = _composed_alike(runs, plain, where, problems)
            else:
                cfgs = _composed(runs, where, problems)
        empty = [o for o in overrides if sweeps(o) and not combinations([o], where["folder"], 1)]
        problems += [f"{text}: stands for no value at all" for text in empty]
    if problems:
        raise ConfigError(problems)
    return Plan(cfgs, of_sweep, sweep, list(dict.fromkeys(varied)))


def show_config(arguments: argparse.Namespace, name: str) -> None:
    """`--cfg`: print the config as it is used, with what can be applied of an invalid command line;
    then raise ConfigError with all that is wrong."""
    if problems := _flag_problems(arguments):
        raise ConfigError(problems)
    root = arguments.config_name or name
    cfg, problems = config.compose_valid(
        arguments.overrides, root, name, **places(arguments), types=False
    )
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


def _composed_alike(
    runs: Sequence[Sequence[str]],
    plain: Collection[str],
    where: dict[str, Any],
    problems: list[str],
) -> tuple[list[DictConfig], list[Run]]:
    """The runs of a sweep, and those of their configs that Hydra has composed.

    Hydra takes some 150 ms for each. So of runs that differ only in the values of `plain` options,
    which have plain values in the config, it composes one; in copies of this the values are set.
    """
    cfgs, found, hopeless = list[DictConfig](), list[Run](), set[tuple[str, ...]]()
    alike: dict[tuple[str, ...], tuple[bytes, Run, Sequence[str]]] = {}
    for overrides in runs:
        values = {t: pair for t in overrides if (pair := _assigned(t)) and pair[0] in plain}
        kind = tuple(values[text][0] if text in values else text for text in overrides)
        if kind in alike:
            content, like, before = alike[kind]
            own = pickle.loads(content)
            for key, value in values.values():
                OmegaConf.update(own, key, value)
            problems += config.config_problems(own, config.ROOTS["train"])
            for key in NOT_RUN_OPTIONS:
                own.pop(key, None)
            typed = dict(zip(before, overrides, strict=True))
            found.append(Run(own, [typed.get(text, text) for text in like.typed], like.choices))
        elif kind not in hopeless:
            composed = _composed([overrides], where, new := list[str]())
            if new and not set(new) - set(problems):
                hopeless.add(kind)  # the others have the same problems
            problems += new
            for cfg in composed:
                cfgs.append(cfg)
                found.append(Run.of(cfg))
                own = config.without_hydra(cfg)
                if all(OmegaConf.select(own, key) == value for key, value in values.values()):
                    alike[kind] = pickle.dumps(own), found[-1], overrides
    return cfgs, found


@cache
def _assigned(text: str) -> tuple[str, Any] | None:
    """The option and the value of an override, if that is a plain one."""
    try:
        value = parsed(text).value()
    except HydraException:
        return None
    return (text.partition("=")[0], value) if _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (
        isinstance(value, str) and "${" not in value and value != "???"
    )


def _asked(cfgs: Sequence[DictConfig], option: str) -> Any:
    return OmegaConf.select(cfgs[0], option) if cfgs else None


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
