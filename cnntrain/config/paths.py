"""The config folder, and checks of the folders that runs and sweeps write to."""

import copy
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from cnntrain.config.errors import format_error

# In a wheel conf/ lies in the package, in a checkout beside it.
_PACKAGE = Path(__file__).parents[1]
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

LONGEST_PATH = 3900  # bytes; systems allow 4096, files below need the rest


def run_directory_problem(directory: str, option: str = "hydra.run.dir") -> str | None:
    """Why a new run cannot use this directory, if so."""
    path, records = Path(directory).absolute(), ("result.json", "results.json", "checkpoints")
    if directory and any(os.path.lexists(path / name) for name in records):
        how = "resume=True" if option == "directory" else f"resume={shlex.quote(directory)}"
        return (
            f"{option}={directory}: holds another run already; resume that one "
            f"({how}), or choose another folder for this one"
        )
    return folder_problem(directory, option)


def sweep_folder_problem(directory: str, option: str = "hydra.sweep.dir") -> str | None:
    """Why a sweep cannot use this folder, if so."""
    if directory and (Path(directory) / "result.json").exists():
        return f"{option}={directory}: holds a run; choose another folder for the sweep"
    return folder_problem(directory, option)


def folder_problem(directory: str, option: str) -> str | None:
    """Why files cannot be written below a folder, which need not exist yet, if so."""
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
        return f"{option}={directory}: {above} is not a writable folder"
    return None


def writable(folder: Path) -> bool:
    """Whether files can be created in a folder: tried, as root ignores permissions."""
    try:
        with tempfile.TemporaryFile(dir=folder):  # has no name
            return True
    except OSError:
        return False


def output_problems(
    runs: Sequence[DictConfig], *, sweep: bool, resuming: bool, by_program: bool
) -> list[str]:
    """Why runs cannot write to the directories that `hydra.run` or `hydra.sweep` name.

    Args:
        runs: The composed configs, `hydra` included.
        by_program: The directories are chosen by the program.
    """
    option = "hydra.sweep.dir" if sweep else "hydra.run.dir"
    directories: list[str] = []
    for number, cfg in enumerate(runs):
        try:
            with as_if_running(cfg, number):
                above = str((cfg.hydra.sweep if sweep else cfg.hydra.run).dir or "")
                directory = os.path.join(above, str(cfg.hydra.sweep.subdir)) if sweep else above
        except (OmegaConfBaseException, RecursionError, AttributeError, TypeError) as error:
            return [f"hydra: {format_error(error)}"]
        records = cfg.hydra.output_subdir is not None
        if by_program or resuming or not (records or directory != os.curdir):
            continue
        if problem := run_directory_problem(directory if above else "", option):
            return [problem]
        if directory in directories:
            return [f"hydra.sweep.subdir={cfg.hydra.sweep.subdir}: runs would share it"]
        directories.append(directory)
    return []


@contextmanager
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
