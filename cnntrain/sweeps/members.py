"""Members of a sweep and its folder: directory names, sweep.json, the common base config."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from cnntrain.atomic import write_json
from cnntrain.config import ConfigError, flat, incidental, options_hash, quoted
from cnntrain.config.overrides import key_of, parsed
from cnntrain.config.resume import CONFIG, LOCK, holds_another_run, read_config, run_options
from cnntrain.sweeps.records import (
    SWEEP_FILE,
    BaseConfig,
    MemberEntry,
    SweepRecord,
    as_typed,
    distinct,
    read_record,
)

LONGEST = 120  # characters of a directory name, so that paths stay below 255 bytes
UNSAFE = re.compile(r"[^A-Za-z0-9_.,=+@\[\]-]")
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")  # a string that Hydra reads without quotes
KEYWORDS = ("true", "false", "null", "nan", "inf")  # strings that need quotes
OTHER_NAME = "set another name, sweep=<name>"


@dataclass(frozen=True)
class ComposedRun:
    """The composed config of a run, whether it is started alone or in a sweep."""

    config: DictConfig  # without `hydra` and the options of the sweep
    typed: list[str]  # all its overrides
    choices: dict[str, str]  # by group: {"backend": "im2col", "model": "lenet5"}

    @classmethod
    def of(cls, cfg: DictConfig) -> "ComposedRun":
        """From a config with the node `hydra`."""
        choices: Any = OmegaConf.to_container(cfg.hydra.runtime.choices)
        choices = {str(k): v for k, v in choices.items() if v is not None and "hydra/" not in k}
        typed: Any = OmegaConf.to_container(cfg.hydra.overrides.task)  # not interpolated
        return cls(run_options(cfg), without_sweep_options(typed), choices)

    @cached_property
    def options(self) -> dict[str, Any]:
        return flat(self.config)


@dataclass(frozen=True)
class PlannedMember:
    """A member of a sweep to be run."""

    name: str  # of its directory
    run: ComposedRun
    values: dict[str, Any]  # of the varying options: {"backend": "im2col", "seed": 0}
    trial: int | None = None  # number in the search's study

    @cached_property
    def config_hash(self) -> str:
        return options_hash(self.run.options)

    @property
    def identity(self) -> str:
        """Equal for members that are the same run under different names."""
        extra = {k: v for k, v in self.values.items() if incidental(k)}
        return f"{self.config_hash} {extra}" if extra else self.config_hash


def plan_members(runs: Iterable[ComposedRun], keys: Iterable[str]) -> list[PlannedMember]:
    """A member for each distinct run; `keys` are the varying options."""
    found: dict[str, PlannedMember] = {}
    for run in runs:
        values = {key: _value(key, run) for key in keys}
        name = member_name(values) or directory_name(",".join(sorted(run.typed)) or "defaults")
        member = PlannedMember(name, run, values)
        found.setdefault(member.identity, member)
    return list(found.values())


def without_sweep_options(typed: Iterable[str]) -> list[str]:
    """Overrides without those of the nodes `sweep` and `search`."""
    return [text for text in typed if not text.lstrip("+~").startswith(("sweep.", "search"))]


def member_name(values: Mapping[str, Any]) -> str:
    """A member's directory name: its options in alphabetical order, whatever the order typed."""
    parts = [f"{key}={as_typed(values[key])}" for key in sorted(values)]
    return directory_name(",".join(parts).replace('"', "")) if parts else ""


def directory_name(full: str) -> str:
    """The name itself; if it is long or has special characters, a shorter one with a hash."""
    plain = UNSAFE.sub("_", full)
    if plain == full and len(full) <= LONGEST:
        return full
    return f"{plain[: LONGEST - 9].rstrip('.,=')}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def typed(value: Any) -> str:
    """A plain value in the syntax of Hydra's command line, from which it reads this very value."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(typed, value)) + "]"
    if isinstance(value, str) and (not PLAIN.fullmatch(value) or value.lower() in KEYWORDS):
        return quoted(value)
    return str(value)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """An error line for each option of a sweep that is not as at its start."""
    keys = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key, ...) != now.get(key, ...) and not incidental(key)
    ]
    problems = []
    for key in keys:
        if not any(key.startswith(f"{other}.") for other in keys):  # belongs to another choice
            value = f"{key}={as_typed(now[key])}" if key in now else f"{key} (left out)"
            begun = f"with {as_typed(before[key])}" if key in before else "without it"
            problems.append(f"{value}: the sweep was begun {begun}; {OTHER_NAME}")
    return problems


class SweepFolder:
    """The folder of a sweep: sweep.json, of which `record` is the content, and the members.

    Raises ConfigError if sweep.json is damaged, or if it belongs to a search and `search` is False,
    or the other way round.
    """

    def __init__(self, path: Path, *, search: bool = False):
        self.path, self.search = path, search
        self.record = read_record(path) or SweepRecord(name=path.name)
        self.record.name = path.name  # the folder may have been renamed
        self.names = {entry.identity: name for name, entry in self.record.members.items()}
        if self.record.members and bool(self.record.search) != search:
            kind = "trials of a search" if not search else "a sweep that is no search"
            raise ConfigError([f"{path}: holds {kind}; {OTHER_NAME}"])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running the same sweep; ConfigError if one does."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / LOCK, timeout=0):
                yield
        except Timeout:
            busy = "another process is running this sweep; wait for it or end it"
            raise ConfigError([f"sweep.name={self.path.name}: {busy}"]) from None

    def extend(
        self, members: Sequence[PlannedMember], varied: Iterable[str]
    ) -> list[PlannedMember]:
        """Add members that vary in these options; returns them under their names in the folder.

        Nothing is written before `write`. Raises ConfigError, with the differences, if the options
        that do not vary differ from those at the sweep's start.
        """
        record = self.record
        keys = list(dict.fromkeys([*record.over, *varied]))
        base = _base(members, keys)
        if record.base is not None:
            _check_base(record.base, base, keys)
            for key in (key for key in keys if key not in record.over):  # constant until now
                for entry in record.members.values():
                    entry.values.setdefault(key, record.base.values.get(key))
            base = BaseConfig(
                options=_shared([record.base.options, base.options]),
                choices=_shared([record.base.choices, base.choices]),
                typed=[*dict.fromkeys([*record.base.typed, *base.typed])],
            )
        found = []
        for member in members:
            name = self.names.setdefault(member.identity, member.name)
            if holds_another_run(directory := self.path / name, member.config_hash):
                cfg = read_config(directory / CONFIG)
                changed = differences(flat(cfg), member.run.options) if cfg is not None else []
                changed = changed or ["holds another run; move it out of the sweep"]
                raise ConfigError([f"{directory}: {text}" for text in changed])
            record.members[name] = MemberEntry(values=member.values, identity=member.identity)
            found.append(replace(member, name=name))
        values = [entry.values for entry in record.members.values()]
        # Not listed for a search, whose values are all different.
        record.over = {
            key: [] if self.search else distinct(v[key] for v in values if key in v) for key in keys
        }
        record.base = base
        return found

    def write(self, metric: str, search: dict[str, Any] | None = None) -> None:
        """Write sweep.json."""
        self.record = self.record.model_copy(update={"metric": metric, "search": search})
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / SWEEP_FILE, self.record.model_dump(exclude_none=True))


def _base(members: Sequence[PlannedMember], keys: Sequence[str]) -> BaseConfig:
    """What members have in common, but for what varies."""
    options = _shared([member.run.options for member in members])
    typed = dict.fromkeys(key_of(text) for text in members[0].run.typed)
    return BaseConfig(
        options={key: value for key, value in options.items() if not _within(key, keys)},
        choices=_shared([member.run.choices for member in members]),
        typed=[key for key in typed if not _within(key, keys)],
    )


def _check_base(begun: BaseConfig, base: BaseConfig, keys: Sequence[str]) -> None:
    """Raise ConfigError if an option that does not vary has changed.

    Options that not all members have in common come with what varies. An experiment may set any
    option: where it varies, only the typed ones are compared.
    """
    compared = {*begun.typed, *base.typed} - {"trainer"}  # whose options are compared
    if "experiment" not in keys:
        compared |= begun.options.keys() & base.options.keys()
    before, now = (
        {k: v for k, v in it.values.items() if k in compared and not _within(k, keys)}
        for it in (begun, base)
    )
    if problems := differences(before, now):
        raise ConfigError(problems)


def _shared(tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, *others = tables
    return {k: v for k, v in first.items() if all(k in o and o[k] == v for o in others)}


def _within(option: str, keys: Iterable[str]) -> bool:
    """Whether an option varies itself or belongs to a varying choice."""
    return any(option == key or option.startswith(f"{key}.") for key in keys)


def _value(key: str, run: ComposedRun) -> Any:
    for text in reversed(run.typed):
        if key_of(text) == key:
            return parsed(text).value()
    return run.options.get(key, run.choices.get(key))
