"""Hydra's own options, checked before Hydra acts on them: it would make folders first, and answer
with a traceback."""

import copy
import logging.config
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cnntrain.config import run_directory_problem, writable
from cnntrain.config.overrides import first_line, format_error, format_value, unknown
from cnntrain.config.signatures import is_subclass

LAUNCHER, SWEEPER = "hydra.plugins.launcher.Launcher", "hydra.plugins.sweeper.Sweeper"
OPTIONS = [*(option.name for option in fields(HydraConf)), "env"]
OUTPUT = "<run directory>"  # in its place, as long as there is none
CALLBACK = "hydra.experimental.callback.Callback"


def hydra_problems(
    runs: Sequence[DictConfig], *, sweep: bool, resuming: bool, placed: bool = False
) -> list[str]:
    """What is wrong with `hydra` in the composed configs of all runs: one line a problem.

    `placed` says that the program chooses the runs' directories.
    """
    above: str | None = None
    option = "hydra.sweep.dir" if sweep else "hydra.run.dir"
    directories: list[str] = []
    for number, cfg in enumerate(runs):
        try:
            with as_if_running(cfg, number):
                if problems := _plugins(cfg.hydra) + _plain(cfg.hydra) or _logging(cfg.hydra):
                    return problems
                if placed:
                    continue
                above = above or str((cfg.hydra.sweep if sweep else cfg.hydra.run).dir or "")
                directory = os.path.join(above, str(cfg.hydra.sweep.subdir)) if sweep else above
        except (OmegaConfBaseException, RecursionError, AttributeError, TypeError) as error:
            return [f"hydra: {format_error(error)}"]
        records = cfg.hydra.output_subdir is not None
        if not resuming and (records or directory != os.curdir):
            wrong = run_directory_problem(directory if above else "", option)
            if wrong or directory in directories:
                return [
                    wrong or f"hydra.sweep.subdir={cfg.hydra.sweep.subdir}: runs would share it"
                ]
        directories.append(directory)
    return []


@contextmanager
def as_if_running(cfg: DictConfig, number: int) -> Iterator[None]:
    """What Hydra sets when it starts a run, for interpolations that ask for it."""
    instance = HydraConfig.instance()
    before = instance.cfg
    with open_dict(cfg):
        cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
        cfg.hydra.runtime.output_dir = OUTPUT
    instance.cfg = copy.copy(cfg)  # type: ignore[assignment]
    try:
        yield
    finally:
        instance.cfg = before


def _plugins(node: DictConfig) -> list[str]:
    """Classes that Hydra would call: only of the kinds that they are there for."""
    callbacks = node.get("callbacks") or {}
    found = [("launcher", node.launcher, LAUNCHER), ("sweeper", node.sweeper, SWEEPER)]
    found += [(f"callbacks.{name}", value, CALLBACK) for name, value in callbacks.items()]
    problems = []
    for name, value, kind in found:
        target = value.get("_target_") if isinstance(value, DictConfig) else None
        option = f"hydra.{name}._target_={format_value(target)}"
        try:
            if not isinstance(target, str) or not is_subclass(target, kind):
                problems.append(f"{option}: must be a class derived from {kind}")
        except ImportError as error:
            problems.append(f"{option}: cannot be imported: {first_line(error)}")
    return problems


def _plain(node: DictConfig) -> list[str]:
    problems = [
        f"hydra.{key}: {unknown('there is', 'option', key, OPTIONS)}"
        for key in map(str, node)
        if key not in OPTIONS
    ]
    if node.get("output_subdir") not in (None, ".hydra"):
        problems.append(f"hydra.output_subdir={node.output_subdir}: must be .hydra or null")
    if os.path.basename(node.job.name) != node.job.name or not node.job.name:
        problems.append(f"hydra.job.name={node.job.name}: must be the name of a file")
    size = node.sweeper.get("max_batch_size")
    if size is not None and size < 1:
        problems.append(f"hydra.sweeper.max_batch_size={size}: must be 1 or more")
    verbose = OmegaConf.to_container(OmegaConf.create({"it": node.get("verbose")}))["it"]  # type: ignore[index, call-overload]
    names = verbose if isinstance(verbose, list) else [verbose]
    if not isinstance(verbose, bool) and not all(isinstance(name, str) for name in names):
        problems.append(
            f"hydra.verbose={format_value(verbose)}: must be true, false or a logger's name"
        )
    return problems


def _logging(node: DictConfig) -> list[str]:
    """Set logging up as Hydra would, with no file opened, and back."""
    problems = []
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    for name in ("job_logging", "hydra_logging"):
        if node.get(name) is None:
            continue
        settings: Any = OmegaConf.to_container(node[name], resolve=True)
        if settings.get("root") is None:
            continue
        try:
            for part in ("formatters", "filters"):
                if any({"()", "class"} & set(one) for one in settings.get(part, {}).values()):
                    raise ValueError(f"{part} may name no class")
            for one in settings.get("handlers", {}).values():
                if "()" in one or not is_subclass(one["class"], "logging.Handler"):
                    raise ValueError("class of a handler must be derived from logging.Handler")
                folder = os.path.dirname(one.get("filename", ""))
                if folder not in ("", OUTPUT) and not writable(Path(folder)):
                    raise ValueError(f"{folder} is not a folder that can be written")
                if "filename" in one:
                    one["filename"] = os.devnull
            logging.config.dictConfig({**settings, "disable_existing_loggers": False})
        except Exception as error:  # as logging.config leaves it to the handlers' constructors
            problems.append(f"hydra.{name}: {format_error(error.__cause__ or error)}")
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    return problems
