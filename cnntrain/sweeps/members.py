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
from cnntrain.config import ConfigError, flat, incidental, options_hash, quoted, resume
from cnntrain.config.overrides import key_of, parsed
from cnntrain.sweeps import records
from cnntrain.sweeps.records import BaseConfig, as_typed

LONGEST = 120  # characters of a directory name, so that paths stay below 255 bytes
UNSAFE = re.compile(r"[^A-Za-z0-9_.,=+@\[\]-]")
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")  # a string that Hydra reads without quotes
KEYWORDS = ("true", "false", "null", "nan", "inf")  # strings that need quotes
OTHER_NAME = "set another name, sweep=<name>"


@dataclass(frozen=True)
class ComposedRun:
    """The composed config of a member."""

    config: DictConfig  # without `hydra` and the options of the sweep
    typed: list[str]  # the overrides, without those of the sweep
    choices: dict[str, str]  # by group: {"backend": "im2col", "model": "lenet5"}

    @classmethod
    def of(cls, cfg: DictConfig) -> "ComposedRun":
        """From a config with the node `hydra`."""
        choices: Any = OmegaConf.to_container(cfg.hydra.runtime.choices)
        choices = {str(k): v for k, v in choices.items() if v is not None and "hydra/" not in k}
        task: Any = OmegaConf.to_container(cfg.hydra.overrides.task)  # not interpolated
        typed = [text for text in task if not text.lstrip("+~").startswith(("sweep.", "search"))]
        return cls(resume.run_options(cfg), typed, choices)

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
        typed = {key_of(text): text for text in run.typed}
        values = {
            key: parsed(typed[key]).value()
            if key in typed
            else run.options.get(key, run.choices.get(key))
            for key in keys
        }
        name = member_name(values) or directory_name(",".join(sorted(run.typed)) or "defaults")
        member = PlannedMember(name, run, values)
        found.setdefault(member.identity, member)
    return list(found.values())


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
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(typed, value)) + "]"
    if isinstance(value, str) and (not PLAIN.fullmatch(value) or value.lower() in KEYWORDS):
        return quoted(value)
    return as_typed(value)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """An error line for each option of a sweep that is not as at its start."""
    known = sorted(before.keys() | now.keys())
    keys = [k for k in known if before.get(k, ...) != now.get(k, ...) and not incidental(k)]
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
        self.record = records.read_record(path) or records.SweepRecord(name=path.name)
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
            with FileLock(self.path / resume.LOCK, timeout=0):
                yield
        except Timeout:
            busy = "another process is running this sweep; wait for it or end it"
            raise ConfigError([f"sweep.name={self.path.name}: {busy}"]) from None

    def extend(self, members: Sequence[PlannedMember], keys: Sequence[str]) -> list[PlannedMember]:
        """Add members; returns them under their names in the folder. `write` writes them.

        Raises ConfigError, with the differences, if the options that do not vary differ from those
        at the sweep's start.

        Args:
            keys: The options that vary, those of `record.over` included.
        """
        record, base = self.record, _base(members, keys)
        if record.base is not None:
            _check_base(record.base, base, keys)
            constant = {k: record.base.values.get(k) for k in keys if k not in record.over}
            for entry in record.members.values():
                entry.values = constant | entry.values
            base = BaseConfig(
                options=_shared([record.base.options, base.options]),
                choices=_shared([record.base.choices, base.choices]),
                typed=[*dict.fromkeys([*record.base.typed, *base.typed])],
            )
        found = []
        for member in members:
            identity, values = member.identity, member.values
            name = self.names.setdefault(identity, member.name)
            if resume.holds_another_run(directory := self.path / name, member.config_hash):
                cfg = resume.read_config(directory / resume.CONFIG)
                changed = differences(flat(cfg), member.run.options) if cfg is not None else []
                changed = changed or ["holds another run; move it out of the sweep"]
                raise ConfigError([f"{directory}: {text}" for text in changed])
            record.members[name] = records.MemberEntry(values=values, identity=identity)
            found.append(replace(member, name=name))
        record.over = {key: [] for key in keys}
        if not self.search:  # whose values are all different
            for key in keys:
                known = (e.values[key] for e in record.members.values() if key in e.values)
                record.over[key] = records.distinct(known)
        record.base = base
        return found

    def ended(self, member: PlannedMember, *statuses: str) -> bool:
        """Whether a member has ended with one of these statuses."""
        directory = self.path / member.name
        return bool(resume.result_with_status(directory, member.config_hash, statuses))

    def write(self, metric: str, search: dict[str, Any] | None = None) -> None:
        """Write sweep.json."""
        self.record = self.record.model_copy(update={"metric": metric, "search": search})
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / records.SWEEP_FILE, self.record.model_dump(exclude_none=True))


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
