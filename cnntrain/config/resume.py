"""Reads what a run directory records, and checks whether its run can be resumed.

Imports no torch.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cnntrain.config import ConfigError, compose, config_hash, flat, incidental
from cnntrain.config.errors import format_value
from cnntrain.config.signatures import signature

log = logging.getLogger(__name__)

CONFIG, OVERRIDES = Path(".hydra/config.yaml"), Path(".hydra/overrides.yaml")
RESULT, LOCK, CHECKPOINTS = "result.json", ".lock", "checkpoints"
# How a run is started, and with which others.
NOT_RUN_OPTIONS = ("profile", "resume", "sweep", "search", "hydra")


def has_run(directory: Path) -> bool:
    """Whether there is a run to continue."""
    return any((directory / name).exists() for name in (RESULT, CHECKPOINTS, CONFIG))


def is_running(directory: Path) -> bool:
    """Whether a process is training in the directory; false if that cannot be read."""
    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0):
            return False
    except OSError as error:
        return isinstance(error, Timeout)


def in_use(directory: Path, option: str = "hydra.run.dir") -> str:
    """The error line for a directory in which a process is training."""
    return f"{option}={directory}: another process is training there; wait for it or end it"


def add_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """The content with its SHA-256."""
    return {**content, "sha256": _digest(content)}


def read_result(directory: Path) -> dict[str, Any] | None:
    """The content of result.json; None if it is missing or damaged."""
    try:
        return read_sealed(directory / RESULT)
    except DamagedRecord as error:
        log.warning(str(error))
    except FileNotFoundError:
        pass
    return None


class DamagedRecord(Exception):
    """A file that is not as the run wrote it; the message names it."""


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a file with a checksum. Raises DamagedRecord or OSError."""
    try:
        content = json.loads(path.read_bytes())
        if content.pop("sha256") == _digest(content):
            return content
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    raise DamagedRecord(f"{path}: is damaged or was edited by hand; its content is not used")


def run_config(
    directory: Path, newest: Callable[[Path], tuple[Path, Mapping[str, Any]] | None]
) -> DictConfig:
    """The config of the run in a directory, `resume` left out; ConfigError if it cannot be read.

    `newest` reads the newest checkpoint of a folder, which has the config as well.
    """
    result, cfg = read_result(directory), read_config(directory / CONFIG)
    if cfg is not None:
        if result is not None and config_hash(cfg) == result["config_hash"]:
            return cfg
        if not any((directory / name).exists() for name in (RESULT, CHECKPOINTS)):
            return cfg  # ended before the first result.json
    # One of the two is damaged.
    if found := newest(directory / CHECKPOINTS):
        log.warning(f"{directory / CONFIG}: is damaged; the config in {found[0]} is used")
        return DictConfig(found[1]["config"])
    problem = f"resume={directory}: {CONFIG} or {RESULT} is damaged, and there is no checkpoint"
    raise ConfigError([f"{problem}; start a new run"])


def with_overrides(
    run: DictConfig,
    directory: Path,
    overrides: Sequence[str],
    compose: Callable[[Sequence[str]], DictConfig] = compose,
) -> DictConfig:
    """The config of a run as if the overrides had been given at its start. Raises ConfigError."""
    if not overrides:
        return run
    given = read_overrides(directory)
    trainer = run.get("trainer", {})
    processes = trainer.get("devices", 1) * trainer.get("num_nodes", 1)
    other = [text for text in overrides if text.startswith("trainer=") and text not in given]
    if processes > 1 and other:
        problem = f"{other[-1]}: the run in {directory} has {processes} processes; leave it out"
        raise ConfigError([f"{problem}, and set trainer.accelerator=cpu and the like"])
    try:
        before = flat(compose(given))
    except ConfigError as error:
        problem = f"{directory / OVERRIDES}: cannot be composed here ({error.problems[0]})"
        raise ConfigError([f"{problem}; give --config-dir as at the start"]) from None
    after = flat(compose([*given, *overrides]))
    typed = {text.lstrip("+~").partition("=")[0] for text in overrides}
    # Also if unchanged: the overrides of a run started from Python are not recorded.
    typed |= {f"{name}._target_" for name in typed}
    options = {key: value for key, value in flat(run).items() if key in after or key not in before}
    options |= {k: v for k, v in after.items() if k in typed or v != before.get(k, ...)}
    wanted = OmegaConf.create()
    for key, value in options.items():
        OmegaConf.update(wanted, key, value, force_add=True)
    return run_options(wanted)


def read_overrides(directory: Path) -> list[str]:
    """The overrides of a run: of its start, and of each time it was resumed with others."""
    file = directory / OVERRIDES
    if not file.exists():
        return []
    try:
        return [str(text) for text in OmegaConf.load(file)]
    except (YAMLError, ValueError, TypeError, OmegaConfBaseException):
        problem = f"{file}: is damaged, so that options cannot be changed; leave them out"
        raise ConfigError([problem]) from None


def run_options(cfg: DictConfig) -> DictConfig:
    """The config without what says how a run is started, and what the run has recorded in it."""
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in NOT_RUN_OPTIONS])
    with open_dict(own):
        own.get("data", {}).pop("recorded", None)
    return own


def resume_problems(run: DictConfig, wanted: DictConfig) -> list[str]:
    """One line for each option that cannot change when a run is resumed."""
    old, new = flat(run), flat(wanted)
    problems = []
    for key in sorted(old.keys() | new.keys()):
        target = f"{key.split('.')[0]}._target_"
        other_class = key != target and old.get(target) != new.get(target)
        if old.get(key) == new.get(key) or incidental(key) or other_class:
            continue
        value, before = f"{key}={format_value(new.get(key))}", format_value(old.get(key))
        way_out = "leave the option out"
        if key in ("trainer.devices", "trainer.num_nodes") and key not in new:
            if old[key] == 1:
                continue
            problem = f"{key}: the run has {before}, and is resumed with as many"
            way_out = f"add trainer=ddp {key}={before}"
        elif key != "trainer.max_epochs":
            problem = f"{value}: the run was started with {before}"
        elif run.scheduler and "total_steps" in signature(run.scheduler._target_).types:
            problem = f"{value}: the learning rate schedule of this run is for {before} epochs"
        else:
            continue
        problems.append(f"{problem}; {way_out}, or start a new run")
    return problems


def completed(directory: Path, cfg: DictConfig) -> dict[str, Any] | None:
    """The content of result.json if the run is completed with this config."""
    return result_with_status(directory, config_hash(cfg))


def result_with_status(
    directory: Path, config_hash: str, statuses: Sequence[str] = ("completed",)
) -> dict[str, Any] | None:
    """The content of result.json if the run has this config and one of these statuses."""
    result = read_result(directory)
    found = result and result["status"] in statuses and result["config_hash"] == config_hash
    return result if found else None


def holds_another_run(directory: Path, config_hash_: str) -> bool:
    """Whether a directory holds a run with another config."""
    if result := read_result(directory):
        return result["config_hash"] != config_hash_
    cfg = read_config(directory / CONFIG)
    return cfg is not None and config_hash(cfg) != config_hash_


def read_config(path: Path) -> DictConfig | None:
    """The config in a file, `resume` left out; None if it cannot be read."""
    try:
        cfg = run_options(OmegaConf.load(path))  # type: ignore[arg-type]
        OmegaConf.resolve(cfg)
        return cfg
    except (OSError, YAMLError, ValueError, OmegaConfBaseException):
        return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
