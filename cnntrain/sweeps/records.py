"""Run records: status, metrics and varying options of the runs below a folder; without torch."""

import contextlib
import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cnntrain.config import ConfigError, config_hash, flat, incidental, resume
from cnntrain.config.options import choice
from cnntrain.metric_names import METRICS, Metric, higher_is_better

SWEEP_FILE = "sweep.json"
STATUSES = ("completed", "running", "pending", "interrupted", "pruned", "failed", "damaged")
TARGET = "._target_"


class BaseConfig(BaseModel):
    """What all members of a sweep have in common."""

    options: dict[str, Any]
    choices: dict[str, str]
    typed: list[str]  # names of options and groups on the command line

    @property
    def values(self) -> dict[str, Any]:
        return self.choices | self.options


class MemberEntry(BaseModel):
    """A member in sweep.json; `identity` is equal for the same run under another name."""

    values: dict[str, Any]  # of the varying options
    identity: str


class SweepRecord(BaseModel):
    """The content of sweep.json. `over` maps each varying option to its values."""

    name: str
    metric: Metric = "val/acc"
    over: dict[str, list[Any]] = {}
    base: BaseConfig | None = None
    members: dict[str, MemberEntry] = {}
    search: dict[str, Any] | None = None  # settings of the search, if it is one


@dataclass(frozen=True)
class Member:
    """The record of a run in a sweep, started or not."""

    name: str  # its directory, relative to the folder
    directory: Path
    values: dict[str, Any]  # of the varying options and the seed
    status: str
    # Losses in nats, others in [0, 1]: of the selected epoch if completed, else of the last.
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    error: str | None = None
    epochs: int = 0
    config_hash: str | None = None


@dataclass(frozen=True)
class Collection:
    """The runs of a folder. `over` maps each varying option, the seed included, to its values."""

    name: str
    folder: Path
    metric: str  # for the ranking
    over: dict[str, list[Any]]
    members: tuple[Member, ...]
    search: dict[str, Any] | None = None  # settings of the search, if it is one

    @property
    def maximise(self) -> bool:
        return higher_is_better(self.metric)

    @property
    def options(self) -> list[str]:
        """The varying options without the seed; for a search, all that it samples."""
        several = [o for o, values in self.over.items() if len(values) > 1 or self.search]
        return [option for option in several if option != "seed"]

    @property
    def counts(self) -> dict[str, int]:
        """Number of members per status, zeros left out."""
        found = Counter(member.status for member in self.members)
        return {status: found[status] for status in STATUSES if found[status]}


def collect(folder: str | os.PathLike[str], metric: str | None = None) -> Collection:
    """Read the members listed in sweep.json or, without that file, all runs below the folder.

    Raises ConfigError if there is no such metric or folder, no run, or sweep.json is damaged.

    Args:
        metric: For the ranking; default: the one in sweep.json, or the one monitored.
    """
    folder = Path(folder)
    if metric is not None and metric not in METRICS:
        raise ConfigError([f"metric={metric}: is no metric; there is {', '.join(METRICS)}"])
    if not folder.is_dir():
        raise ConfigError([f"{folder}: is not a folder; name one with runs below it"])
    sweep = read_record(folder)
    if sweep is None:
        return _collect_directories(folder, metric)
    members = tuple(
        read_member(name, folder / name, entry.values) for name, entry in sweep.members.items()
    )
    over = {option: _values(members, option, known) for option, known in sweep.over.items()}
    return Collection(sweep.name, folder, metric or sweep.metric, over, members, sweep.search)


def read_record(folder: Path) -> SweepRecord | None:
    """The content of sweep.json; None without that file. ConfigError if it is damaged."""
    try:
        return SweepRecord.model_validate_json((folder / SWEEP_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        way_out = "move it away: what is completed is recorded in the members' directories"
        raise ConfigError([f"{folder / SWEEP_FILE}: is damaged; {way_out}"]) from None


def read_member(name: str, directory: Path, values: dict[str, Any]) -> Member:
    """The record in a run directory; a run that has not started is pending."""
    try:
        result = resume.read_sealed(directory / resume.RESULT)
    except FileNotFoundError:
        begun = resume.has_run(directory) or resume.is_running(directory)
        result = {"status": "running" if begun else "pending"}
    except (resume.DamagedRecord, OSError) as error:
        return Member(name, directory, values, "damaged", error=str(error).split("; ")[0])
    status = result["status"]
    if status == "running" and not resume.is_running(directory):
        status = "interrupted"  # by SIGKILL or a power loss
    metrics, epochs = result.get("metrics"), result.get("epochs")
    if metrics is None and (rows := history(directory)):
        metrics, epochs = {k: v for k, v in rows[-1].items() if k in METRICS}, len(rows)
    if "seed" not in values and "seed" in result:
        values["seed"] = result["seed"]
    seconds, reason = result.get("timings", {}).get("seconds"), result.get("error")
    facts = (status, metrics or {}, seconds, reason, epochs or 0, result.get("config_hash"))
    return Member(name, directory, values, *facts)


def history(directory: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, one per epoch: the cells that are numbers. Skips incomplete rows."""
    rows: list[dict[str, float]] = []
    with (
        contextlib.suppress(OSError, UnicodeDecodeError, csv.Error),
        (directory / "metrics.csv").open(newline="", encoding="utf-8") as file,
    ):
        for row in csv.DictReader(file):
            with contextlib.suppress(TypeError, ValueError):  # an incomplete row
                rows.append({name: float(cell) for name, cell in row.items() if cell != ""})
    return rows


def as_typed(value: Any) -> str:
    """A value as typed on the command line: `true`, `null`, `[6,16,128]`, `0.01`."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), default=str)


def text(value: Any) -> str:
    """A value for display: floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else as_typed(value)


def unit(metric: str) -> str:
    return " %" if higher_is_better(metric) else ""


def number(metric: str, value: float | None) -> str:
    """A loss with four decimals, any other metric in %."""
    if value is None:
        return "–"
    return f"{100 * value:.2f}" if higher_is_better(metric) else f"{value:.4f}"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def varying_options(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each flattened config the options that are not equal in all of them, then the seed.

    A node with another class is named by its choice: `backend` is `im2col`. Its options are left
    out if they have one value for each choice.
    """
    names = dict.fromkeys(name for config in configs for name in config)
    targets = [name for name in names if name.endswith(TARGET) and _differs(name, configs)]
    groups = [name.removesuffix(TARGET) for name in targets]
    named = [
        {group: choice(group, _node(config, group)) for group in groups}
        | {name: value for name, value in config.items() if name not in (*groups, *targets)}
        for config in configs
    ]
    varying = [
        name
        for name in dict.fromkeys(name for config in named for name in config)
        if not (incidental(name) or name == "seed" or name.endswith("._partial_"))
        and _differs(name, named)
        and not any(name.startswith(f"{g}.") and _follows(name, g, named) for g in groups)
    ]
    return [{n: config[n] for n in (*varying, "seed") if n in config} for config in named]


def _differs(name: str, configs: Sequence[Mapping[str, Any]]) -> bool:
    return len({as_typed(config.get(name, "")) for config in configs}) > 1


def _follows(name: str, group: str, configs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an option has the same value in all configs with the same choice of a group."""
    alike = [[c for c in configs if c[group] == chosen] for chosen in {c[group] for c in configs}]
    return not any(_differs(name, own) for own in alike)


def _collect_directories(folder: Path, metric: str | None) -> Collection:
    """All runs below a folder, with the options in which their configs differ."""
    directories = sorted(_runs(folder))
    if not directories:
        raise ConfigError(
            [f"{folder}: holds no run, nor {SWEEP_FILE}; name a folder with runs below"]
        )
    members: list[Member] = []
    known: list[tuple[Member, dict[str, Any]]] = []  # those whose config can be read
    for directory in directories:
        name = directory.relative_to(folder).as_posix()
        member = read_member(name if name != "." else directory.absolute().name, directory, {})
        cfg = resume.read_config(directory / resume.CONFIG)
        if cfg is None or member.config_hash not in (None, config_hash(cfg)):
            error = f"{directory / resume.CONFIG}: is damaged or not the run's"
            member = Member(member.name, directory, {}, "damaged", error=error)
        else:
            known.append((member, flat(cfg)))
        members.append(member)
    for (member, _), values in zip(known, varying_options([c for _, c in known]), strict=True):
        member.values.update(values)
    over: dict[str, list[Any]] = {}
    varied = dict.fromkeys(option for m in members for option in m.values)
    for option in sorted(varied, key=lambda option: option == "seed"):
        seen = _values(members, option)
        if len(seen) > 1 or option != "seed":
            over[option] = sorted(seen) if all(map(is_number, seen)) else seen
    monitors = {config["trainer.monitor"] for _, config in known if "trainer.monitor" in config}
    monitor = monitors.pop() if len(monitors) == 1 else None
    metric = metric or (monitor if monitor in METRICS else METRICS[0])
    name = folder.absolute().name or str(folder)
    return Collection(name, folder, metric, over, tuple(members))


def _runs(folder: Path) -> Iterator[Path]:
    for path, below, _ in os.walk(folder):
        if resume.has_run(Path(path)):
            below.clear()  # runs are not nested
            yield Path(path)
        else:
            below[:] = [name for name in below if not name.startswith(".")]


def _values(members: Sequence[Member], option: str, known: Sequence[Any] = ()) -> list[Any]:
    return distinct([*known, *(m.values[option] for m in members if option in m.values)])


def distinct(values: Iterable[Any]) -> list[Any]:
    """The values without repetitions; 1 and `true` are distinct."""
    found: dict[str, Any] = {}
    for value in values:
        found.setdefault(as_typed(value), value)
    return list(found.values())


def _node(config: Mapping[str, Any], group: str) -> dict[str, Any]:
    head = f"{group}."
    return {name.removeprefix(head): v for name, v in config.items() if name.startswith(head)}
