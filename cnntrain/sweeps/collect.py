"""The runs below a folder: what varies between them, how far each has come, what it measured.

Imports no torch: a report on two hundred runs must not wait for it.
"""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cnntrain.atomic import replacing
from cnntrain.config import ConfigError, config_hash, flat
from cnntrain.config.resume import CONFIG, DamagedRecord, has_run, read_config
from cnntrain.sweeps.options import varying
from cnntrain.sweeps.record import METRICS, STATUSES, Member, plain, read_member

SWEEP = "sweep.yaml"


@dataclass(frozen=True)
class Collection:
    """What a folder holds. `over` maps an option that varies to its values so far, the seed too."""

    name: str
    folder: Path
    metric: str  # what ranks
    maximise: bool
    over: dict[str, list[Any]]
    members: tuple[Member, ...]
    search: dict[str, Any] | None = None  # how the values were searched for, if they were
    problems: tuple[str, ...] = ()  # of the folder as such, a line each

    @property
    def options(self) -> list[str]:
        """What varies, the seed apart; what a search may vary, too."""
        several = [o for o, values in self.over.items() if len(values) > 1 or self.search]
        return [option for option in several if option != "seed"]

    @property
    def counts(self) -> dict[str, int]:
        """How many members have each status, those without any left out."""
        found = Counter(member.status for member in self.members)
        return {status: found[status] for status in STATUSES if found[status]}


def collect(folder: str | os.PathLike[str], metric: str | None = None) -> Collection:
    """The members that sweep.yaml names, or without it all runs below the folder.

    `metric` takes the place of the one that sweep.yaml ranks by, or that the runs monitored.
    Raises ConfigError if that is none, or if the folder is none or holds no run.
    """
    folder = Path(folder)
    if metric is not None and metric not in METRICS:
        raise ConfigError([f"metric={metric}: is no metric; there is {', '.join(METRICS)}"])
    if not folder.is_dir():
        raise ConfigError([f"{folder}: is not a folder; name one with runs below it"])
    try:
        sweep = _sweep(folder / SWEEP)
    except DamagedRecord as error:
        return _found(folder, metric, (str(error),))
    if sweep is None:
        return _found(folder, metric, ())
    members = tuple(
        read_member(name, folder / name, dict(planned["values"]))
        for name, planned in sweep["members"].items()
    )
    # A search knows ranges beforehand, not values.
    over = {option: _values(members, option, known) for option, known in sweep["over"].items()}
    ranked = metric or sweep["metric"]
    name, search = str(sweep["name"]), sweep.get("search")
    return Collection(name, folder, ranked, ranked.endswith("acc"), over, members, search)


def write_csv(collection: Collection, path: Path) -> None:
    """A row per member: status, the options that vary, metrics, seconds, directory, error."""
    options = list(collection.over)
    if any("seed" in member.values for member in collection.members) and "seed" not in options:
        options.append("seed")
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["status", *options, *METRICS, "seconds", "epochs", "directory", "error"])
    for m in collection.members:
        row: list[Any] = [m.status, *(plain(m.values[o]) if o in m.values else "" for o in options)]
        row += [m.metrics.get(name, "") for name in METRICS]
        writer.writerow([*row, m.seconds, m.epochs, m.name, m.error])
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def _found(folder: Path, metric: str | None, problems: tuple[str, ...]) -> Collection:
    """All runs below a folder, with the options in which their configs differ."""
    directories = sorted(_runs(folder), key=_natural)
    if not directories:
        said = problems or (f"{folder}: holds no run, nor {SWEEP}; name a folder with runs below",)
        raise ConfigError(said)
    configs: list[Mapping[str, Any] | None] = []
    members: list[Member] = []
    for directory in directories:
        name = directory.relative_to(folder).as_posix()
        member = read_member(name if name != "." else directory.absolute().name, directory, {})
        cfg = read_config(directory / CONFIG)
        configs.append(None if cfg is None else flat(cfg))
        if cfg is None or member.config_hash not in (None, config_hash(cfg)):
            configs[-1] = None
            error = f"{directory / CONFIG}: is damaged or not the run's"
            member = Member(member.name, directory, {}, "damaged", error=error)
        members.append(member)
    known = [config for config in configs if config is not None]
    values = iter(varying(known))
    for i, config in enumerate(configs):
        if config is not None:
            members[i].values.update(next(values))
    over: dict[str, list[Any]] = {}
    varied = dict.fromkeys(option for m in members for option in m.values)
    for option in sorted(varied, key=lambda option: option == "seed"):
        seen = _values(members, option)
        if len(seen) > 1 or option != "seed":
            over[option] = sorted(seen) if all(map(_is_number, seen)) else seen
    monitors = {config["trainer.monitor"] for config in known if "trainer.monitor" in config}
    monitored = monitors.pop() if len(monitors) == 1 else METRICS[0]
    ranked = metric or (monitored if monitored in METRICS else METRICS[0])
    name = folder.absolute().name or str(folder)
    return Collection(
        name, folder, ranked, ranked.endswith("acc"), over, tuple(members), problems=problems
    )


def _runs(folder: Path) -> Iterator[Path]:
    for path, below, _ in os.walk(folder):
        if has_run(Path(path)):
            below.clear()  # a run holds no other
            yield Path(path)
        else:
            below[:] = [name for name in below if not name.startswith(".")]


def _values(members: Sequence[Member], option: str, known: Sequence[Any] = ()) -> list[Any]:
    """The values of an option, those known before first, each once; 1 is not `true`."""
    met = [member.values[option] for member in members if option in member.values]
    found: dict[str, Any] = {}
    for value in (*known, *met):
        found.setdefault(plain(value), value)
    return list(found.values())


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sorts 2_seed=1 before 10_seed=0."""
    parts = re.split(r"(\d+)", str(path))
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _sweep(path: Path) -> dict[str, Any] | None:
    """What sweep.yaml says, None without one; raises Damaged if it is not as a sweep writes it."""
    try:
        content = read_sheet(path)
        sound = (
            {"name", "metric", "over", "members"} <= content.keys()
            and content["metric"] in METRICS
            and all(isinstance(values, list) for values in content["over"].values())
            and all(isinstance(m["values"], dict) for m in content["members"].values())
        )
    except FileNotFoundError:
        return None
    except (OSError, YAMLError, ValueError, TypeError, AttributeError, KeyError,
            OmegaConfBaseException):  # fmt: skip
        sound = False
    if not sound:
        raise DamagedRecord(f"{path}: is damaged; the runs below the folder are shown without it")
    return content


def read_sheet(path: Path) -> Any:
    """The content of sweep.yaml. A line that a kill has cut off while it was appended is left out.

    Raises OSError, ValueError, YAMLError or OmegaConfBaseException.
    """
    lines = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return OmegaConf.to_container(OmegaConf.create(lines))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
