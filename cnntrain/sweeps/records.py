"""Run records: the runs below a folder with their status, metrics and the options that differ.

Imports no torch, so that a report does not wait for it.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cnntrain.config import ConfigError, config_hash, flat, incidental, resume
from cnntrain.config.options import choice, defaults
from cnntrain.config.resume import CONFIG, RESULT, has_run, is_running, read_config, read_sealed

SWEEP_FILE = "sweep.yaml"
METRICS = ("val/acc", "val/loss", "test/acc", "test/loss", "train/acc", "train/loss")
STATUSES = ("completed", "running", "pending", "interrupted", "pruned", "failed", "damaged")
INVALID = (OSError, YAMLError, ValueError, TypeError, LookupError, AttributeError)
TARGET = "._target_"
MISSING = object()


@dataclass(frozen=True)
class Member:
    """The record of a run in a sweep, started or not.

    `values` are those of the varying options and the seed. `metrics` are losses in nats and
    accuracies in [0, 1]: of the selected epoch if the run is completed, else of the last epoch.
    """

    name: str  # its directory, relative to the folder
    directory: Path
    values: dict[str, Any]
    status: str
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
    maximise: bool
    over: dict[str, list[Any]]
    members: tuple[Member, ...]
    search: dict[str, Any] | None = None  # settings of the search, if it is one
    problems: tuple[str, ...] = ()  # of the folder as a whole, one line each

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
    """Read the members listed in sweep.yaml or, without that file, all runs below the folder.

    Args:
        folder: A sweep's folder, or any folder with runs below it.
        metric: Metric for the ranking; default: the one in sweep.yaml, or the one monitored.

    Raises:
        ConfigError: `metric` is unknown, `folder` is not a folder or contains no run.
    """
    folder = Path(folder)
    if metric is not None and metric not in METRICS:
        raise ConfigError([f"metric={metric}: is no metric; there is {', '.join(METRICS)}"])
    if not folder.is_dir():
        raise ConfigError([f"{folder}: is not a folder; name one with runs below it"])
    if not (folder / SWEEP_FILE).exists():
        return _collect_directories(folder, metric)
    if (sweep := read_sweep_file(folder / SWEEP_FILE)) is None:
        problem = f"{folder / SWEEP_FILE}: is damaged; the runs below the folder are shown instead"
        return _collect_directories(folder, metric, (problem,))
    members = tuple(
        read_member(name, folder / name, dict(planned["values"]))
        for name, planned in sweep["members"].items()
    )
    over = {option: _values(members, option, known) for option, known in sweep["over"].items()}
    metric = metric or str(sweep["metric"])
    name, maximise = str(sweep["name"]), metric.endswith("acc")
    return Collection(name, folder, metric, maximise, over, members, sweep.get("search"))


def read_sweep_file(path: Path) -> dict[str, Any] | None:
    """The content of sweep.yaml, but an incomplete last line; None if it is damaged."""
    try:
        text = path.read_text(encoding="utf-8").rpartition("\n")[0]
        content: Any = OmegaConf.to_container(OmegaConf.create(text))
        if (
            {"name", "metric", "over", "members"} <= content.keys()
            and content["metric"] in METRICS
            and all(isinstance(values, list) for values in content["over"].values())
            and all(isinstance(m["values"], dict) for m in content["members"].values())
        ):
            return {str(key): value for key, value in content.items()}
    except (*INVALID, OmegaConfBaseException):
        pass
    return None


def read_member(name: str, directory: Path, values: dict[str, Any]) -> Member:
    """The record in a run directory; a run that has not started is pending."""
    try:
        result = read_sealed(directory / RESULT)
    except FileNotFoundError:
        status = "running" if is_running(directory) else "pending"
        if status == "pending" and has_run(directory):
            status = "interrupted"  # killed before it wrote result.json
        result = {"status": status}
    except (resume.DamagedRecord, OSError) as error:
        return Member(name, directory, values, "damaged", error=str(error).split("; ")[0])
    status = result["status"]
    if status == "running" and not is_running(directory):
        status = "interrupted"  # killed by SIGKILL or a power loss
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
    try:
        with (directory / "metrics.csv").open(newline="", encoding="utf-8") as file:
            row: dict[Any, Any]
            for row in csv.DictReader(file):
                numbers = {k: n for k, v in row.items() if (n := _number(v)) is not None and k}
                if "epoch" in numbers and None not in row.values():
                    rows.append(numbers)
    except (OSError, UnicodeDecodeError, csv.Error):
        pass
    return rows


def as_typed(value: Any) -> str:
    """A value as typed on the command line: `true`, `null`, `[6,16,128]`, `0.01`."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), default=str)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def varying_options(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each flattened config the options that are not equal in all of them, then the seed.

    A node with another class is named by its choice: `backend` is `im2col`. Options that follow
    from a choice are left out as long as they have the value of the choice's own file.
    """
    names = dict.fromkeys(name for config in configs for name in config)
    differing = [
        name
        for name in names
        if not (incidental(name) or name == "seed" or name.endswith("._partial_"))
        and len({_key(config.get(name, MISSING)) for config in configs}) > 1
    ]
    groups = [name.removesuffix(TARGET) for name in differing if name.endswith(TARGET)]
    chosen = {g: [choice(g, _node(config, g)) for config in configs] for g in groups}
    found: list[dict[str, Any]] = [{} for _ in configs]
    for name in differing:
        if (group := name.removesuffix(TARGET)) in groups:  # the node itself if empty: `none`
            for values, own in zip(found, chosen[group], strict=True):
                values[group] = own
            continue
        group = next((g for g in groups if name.startswith(f"{g}.")), "")
        if not (group and _follows(name, group, chosen[group], configs)):
            for values, config in zip(found, configs, strict=True):
                values |= {name: config[name]} if name in config else {}
    for values, config in zip(found, configs, strict=True):
        values |= {"seed": config["seed"]} if "seed" in config else {}
    return found


def _follows(
    name: str, group: str, choices: Sequence[str], configs: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether an option has in every config the value that its choice's file sets."""
    for chosen in dict.fromkeys(choices):
        values = [c.get(name, MISSING) for c, own in zip(configs, choices, strict=True)
                  if own == chosen]  # fmt: skip
        own = defaults(group, chosen)
        default = own.get(name.removeprefix(f"{group}."), MISSING)
        if len(set(map(_key, values))) > 1:
            return False
        if own and _key(default) != _key(values[0]) and "${" not in str(default):
            return False
    return True


def _collect_directories(
    folder: Path, metric: str | None, problems: tuple[str, ...] = ()
) -> Collection:
    """All runs below a folder, with the options in which their configs differ."""
    directories = sorted(_runs(folder), key=_natural_order)
    if not directories:
        none = f"{folder}: holds no run, nor {SWEEP_FILE}; name a folder with runs below"
        raise ConfigError(problems or [none])
    configs: list[Mapping[str, Any]] = []
    members: list[Member] = []
    for directory in directories:
        name = directory.relative_to(folder).as_posix()
        member = read_member(name if name != "." else directory.absolute().name, directory, {})
        cfg = read_config(directory / CONFIG)
        if cfg is None or member.config_hash not in (None, config_hash(cfg)):
            error = f"{directory / CONFIG}: is damaged or not the run's"
            member = Member(member.name, directory, {}, "damaged", error=error)
            configs.append({})
        else:
            configs.append(flat(cfg))
        members.append(member)
    known = [(m, config) for m, config in zip(members, configs, strict=True) if config]
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
    facts = (metric, metric.endswith("acc"), over, tuple(members))
    return Collection(folder.absolute().name or str(folder), folder, *facts, problems=problems)


def _runs(folder: Path) -> Iterator[Path]:
    for path, below, _ in os.walk(folder):
        if has_run(Path(path)):
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


def _natural_order(path: Path) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", str(path))  # 2_seed=1 comes before 10_seed=0
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _node(config: Mapping[str, Any], group: str) -> dict[str, Any]:
    head = f"{group}."
    return {name.removeprefix(head): v for name, v in config.items() if name.startswith(head)}


def _key(value: Any) -> str:
    return "" if value is MISSING else json.dumps(value, sort_keys=True, default=str)


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
