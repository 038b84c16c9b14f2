"""Compose a config, check it, build objects from it.

Unknown keys and choices are found without importing torch; types need the classes' signatures.
"""

import contextlib
import hashlib
import json
import os
import shlex
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import hydra.conf
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict

from cnntrain.config.checks import check
from cnntrain.config.checks import settle as settle
from cnntrain.config.cross_checks import cross_check
from cnntrain.config.nodes import NODES as NODES
from cnntrain.config.nodes import ROOTS as ROOTS
from cnntrain.config.nodes import Root as Root
from cnntrain.config.overrides import first_line as first_line
from cnntrain.config.overrides import format_error, load_all, merged, misplaced
from cnntrain.config.overrides import quoted as quoted
from cnntrain.notebook import OneLine

# In a wheel conf/ lies in the package, in a checkout beside it.
_PACKAGE = Path(__file__).parents[1]
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
HYDRA_CONF = Path(hydra.conf.__file__).parent


# Options that change nothing of what is computed, only where, how it is shown and how often it is
# saved: a run may go on with others, and equal runs may differ in them.
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


def incidental(option: str) -> bool:
    """Whether an option, or the node that it is in, is one of INCIDENTAL."""
    return option in INCIDENTAL or option.partition(".")[0] in INCIDENTAL


LONGEST_PATH = 3900  # bytes: of the 4096 that systems take, what files below may need is left


class ConfigError(OneLine, Exception):
    """What is wrong with a config: `problems`, one line each, for the person who wrote it."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))


def compose(
    overrides: str | Sequence[str] = (),
    *,
    name: str = "train",
    command: str | None = None,
    folder: str | os.PathLike[str] = CONF,
    extra: str | os.PathLike[str] | None = None,
) -> DictConfig:
    """The config that `python train.py <overrides>` would run, checked.

    `folder` holds the root config `name`.yaml, `extra` is a folder searched after it; `command` is
    whose config it has to be, if not that of the command called `name`. Raises ConfigError with
    every problem found.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    more = None if extra is None else Path(extra)
    cfg = compose_all(overrides, name=name, command=command, folder=Path(folder), extra=more)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def compose_all(
    overrides: Sequence[str],
    *,
    name: str,
    command: str | None = None,
    folder: Path = CONF,
    extra: Path | None = None,
    types: bool = True,
) -> DictConfig:
    """As `compose`, with Hydra's own options, unchecked, under `hydra`."""
    cfg, problems = compose_valid(overrides, name, command or name, folder, extra, types)
    if problems or cfg is None:
        raise ConfigError(problems)
    return cfg


def compose_valid(
    overrides: Sequence[str],
    name: str,
    command: str,
    folder: Path,
    extra: Path | None,
    types: bool = True,
) -> tuple[DictConfig | None, list[str]]:
    """As `compose_all`, of the overrides that can be applied, and every problem found; None if
    nothing can be composed. Without `types`, or with an unknown key or choice, nothing is imported.
    """
    root = ROOTS.get(command, ROOTS["train"])  # one of the user's own is trained
    overrides = merged(overrides)
    cfg, problems = _load(overrides, name, folder, extra)
    problems += misplaced(overrides, root.nodes)
    if cfg is None:
        return None, problems
    settle(cfg, cfg.hydra, root)
    if problems or not types:  # these are reported without importing torch
        return cfg, problems
    return cfg, found_in(without_hydra(cfg), root)


def found_in(own: DictConfig, root: Root) -> list[str]:
    """What is wrong with a config without `hydra`; imports the classes that it names."""
    problems = check(own, root)
    related = ("trainer", "optimizer", "scheduler")
    if "trainer" in root.nodes and not any(p.lstrip("+~").startswith(related) for p in problems):
        problems += cross_check(own)
    return problems


def without_hydra(cfg: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def fixed_run_directory(
    overrides: Sequence[str],
    *,
    name: str = "train",
    folder: Path = CONF,
    extra: Path | None = None,
) -> Path:
    """The run directory of a command line that names one; ConfigError if it is new every time."""
    cfg, problems = _load(overrides, name, folder, extra)
    if problems or cfg is None:
        raise ConfigError(problems)
    raw = OmegaConf.to_container(cfg.hydra.run)
    if isinstance(raw, dict) and "${now:" in str(raw["dir"]):
        raise ConfigError(
            ["resume=auto: needs a folder that stays the same; add hydra.run.dir=<folder>"]
        )
    try:
        HydraConfig.instance().set_config(cfg)
        return Path(cfg.hydra.run.dir)
    finally:
        HydraConfig.instance().cfg = None


def _load(
    overrides: Sequence[str], name: str, folder: Path, extra: Path | None
) -> tuple[DictConfig | None, list[str]]:
    def load(chosen: Sequence[str]) -> DictConfig:
        return hydra.compose(name, [*chosen], return_hydra_config=True)

    with searching(folder, extra, name), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is not available")  # a folder of hydra.searchpath
        cfg, problems = load_all(overrides, load)
    if cfg is None:
        problems = [p for path in (folder, extra) if path for p in _garbled(path)] or problems
    else:
        problems += _ignored_files(cfg)
    return cfg, problems


def _ignored_files(cfg: DictConfig) -> Iterator[str]:
    """A line for each file of the user's that Hydra does not read, as a shipped one that comes
    before it in the search path has the same name and another content."""
    shipped: list[Path] = []
    for source in cfg.hydra.runtime.config_sources:
        folder = HYDRA_CONF if source.path == "hydra.conf" else Path(source.path)
        if folder in (HYDRA_CONF, CONF):
            shipped += _files(folder)
        elif source.schema == "file":
            for name in shipped:
                path, other = folder / name, CONF / name
                other = other if other.is_file() else HYDRA_CONF / name
                if path.is_file() and path.read_bytes() != other.read_bytes():
                    yield f"{path}: is ignored, as {other} has the same name; give it another name"


@cache
def _files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*.yaml"))


@contextlib.contextmanager
def searching(folder: Path, extra: Path | None, name: str) -> Iterator[None]:
    """Hydra over the configs of `folder` and then `extra`, as its own command line sets it up."""
    place = str(folder.absolute())
    with hydra.initialize_config_dir(place, version_base="1.3", job_name=name):
        if extra:
            path = create_config_search_path(place)
            path.prepend("command-line", f"file://{extra}", SearchPathQuery(provider="schema"))
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2(name, path)
        yield


def _garbled(folder: Path) -> Iterator[str]:
    """A line for every YAML file that is no text: the decoder's error does not name it."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            yield f"{path}: {format_error(error)}"


def build(node: DictConfig, **given: Any) -> Any:
    """The object that a node describes. `given` are the parameters that the program fills in."""
    return hydra.utils.instantiate(node, **given)


@contextlib.contextmanager
def as_config_error(option: str) -> Iterator[None]:
    """Turn a constructor's refusal of its arguments into a ConfigError that names `option`."""
    try:
        yield
    except (Exception, SystemExit) as error:  # of whatever class the constructor's author chose
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(cause, ConfigError):
            raise cause from None
        said = format_error(cause or error)
        raise ConfigError(
            [said if said.startswith(f"{option}.") else f"{option}: {said}"]
        ) from error


def run_directory_problem(directory: str, option: str = "hydra.run.dir") -> str | None:
    """Why a run cannot have this directory for its own, if so: nothing is written to find out."""
    path, records = Path(directory).absolute(), ("result.json", "results.json", "checkpoints")
    if directory and any(os.path.lexists(path / name) for name in records):
        how = "resume=True" if option == "directory" else f"resume={shlex.quote(directory)}"
        return (
            f"{option}={directory}: holds another run already; resume that one "
            f"({how}), or give this one its own folder"
        )
    return folder_problem(directory, option)


def sweep_folder_problem(directory: str, option: str = "hydra.sweep.dir") -> str | None:
    """Why a sweep cannot have this folder, if so: nothing is written to find out."""
    if directory and (Path(directory) / "result.json").exists():
        return f"{option}={directory}: holds a run; give the sweep its own folder"
    return folder_problem(directory, option)


def folder_problem(directory: str, option: str) -> str | None:
    """Why there can be no files in a folder that may not be there yet, if so."""
    if not directory:
        return f"{option}=: must name a folder"
    if directory.startswith("~"):
        home = os.path.expanduser(directory)
        return f"{option}={directory}: ~ is not expanded; write {option}={home}"
    path = Path(directory).absolute()
    if len(os.fsencode(path)) > LONGEST_PATH or any(len(os.fsencode(p)) > 255 for p in path.parts):
        return f"{option}={directory}: is too long a name; a folder's has at most 255 bytes"
    above = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not writable(above):
        return f"{option}={directory}: {above} is not a folder that can be written"
    return None


def writable(folder: Path) -> bool:
    """Whether files can be made in a folder: tried, as permissions do not tell it of root."""
    try:
        with tempfile.TemporaryFile(dir=folder):  # one that never has a name
            return True
    except OSError:
        return False


def flat(cfg: DictConfig) -> dict[str, Any]:
    """Every option by its full name, `model.dropout` to 0.3; interpolations are resolved."""
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


def config_hash(cfg: DictConfig) -> str:
    """Names a config by what decides the result, whatever the order of the options."""
    return options_hash(flat(cfg))


def options_hash(options: Mapping[str, Any]) -> str:
    """As `config_hash`, of the options as `flat` gives them."""
    deciding = {key: value for key, value in options.items() if not incidental(key)}
    content = json.dumps(deciding, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
