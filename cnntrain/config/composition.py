"""Composition of a config by Hydra, with every problem reported at once.

Unknown keys and choices are found without importing torch; types need the classes' signatures.
"""

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cnntrain.config.checks import adapt_types, check
from cnntrain.config.cross_checks import cross_check
from cnntrain.config.errors import ConfigError, format_error, run_directory_problem
from cnntrain.config.nodes import ROOTS, Root
from cnntrain.config.options import CONF, without_hydra
from cnntrain.config.overrides import explain, merged

build = hydra.utils.instantiate  # with the parameters that the program sets as keywords


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
    where: dict[str, Any] = {"folder": Path(folder), "extra": Path(extra) if extra else None}
    return without_hydra(compose_all(overrides, name=name, command=command, **where))


def compose_all(overrides: Sequence[str], **where: Any) -> DictConfig:
    """As `compose`, with Hydra's own options, unchecked, under `hydra`; see `compose_valid`."""
    cfg, problems = compose_valid(overrides, **where)
    if problems or cfg is None:
        raise ConfigError(problems)
    return cfg


def compose_valid(
    overrides: Sequence[str],
    name: str,
    command: str | None = None,
    folder: Path = CONF,
    extra: Path | None = None,
    types: bool = True,
) -> tuple[DictConfig | None, list[str]]:
    """As `compose_all`, of the valid overrides, with the problems of the others.

    The config is None if nothing can be composed. Types are not checked, and no class is imported,
    if `types` is false or a key or choice is unknown.
    """
    root = ROOTS.get(command or name, ROOTS["train"])  # one of the user's own is trained
    cfg, problems = _load(merged(overrides), name, folder, extra)
    if cfg is None:
        return None, problems
    for key, _, value in (text.partition("=") for text in overrides):
        if key in root.nodes and value.startswith("["):
            problems.append(f"{key}={value}: must name a choice of {key}")
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


def fixed_run_directory(cfg: DictConfig) -> Path:
    """The run directory in a config with `hydra`; ConfigError if its name has the current time."""
    raw: Any = OmegaConf.to_container(cfg.hydra.run)
    if "${now:" in str(raw["dir"]):
        problem = "resume=auto: needs a folder that stays the same; add hydra.run.dir=<folder>"
        raise ConfigError([problem])
    with as_if_running(cfg, 0):
        return Path(cfg.hydra.run.dir)


def output_problems(
    runs: Sequence[DictConfig], *, sweep: bool, resuming: bool, by_program: bool
) -> list[str]:
    """Why runs cannot write to the directories that `hydra.run` or `hydra.sweep` name.

    Args:
        runs: The composed configs, `hydra` included.
        by_program: The directories are chosen by the program.
    """
    directories: list[str] = []
    for number, cfg in enumerate(runs):
        try:
            with as_if_running(cfg, number):
                above = str((cfg.hydra.sweep if sweep else cfg.hydra.run).dir or "")
                directory = os.path.join(above, str(cfg.hydra.sweep.subdir)) if sweep else above
        except (OmegaConfBaseException, RecursionError, AttributeError, TypeError) as error:
            return [f"hydra: {format_error(error)}"]
        records = cfg.hydra.output_subdir is not None
        if by_program or resuming or (directory == os.curdir and not records):
            continue
        option = "hydra.sweep.dir" if sweep else "hydra.run.dir"
        if problem := run_directory_problem(directory if above else "", option):
            return [problem]
        if directory in directories:
            return [f"hydra.sweep.subdir={cfg.hydra.sweep.subdir}: runs would share it"]
        directories.append(directory)
    return []


@contextlib.contextmanager
def as_if_running(cfg: DictConfig, number: int) -> Iterator[None]:
    """Set what Hydra sets when it starts a run, for interpolations that refer to it."""
    instance = HydraConfig.instance()
    before = instance.cfg
    with open_dict(cfg):
        cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
        cfg.hydra.runtime.output_dir = "<run directory>"
    instance.cfg = copy.copy(cfg)  # type: ignore[assignment]
    try:
        yield
    finally:
        instance.cfg = before


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
            undecodable = [p for path in (folder, extra) if path for p in _undecodable(path)]
            return None, undecodable or [format_error(error)]
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
    sources = [s.path for s in cfg.hydra.runtime.config_sources if s.schema == "file"]
    for folder in (Path(path) for path in sources if str(CONF) in sources and path != str(CONF)):
        for path in sorted(folder.rglob("*.yaml")):
            shipped = CONF / path.relative_to(folder)
            if shipped.is_file() and path.read_bytes() != shipped.read_bytes():
                yield f"{path}: is ignored, as {shipped} has the same name; give it another name"


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
