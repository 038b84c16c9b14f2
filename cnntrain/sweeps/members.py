"""Members of a sweep and its folder: directory names, sweep.yaml, the common base config."""

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from cnntrain.atomic import replacing
from cnntrain.config import ConfigError, flat, incidental, options_hash
from cnntrain.config.overrides import key_of, parsed
from cnntrain.config.resume import CONFIG, LOCK, holds_another_run, read_config, run_options
from cnntrain.sweeps.records import SWEEP_FILE, distinct, read_sweep_file

LONGEST = 120  # characters of a directory name, so that paths stay below 255 bytes
UNSAFE = re.compile(r"[^A-Za-z0-9_.,=+@\[\]-]")
BASE = ("options", "choices", "differ", "typed")  # in sweep.yaml
MOST_SHOWN = 8  # differences to the base config


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
    full = ",".join(f"{key}={value_name(values[key])}" for key in sorted(values))
    return directory_name(full) if full else ""


def directory_name(full: str) -> str:
    """The name itself; if it is long or has special characters, a shorter one with a hash."""
    plain = UNSAFE.sub("_", full)
    if plain == full and len(full) <= LONGEST:
        return full
    return f"{plain[: LONGEST - 9].rstrip('.,=')}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def value_name(value: Any) -> str:
    """A value as typed, without quotes."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{value_name(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(value_name, value)) + "]"
    return str(value)


class SweepFolder:
    """The folder of a sweep: sweep.yaml and a directory per member.

    `sheet` is the content of sweep.yaml. Raises ConfigError if that is damaged, or if it belongs to
    a search and `search` is False, or the other way round.
    """

    def __init__(self, path: Path, *, search: bool = False):
        self.path, self.search = path, search
        self.sheet: dict[str, Any] = {"over": {}, "base": {}, "members": {}}
        if (path / SWEEP_FILE).exists():
            self.sheet = _read(path / SWEEP_FILE)
        self.sheet["name"] = path.name  # the folder may have been renamed
        self.names = {m["identity"]: name for name, m in self.sheet["members"].items()}
        self.added: list[str] = []  # members that are not in the file yet
        self.written: dict[str, Any] = {}  # the rest of the file
        if self.sheet["members"] and bool(self.sheet.get("search")) != search:
            kind = "trials of a search" if not search else "a sweep that is no search"
            raise ConfigError([f"{path}: holds {kind}; take another name (sweep=<name>)"])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running the same sweep; ConfigError if one does."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            busy = "another process is running this sweep; wait for it or end it"
            raise ConfigError([f"sweep.name={self.path.name}: {busy}"]) from None
        try:
            yield
        finally:
            lock.release()

    def directory(self, member: str) -> Path:
        return self.path / member

    def extend(
        self, members: Sequence[PlannedMember], varied: Iterable[str]
    ) -> list[PlannedMember]:
        """Add members that vary in these options; returns them under their names in the folder.

        Nothing is written before `write`. Raises ConfigError, with the differences, if the options
        that do not vary differ from those at the sweep's start.
        """
        known, over = self.sheet["members"], self.sheet["over"]
        keys = list(dict.fromkeys([*over, *varied]))
        base = _base(members, keys)
        self._check_base(base, keys)
        before = self.sheet["base"]
        for key in (key for key in keys if key not in over):  # constant until now
            value = (before["options"] | before["choices"]).get(key) if before else None
            for member in known.values():
                member["values"].setdefault(key, value)
        found = []
        for member in members:
            name = self.names.setdefault(member.identity, member.name)
            if known.get(name, {}).get("identity", member.identity) != member.identity:
                raise ConfigError([self._changed(name, member)])
            if holds_another_run(directory := self.directory(name), member.config_hash):
                raise ConfigError([f"{directory}: holds another run; move it out of the sweep"])
            hashes = {"config_hash": member.config_hash, "identity": member.identity}
            known[name] = {"values": member.values, **hashes}
            self.added.append(name)
            found.append(replace(member, name=name))
        values = [member["values"] for member in known.values()]
        # Not listed for a search, so that the cost of a round does not grow with the trials.
        self.sheet["over"] = {
            key: [] if self.search else distinct(v[key] for v in values if key in v) for key in keys
        }
        self.sheet["base"] = _common_base(before, base) if before else base
        return found

    def write(self, **facts: Any) -> None:
        """Write sweep.yaml with further `facts` of the sweep.

        If only members were added, as in each round of a search, lines are appended.
        """
        members = self.sheet.pop("members")
        self.sheet = {**self.sheet, **facts}
        if self.sheet == self.written:
            lines = [f"  {json.dumps(n)}: {json.dumps(members[n])}\n" for n in self.added]
            with (self.path / SWEEP_FILE).open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            content = {**self.sheet, "members": members}  # last, to be appended to
            with replacing(self.path / SWEEP_FILE) as file:
                file.write(OmegaConf.to_yaml(OmegaConf.create(content)).encode())
        self.written, self.added = copy.deepcopy(self.sheet), []
        self.sheet["members"] = members

    def _check_base(self, base: Mapping[str, Any], keys: Iterable[str]) -> None:
        """Raise ConfigError if an option that does not vary has changed.

        Options that come with a varying choice may. An experiment may set any option: where it
        varies, only the typed overrides are compared.
        """
        if not (begun := self.sheet["base"]):
            return
        before, now = begun["options"], base["options"]
        differ = {*begun["differ"], *base["differ"]}
        if "experiment" in keys:
            typed, differ = begun["typed"] | base["typed"], set()
            tables = [b["options"] | b["choices"] for b in (begun, base)]
            before, now = ({key: t[key] for key in typed if key in t} for t in tables)
        different = [
            key
            for key in sorted(before.keys() | now.keys())
            if before.get(key, ...) != now.get(key, ...)
            and not (key in differ or incidental(key) or _within(key, keys))
            and not _of_another_class(key, before, now)
        ]

        def describe(key: str) -> str:
            value = f"{key}={value_name(now[key])}" if key in now else f"{key} (left out)"
            begun = f" {value_name(before[key])}" if key in before else "out it"
            advice = "take another name for this one (sweep=<name>), or leave the option as it was"
            return f"{value}: the sweep {self.path.name!r} was begun with{begun}; {advice}"

        if different:
            raise ConfigError([describe(key) for key in different[:MOST_SHOWN]])

    def _changed(self, name: str, member: PlannedMember) -> str:
        """The error of a member whose name belongs to another config."""
        reason = "was begun with another config"
        if (cfg := read_config(self.directory(name) / CONFIG)) is not None:
            before, now = flat(cfg), member.run.options
            reason = "was begun with " + ", ".join(
                f"{key}={value_name(before.get(key))}, and now it is {value_name(now.get(key))}"
                for key in sorted(before.keys() | now.keys())
                if before.get(key) != now.get(key)
            )
        return f"{name}: {reason}; take another name for this sweep (sweep=<name>)"


def _read(path: Path) -> dict[str, Any]:
    if sheet := read_sweep_file(path):
        base, members = sheet.get("base"), sheet["members"].values()
        tables = isinstance(base, dict) and all(isinstance(base.get(p), dict) for p in BASE)
        complete = all({"config_hash", "identity"} <= member.keys() for member in members)
        if complete and (tables or (base == {} and not members)):
            return sheet
    advice = "move it away, as the directories of the members record what is completed, or take"
    raise ConfigError([f"{path}: is damaged; {advice} another name for the sweep (sweep=<name>)"])


def _base(members: Sequence[PlannedMember], keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Common `options` and `choices` of all members, those that `differ`, those `typed`."""
    options = [member.run.options for member in members]
    shared = _shared(options)
    differ = {k: None for table in options for k in table if k not in shared}
    typed = {key_of(text): None for text in members[0].run.typed}
    base = {"options": shared, "differ": differ, "typed": typed}
    base = {p: {k: v for k, v in part.items() if not _within(k, keys)} for p, part in base.items()}
    return base | {"choices": _shared([member.run.choices for member in members])}


def _shared(tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, *others = tables
    return {k: v for k, v in first.items() if all(k in o and o[k] == v for o in others)}


def _common_base(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    both = {part: _shared([before[part], now[part]]) for part in ("options", "choices")}
    known = {**before["differ"], **now["differ"], **before["options"], **now["options"]}
    differ = {k: None for k in known if k not in both["options"]}
    return {**both, "differ": differ, "typed": before["typed"] | now["typed"]}


def _within(option: str, keys: Iterable[str]) -> bool:
    """Whether an option varies itself or belongs to a varying choice."""
    return any(option == key or option.startswith(f"{key}.") for key in keys)


def _of_another_class(option: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether only one of two classes has the option: then the class is reported instead."""
    target = f"{option.split('.')[0]}._target_"
    return (option in before) != (option in now) and before.get(target) != now.get(target)


def _value(key: str, run: ComposedRun) -> Any:
    for text in reversed(run.typed):
        if key_of(text) == key:
            return parsed(text).value()
    return run.options.get(key, run.choices.get(key))
