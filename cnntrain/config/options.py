"""Options of a config by their full names, and the hash of those that determine the result."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Options that change where a run is written, how it is shown and how often it is saved, but not
# its results. They may change on resume, and are not part of the config hash.
INCIDENTAL = (
    "resume",
    "tensorboard",
    "data.root",
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

    def walk(node: dict[Any, Any], prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and value:
                walk(value, f"{name}.")
            else:
                found[name] = value

    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    walk(content, "")
    return found


def incidental(option: str) -> bool:
    """Whether an option, or its node, is one of INCIDENTAL."""
    return option in INCIDENTAL or option.partition(".")[0] in INCIDENTAL


def config_hash(cfg: DictConfig) -> str:
    """SHA-256 (16 hex digits) of the options that determine the result, in any order."""
    return options_hash(flat(cfg))


def options_hash(options: Mapping[str, Any]) -> str:
    """As `config_hash`, of the options as `flat` returns them."""
    deciding = {key: value for key, value in options.items() if not incidental(key)}
    content = json.dumps(deciding, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
