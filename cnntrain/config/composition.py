"""Composition of a config by Hydra, with every problem reported at once.

Unknown keys and choices are found without importing torch; types need the classes' signatures.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import hydra
import hydra.conf
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict

from cnntrain.config.checks import adapt_types, check
from cnntrain.config.cross_checks import cross_check
from cnntrain.config.errors import ConfigError, format_error
from cnntrain.config.nodes import ROOTS, Root
from cnntrain.config.options import without_hydra
from cnntrain.config.overrides import explain, merged, misplaced
from cnntrain.config.paths import CONF, as_if_running

HYDRA_CONF = Path(hydra.conf.__file__).parent


def compose(
    overrides: str | Sequence[str] = (),
    *,
    name: str = "train",
    command: str | None = None,
    folder: str | os.PathLike[str] = CONF,
    extra: str | os.PathLike[str] | None = None,
) -> DictConfig:
    """Compose and check the config that `python train.py <overrides>` would run.

    Args:
        overrides: Command-line overrides, such as `["model=lenet5", "optimizer.lr=0.01"]`.
        name: The root config, `name`.yaml.
        command: The command that the config is for; default: the one called `name`.
        folder: The folder of the root config.
        extra: A further config folder, as `--config-dir`.

    Raises:
        ConfigError: With every problem found.
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
    """As `compose_all`, of the valid overrides, with the problems of the others.

    The config is None if nothing can be composed. Types are not checked, and no class is imported,
    if `types` is false or a key or choice is unknown.
    """
    root = ROOTS.get(command, ROOTS["train"])  # a root config of the user's own is trained
    overrides = merged(overrides)
    cfg, problems = _load(overrides, name, folder, extra)
    problems += misplaced(overrides, root.nodes)
    if cfg is None:
        return None, problems
    adapt_types(cfg, cfg.hydra)
    if problems or not types:
        return cfg, problems
    return cfg, config_problems(without_hydra(cfg), root)


def config_problems(cfg: DictConfig, root: Root) -> list[str]:
    """Problems of a config without `hydra`; imports the classes that it names."""
    problems = check(cfg, root)
    related = ("trainer", "optimizer", "scheduler")
    if "trainer" in root.nodes and not any(p.lstrip("+~").startswith(related) for p in problems):
        problems += cross_check(cfg)
    return problems


def fixed_run_directory(
    overrides: Sequence[str],
    *,
    name: str = "train",
    folder: Path = CONF,
    extra: Path | None = None,
) -> Path:
    """The run directory that overrides name; ConfigError if it has the current time in it."""
    cfg, problems = _load(overrides, name, folder, extra)
    if problems or cfg is None:
        raise ConfigError(problems)
    raw = OmegaConf.to_container(cfg.hydra.run)
    if isinstance(raw, dict) and "${now:" in str(raw["dir"]):
        raise ConfigError(
            ["resume=auto: needs a folder that stays the same; add hydra.run.dir=<folder>"]
        )
    with as_if_running(cfg, 0):
        return Path(cfg.hydra.run.dir)


def _load(
    overrides: Sequence[str], name: str, folder: Path, extra: Path | None
) -> tuple[DictConfig | None, list[str]]:
    """Compose; if Hydra raises, find the invalid overrides and compose the others.

    Hydra, OmegaConf and YAML raise exceptions of many classes; all are taken for user errors.
    """

    def load(chosen: Sequence[str]) -> DictConfig:
        return hydra.compose(name, [*chosen], return_hydra_config=True)

    with config_folders(folder, extra, name), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is not available")  # a folder of hydra.searchpath
        try:
            cfg = load(overrides)
            return cfg, list(_shadowed_files(cfg))
        except Exception as error:
            first = error
        try:
            base = load([])
        except Exception as error:
            garbled = [p for path in (folder, extra) if path for p in _undecodable(path)]
            return None, garbled or [format_error(error)]
        problems, kept = list[str](), list[str]()
        # Choices and classes first: whether `model.dropout` exists depends on `model=`.
        for text in sorted(
            overrides, key=lambda t: ("." in t.split("=")[0], "._target_=" not in t)
        ):
            try:
                base = load([*kept, text])
                kept.append(text)
            except Exception as error:
                problems.append(explain(text, error, base))
        return base, [*(problems or [format_error(first)]), *_shadowed_files(base)]


def _shadowed_files(cfg: DictConfig) -> Iterator[str]:
    """A line for each config file of the user's that a shipped one of the same name hides."""
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


def _undecodable(folder: Path) -> Iterator[str]:
    """A line for every YAML file that is not UTF-8: the decoder's error does not name it."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            yield f"{path}: {format_error(error)}"


class ConfigDir(SearchPathPlugin):
    """`--config-dir` for Hydra's Compose API, which has no such option."""

    folder: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder:
            search_path.append("command-line", f"file://{self.folder}")


@contextlib.contextmanager
def config_folders(folder: Path, extra: Path | None, name: str) -> Iterator[None]:
    """Hydra initialised with the configs of `folder` and then `extra`."""
    plugins = Plugins.instance()
    if ConfigDir not in plugins.discover(SearchPathPlugin):
        plugins.register(ConfigDir)
    ConfigDir.folder = extra
    try:
        with hydra.initialize_config_dir(str(folder.absolute()), version_base="1.3", job_name=name):
            yield
    finally:
        ConfigDir.folder = None


def build(node: DictConfig, **given: Any) -> Any:
    """Instantiate a node; `given` are the parameters that the program sets."""
    return hydra.utils.instantiate(node, **given)
