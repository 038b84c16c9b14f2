"""What the commands on a finished run have in common: paths as they are typed, a network that is
loaded once, errors on one line."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cnntrain.commands.app import start
from cnntrain.config import quoted
from cnntrain.config.errors import format_os_error

Loaded = TypeVar("Loaded")


def start_on_run(
    name: str,
    load: Callable[[DictConfig], Loaded],
    run: Callable[[DictConfig, Loaded], None],
    *,
    several: Sequence[str] = (),
) -> None:
    """As `start`: `load` is called while everything is checked, and `run` is given what it gave."""
    paths_quoted("run", "checkpoint", "root", "hydra.run.dir", several=several)
    loaded: list[Loaded] = []
    start(
        name,
        lambda cfg: run(cfg, loaded[-1]),
        dry_run=lambda cfg: loaded.append(load(cfg)),
        one="run",
    )


def paths_quoted(*options: str, several: Sequence[str] = ()) -> None:
    """Let these options have paths for values, as the shell gives them: spaces, commas, equal signs
    and brackets within them mean nothing to Hydra. Those in `several` have several, with commas
    between them.

    A quoted text and a list are as Hydra has them, unless there is a path of this name; so is an
    interpolation, always.
    """
    for i, text in enumerate(sys.argv[1:], start=1):
        name, _, value = text.partition("=")
        if "${" in value:
            continue
        there = os.path.exists(value)
        plain = value not in ("", "null", "???") and value[0] not in "'\"["
        if name in options and (plain or there):
            sys.argv[i] = f"{name}={quoted(value)}"
        elif name in several and (plain or there):
            values = [value] if there else value.split(",")
            sys.argv[i] = f"{name}=[{','.join(map(quoted, values))}]"


@contextlib.contextmanager
def telling_errors() -> Iterator[None]:
    """What is the matter with files, data or the network, said on one line; exit code 1. A folder
    that was made for what has not come goes, if it is empty."""
    try:
        yield
        return
    except OSError as error:
        said = format_os_error(error)
    except Exception as error:
        from cnntrain.data import DataError
        from cnntrain.inference import ExportError
        from cnntrain.training import CheckpointError

        if not isinstance(error, (CheckpointError, DataError, ExportError)):
            raise
        said = str(error)
    if HydraConfig.initialized():
        with contextlib.suppress(OSError):
            os.removedirs(HydraConfig.get().runtime.output_dir)
    print(f"cnntrain: {said}", file=sys.stderr)
    sys.exit(1)
