"""Errors of a config, of files and of output folders, as one line each."""

import contextlib
import difflib
import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from omegaconf.errors import OmegaConfBaseException

from cnntrain.terminal import NoTraceback

# Exceptions whose message says little without the name of the class.
TERSE = (LookupError, ArithmeticError, AttributeError, AssertionError, SystemExit)


class ConfigError(NoTraceback, Exception):
    """An invalid config: `problems`, one line each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))


@contextlib.contextmanager
def collect(problems: list[str]) -> Iterator[None]:
    """Add the problems of a ConfigError to a list, so that all of them are reported at once."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems


@contextlib.contextmanager
def as_config_error(option: str) -> Iterator[None]:
    """Turn the exception of a constructor into a ConfigError that names the config node."""
    try:
        yield
    except (Exception, SystemExit) as error:  # of whatever class the constructor's author chose
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(cause, ConfigError):
            raise cause from None
        text = format_error(cause or error)
        problem = text if text.startswith(f"{option}.") else f"{option}: {text}"
        raise ConfigError([problem]) from error


def format_error(error: BaseException) -> str:
    """An exception's message in one line, with its class where that says more."""
    text = " ".join(str(error).split())
    terse = isinstance(error, TERSE) and not isinstance(error, OmegaConfBaseException)
    return f"{type(error).__name__}: {text}".removesuffix(": ") if terse or not text else text


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def format_os_error(error: OSError) -> str:
    """The file of an OSError and the operating system's message; of a renaming, both files."""
    names = (error.filename, error.filename2)
    files = " to ".join(os.fsdecode(n) if isinstance(n, bytes) else str(n) for n in names if n)
    return f"{files}: {error.strerror}" if files else str(error.strerror or error)


def format_value(value: Any) -> str:
    """A plain value as on the command line, cut after 200 characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 200 else f"{text[:200]}..."


def unknown(has: str, what: str, name: str, names: Sequence[str]) -> str:
    """An error line for an unknown name, with the nearest known one or all of them."""
    near = difflib.get_close_matches(name, names, n=1)
    way_out = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(names))}"
    if what == "choice" and near:
        way_out += f" (there is {', '.join(sorted(names))})"
    return f"{has} no {what} {name!r}; {way_out}"


def run_directory_problem(
    directory: str,
    option: str = "hydra.run.dir",
    records: Sequence[str] = ("result.json", "results.json", "checkpoints"),
) -> str | None:
    """Why a new run cannot use this directory, if so: it contains one of `records`, for example."""
    if directory and any(os.path.lexists(Path(directory, name)) for name in records):
        how = "resume=True" if option == "directory" else f"resume={shlex.quote(directory)}"
        return f"{option}={directory}: holds another run already; {how}, or choose another folder"
    return folder_problem(directory, option)


def folder_problem(directory: str, option: str) -> str | None:
    """Why files cannot be written below a folder, which need not exist yet, if so."""
    if not directory:
        return f"{option}=: must name a folder"
    if directory.startswith("~"):
        home = os.path.expanduser(directory)
        return f"{option}={directory}: ~ is not expanded; write {option}={home}"
    path = Path(directory).absolute()
    above = next(p for p in (path, *path.parents) if os.path.lexists(p))
    try:
        tempfile.TemporaryFile(dir=above).close()  # has no name; tried, as root ignores permissions
    except OSError:
        return f"{option}={directory}: {above} is not a writable folder"
    return None
