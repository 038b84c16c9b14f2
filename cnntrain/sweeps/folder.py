"""A sweep's folder: what is compared, over what, and which members there are."""

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cnntrain.atomic import replacing
from cnntrain.config import ConfigError, flat, incidental
from cnntrain.config.resume import CONFIG, LOCK, holds_another_run, run_options
from cnntrain.sweeps.collect import read_sheet
from cnntrain.sweeps.members import Planned, common, shown

SHEET = "sweep.yaml"
BASE = ("options", "choices", "differ", "typed")  # what is told of the config that all share
MOST_SHOWN = 8  # differences of an option each


class SweepFolder:
    """A folder that belongs to one sweep, with a directory for each member.

    `sheet` is the content of sweep.yaml, for a new sweep without members. Raises ConfigError if
    that is damaged, or says that the sweep is a search and `search` does not, or the other way.
    """

    def __init__(self, path: Path, *, search: bool = False):
        self.path = path
        self.sheet: dict[str, Any] = {"name": path.name, "over": {}, "base": {}, "members": {}}
        if (path / SHEET).exists():
            self.sheet = {**_read(path / SHEET), "name": path.name}  # it may have been moved
        self.search = search
        self.names = {m["identity"]: name for name, m in self.sheet["members"].items()}
        self.added: list[str] = []  # members that sweep.yaml does not have yet
        self.written: dict[str, Any] = {}  # what else it has
        if self.sheet["members"] and bool(self.sheet.get("search")) != search:
            here = "trials of a search" if not search else "a sweep that is no search"
            raise ConfigError([f"{path}: holds {here}; take another name (sweep=<name>)"])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from running the same sweep at the same time."""
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

    def extend(self, members: Sequence[Planned], varied: Iterable[str]) -> list[Planned]:
        """Take members in that vary in these options; returns them under the names they have here.

        Nothing is written before `write`. Raises ConfigError if what does not vary is not what it
        was, with the difference.
        """
        known, over = self.sheet["members"], self.sheet["over"]
        keys = list(dict.fromkeys([*over, *varied]))
        base = common(members)
        for part in ("options", "differ", "typed"):
            base[part] = {k: v for k, v in base[part].items() if not _within(k, keys)}
        self._refuse_another_base(base, keys)
        for key in (key for key in keys if key not in over):
            for known_one in known.values():  # what did not vary then has the value that all had
                known_one["values"].setdefault(key, self._then(key))
        found = []
        for member in members:
            called = self.names.setdefault(member.identity, member.name)
            if known.get(called, {}).get("identity", member.identity) != member.identity:
                raise ConfigError([self._changed(called, member)])
            if holds_another_run(self.directory(called), member.config_hash):
                raise ConfigError(
                    [f"{self.directory(called)}: holds another run; move it out of the sweep"]
                )
            known[called] = {
                "values": member.values,
                "config_hash": member.config_hash,
                "identity": member.identity,
            }
            self.added.append(called)
            found.append(replace(member, name=called))
        # The values of a search are those of its members; to list them would take ever longer.
        self.sheet["over"] = {
            key: [] if self.search else _values(key, known.values()) for key in keys
        }
        self.sheet["base"] = _both(self.sheet["base"], base) if self.sheet["base"] else base
        return found

    def write(self, **facts: Any) -> None:
        """Write sweep.yaml; `facts` are what else it says of the sweep.

        Where only members have been added, as in each round of a search, a line is appended for
        each: the cost of a round does not grow with their number.
        """
        members = self.sheet.pop("members")
        self.sheet = {**self.sheet, "name": self.sheet["name"], **facts}
        if self.sheet == self.written:
            lines = [f"  {json.dumps(n)}: {json.dumps(members[n])}\n" for n in self.added]
            with (self.path / SHEET).open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            content = {**self.sheet, "members": members}  # last, to be appended to
            with replacing(self.path / SHEET) as file:
                file.write(OmegaConf.to_yaml(OmegaConf.create(content)).encode())
        self.written, self.added = copy.deepcopy(self.sheet), []
        self.sheet["members"] = members

    def _then(self, key: str) -> Any:
        base = self.sheet["base"]
        return base["choices"].get(key, base["options"].get(key))

    def _refuse_another_base(self, base: dict[str, Any], keys: Iterable[str]) -> None:
        """Options that come with a choice which varies are no base. An experiment may bring any:
        where it varies, the base is what was typed."""
        if not (begun := self.sheet["base"]):
            return
        before, now = begun["options"], base["options"]
        differ = {*begun["differ"], *base["differ"]}
        if "experiment" in keys:
            typed, differ = begun["typed"] | base["typed"], set()
            before, now = (_only(typed, b["options"] | b["choices"]) for b in (begun, base))
        different = [
            key
            for key in sorted(before.keys() | now.keys())
            if before.get(key, ...) != now.get(key, ...)
            and not (
                key in differ
                or incidental(key)
                or _within(key, keys)
                or _of_another_class(key, before, now)
            )
        ]
        if different:
            raise ConfigError(
                [
                    (f"{key}={shown(now[key])}" if key in now else f"{key} (left out)")
                    + f": the sweep {self.path.name!r} was begun with"
                    + (f" {shown(before[key])}" if key in before else "out it")
                    + "; take another name for this one (sweep=<name>), or leave the option as it "
                    "was"
                    for key in different[:MOST_SHOWN]
                ]
            )

    def _changed(self, called: str, member: Planned) -> str:
        """Why a member that has the name of another one cannot be run."""
        why = "was begun with another config"
        try:
            before = flat(run_options(DictConfig(OmegaConf.load(self.directory(called) / CONFIG))))
            now = member.run.options
            why = "was begun with " + ", ".join(
                f"{key}={shown(before.get(key))}, and now it is {shown(now.get(key))}"
                for key in sorted(before.keys() | now.keys())
                if before.get(key) != now.get(key)
            )
        except (OSError, YAMLError, OmegaConfBaseException):
            pass
        return f"{called}: {why}; take another name for this sweep (sweep=<name>)"


def _read(path: Path) -> dict[str, Any]:
    try:
        sheet = read_sheet(path)
        base, members, over = sheet["base"], sheet["members"], sheet["over"]
        tables = [*(m["values"] for m in members.values())]
        tables += [base[part] for part in BASE] if base or members else []
        if (
            all(isinstance(values, list) for values in over.values())
            and all(isinstance(table, dict) for table in tables)
            and all({"config_hash", "identity"} <= m.keys() for m in members.values())
        ):
            return {str(k): v for k, v in sheet.items()}
    except (OSError, YAMLError, ValueError, TypeError, AttributeError, KeyError,
            OmegaConfBaseException):  # fmt: skip
        pass
    raise ConfigError(
        [
            f"{path}: is damaged; move it away, as the directories of the members tell what is "
            "completed, or take another name for the sweep (sweep=<name>)"
        ]
    )


def _within(option: str, keys: Iterable[str]) -> bool:
    """Whether an option is one that varies, or comes with a choice that does."""
    return any(option == key or option.startswith(f"{key}.") for key in keys)


def _only(keys: Iterable[str], table: dict[str, Any]) -> dict[str, Any]:
    return {key: table[key] for key in keys if key in table}


def _of_another_class(option: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether only one of two classes has an option: it is the class that was changed."""
    target = f"{option.split('.')[0]}._target_"
    return (option in before) != (option in now) and before.get(target) != now.get(target)


def _values(key: str, members: Any) -> list[Any]:
    """The values that an option has, each once, in the order in which they came."""
    found: list[Any] = []
    for member in members:
        if key in member["values"] and member["values"][key] not in found:
            found.append(member["values"][key])
    return found


def _both(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What is common still."""
    both = {
        part: {k: v for k, v in before[part].items() if now[part].get(k, ...) == v}
        for part in ("options", "choices")
    }
    known = {**before["differ"], **now["differ"], **before["options"], **now["options"]}
    differ = {k: None for k in known if k not in both["options"]}
    return {**both, "differ": differ, "typed": before["typed"] | now["typed"]}
