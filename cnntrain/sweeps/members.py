"""The members that a command line asks for: what each is called, what makes it the one it is."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cnntrain.config import flat, incidental, options_hash
from cnntrain.config.overrides import key_of, parsed
from cnntrain.config.resume import run_options

LONGEST = 120  # characters of a directory's name: paths of 255 bytes are the limit of most systems
ODD = re.compile(r"[^A-Za-z0-9_.,=+@\[\]-]")


@dataclass(frozen=True)
class Run:
    """A composed run, however it is started: alone or in a sweep."""

    config: DictConfig  # of the run as such
    typed: list[str]  # all that was typed for it, what does not vary included
    choices: dict[str, str]  # in each group: {"backend": "im2col", "model": "lenet5"}

    @classmethod
    def of(cls, cfg: DictConfig) -> "Run":
        """From a config with `hydra` in it."""
        made: Any = OmegaConf.to_container(cfg.hydra.runtime.choices)
        made = {str(k): v for k, v in made.items() if v is not None and "hydra/" not in str(k)}
        typed: Any = OmegaConf.to_container(cfg.hydra.overrides.task)  # interpolations as typed
        return cls(run_options(cfg), of_the_run(typed), made)

    @cached_property
    def options(self) -> dict[str, Any]:
        return flat(self.config)


@dataclass(frozen=True)
class Planned:
    """A member as it is to be run."""

    name: str  # of its directory
    run: Run
    values: dict[str, Any]  # of the options that vary: {"backend": "im2col", "seed": 0}
    trial: int | None = None  # the number of the search's trial that it is

    @cached_property
    def config_hash(self) -> str:
        return options_hash(self.run.options)

    @property
    def identity(self) -> str:
        """Equal for members that are the same run, whatever they are called."""
        extra = {k: v for k, v in self.values.items() if incidental(k)}
        return f"{self.config_hash} {extra}" if extra else self.config_hash


def planned(runs: Iterable[Run], keys: Iterable[str]) -> list[Planned]:
    """A member for each run, those that are the same but once. `keys` are the options that vary."""
    found: dict[str, Planned] = {}
    for run in runs:
        values = {key: _value(key, run) for key in keys}
        called = name(values) or directory_name(",".join(sorted(run.typed)) or "defaults")
        member = Planned(called, run, values)
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


def common(members: Sequence[Planned]) -> dict[str, dict[str, Any]]:
    """What all members have in common: `options`, and the names of `choices`; `differ` names the
    options that they do not, `typed` what was typed for them."""
    options = [member.run.options for member in members]
    named, shared = [member.run.choices for member in members], _shared(options)
    differ = {k: None for table in options for k in table if k not in shared}
    typed = {key_of(text): None for text in members[0].run.typed}
    return {"options": shared, "choices": _shared(named), "differ": differ, "typed": typed}


def _shared(tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, *others = tables
    return {k: v for k, v in first.items() if all(k in o and o[k] == v for o in others)}


def _value(key: str, run: Run) -> Any:
    for text in reversed(run.typed):
        if key_of(text) == key:
            return parsed(text).value()
    return run.options.get(key, run.choices.get(key))
