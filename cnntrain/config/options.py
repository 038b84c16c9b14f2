"""The config folder, its choices, and the options of a config by their full names."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# In a wheel conf/ lies in the package, in a checkout beside it.
_PACKAGE = Path(__file__).parents[1]
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

# Options that change where a run is written, how it is shown and how often it is saved, but not
# its results. They may change on resume, and are not part of the config hash.
INCIDENTAL = (
    "resume",
    "tensorboard",
    "data.root",
    "data.cache",
    "data.recorded",  # by the run itself
    "trainer.accelerator",
    "trainer.timeout",
    "trainer.progress_bar",
    "trainer.checkpoint_every_n_steps",
    "trainer.checkpoint_every_n_minutes",
    "trainer.checkpoint_every_n_epochs",
)


def without_hydra(cfg: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def flat(cfg: DictConfig) -> dict[str, Any]:
    """Every option by its full name, such as `model.dropout`; interpolations are resolved."""
    found: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                found[f"{prefix}{key}"] = value

    walk(OmegaConf.to_container(cfg, resolve=True), "")
    return found


def incidental(option: str) -> bool:
    """Whether an option, or a node above it, is one of INCIDENTAL."""
    return any(f"{option}.".startswith(f"{name}.") for name in INCIDENTAL)


def config_hash(cfg: DictConfig) -> str:
    """SHA-256 (16 hex digits) of the options that determine the result, in any order."""
    return options_hash(flat(cfg))


def options_hash(options: Mapping[str, Any]) -> str:
    """As `config_hash`, of the options as `flat` returns them."""
    deciding = {key: value for key, value in options.items() if not incidental(key)}
    content = json.dumps(deciding, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def choice(group: str, node: Mapping[str, Any] | None) -> str:
    """The choice of conf/<group>/ that a node was made from, as one would type it.

    The file with the node's `_target_`, of several the one that shares most values; without any
    the class's dotted name; `none` for an empty node.
    """
    if not node or not (target := node.get("_target_")):
        return "none"
    alike = {name: own for name, own in _choices(group).items() if own.get("_target_") == target}
    shared = {name: sum(node.get(k) == v for k, v in own.items()) for name, own in alike.items()}
    return max(shared, key=shared.__getitem__, default=str(target))


def defaults(group: str, name: str) -> dict[str, Any]:
    """The values in conf/<group>/<name>.yaml; nothing if there is no such file."""
    return _choices(group).get(name, {})


@cache
def _choices(group: str) -> dict[str, dict[str, Any]]:
    """The values of each file of a group, read without Hydra, which takes 150 ms per config."""
    return {path.stem: _values(path) for path in sorted((CONF / group).glob("*.yaml"))}


def _values(path: Path) -> dict[str, Any]:
    own: Any = OmegaConf.to_container(OmegaConf.load(path))
    merged: dict[str, Any] = {}
    for parent in own.pop("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            merged |= _values(path.parent / f"{parent.removesuffix('@_here_')}.yaml")
    return merged | own
