"""The members that a command line asks for: what each is called, what makes it the one it is."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from cnntrain.config import config_hash, flat, incidental
from cnntrain.config.overrides import key_of
from cnntrain.config.resume import run_only

LONGEST = 120  # characters of a directory's name: paths of 255 bytes are the limit of most systems
ODD = re.compile(r"[^A-Za-z0-9_.,=+@\[\]-]")


@dataclass(frozen=True)
class Planned:
    """A member as it is to be run."""

    name: str  # of its directory
    overrides: list[str]  # all that was typed for it, what does not vary included
    values: dict[str, Any]  # of the options that vary: {"backend": "im2col", "seed": 0}
    config_hash: str
    config: DictConfig  # of the run
    trial: int | None = None  # the number of the search's trial that it is

    @property
    def identity(self) -> str:
        """Equal for members that are the same run, whatever they are called."""
        extra = {k: v for k, v in self.values.items() if incidental(k)}
        return f"{self.config_hash} {extra}" if extra else self.config_hash


def planned(cfgs: Sequence[DictConfig], keys: Iterable[str]) -> list[Planned]:
    """A member for each composed config, those that are the same run but once.

    `keys` are the options that vary; `hydra` in the configs knows what was typed.
    """
    found: dict[str, Planned] = {}
    for cfg in cfgs:
        own, typed = run_only(cfg), of_the_run(cfg.hydra.overrides.task)
        values = {key: _value(key, typed, cfg) for key in keys}
        called = name(values) or directory_name(",".join(sorted(typed)) or "defaults")
        member = Planned(called, typed, values, config_hash(own), own)
        found.setdefault(member.identity, member)
    return list(found.values())


def of_the_run(typed: Iterable[str]) -> list[str]:
    """Overrides without those that say among which others a run is."""
    return [text for text in typed if not text.lstrip("+~").startswith(("sweep.", "search"))]


def name(values: dict[str, Any]) -> str:
    """A member's name: options in alphabetical order, so that the order typed is no matter."""
    full = ",".join(f"{key}={shown(values[key])}" for key in sorted(values))
    return directory_name(full) if full else ""


def directory_name(full: str) -> str:
    """One that is too long or has characters that a shell or a disk might stumble over is
    shortened, with a hash that makes it unmistakable."""
    plain = ODD.sub("_", full)
    if plain == full and len(full) <= LONGEST:
        return full
    return f"{plain[: LONGEST - 9].rstrip('.,=')}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def shown(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(shown, value)) + "]"
    return str(value)


def common(members: Sequence[Planned], cfgs: Sequence[DictConfig]) -> dict[str, dict[str, Any]]:
    """What all members have in common: `options`, and the names of `choices`; `differ` names the
    options that they do not, `typed` what was typed for them."""
    options = [flat(member.config) for member in members]
    named, shared = [choices(cfg) for cfg in cfgs], _shared(options)
    differ = {k: None for table in options for k in table if k not in shared}
    typed = {key_of(text): None for text in members[0].overrides}
    return {"options": shared, "choices": _shared(named), "differ": differ, "typed": typed}


def choices(cfg: DictConfig) -> dict[str, str]:
    """The choice in each group: {"backend": "im2col", "model": "lenet5"}."""
    made = OmegaConf.to_container(cfg.hydra.runtime.choices)
    assert isinstance(made, dict)
    return {str(k): v for k, v in made.items() if v is not None and "hydra/" not in str(k)}


def _shared(tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, *others = tables
    return {k: v for k, v in first.items() if all(k in o and o[k] == v for o in others)}


def _value(key: str, typed: Sequence[str], cfg: DictConfig) -> Any:
    for override in reversed(OverridesParser.create().parse_overrides([*typed])):
        if override.key_or_group == key:
            return override.value()
    options, named = flat(run_only(cfg)), choices(cfg)
    return options[key] if key in options else named.get(key)
