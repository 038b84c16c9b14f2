"""Shared parts of the commands on a finished run: quoting of paths, loading, error lines."""

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
    path_lists: Sequence[str] = (),
) -> None:
    """`start`, with `load` as its dry run; `run` receives what `load` returns."""
    quote_paths("run", "checkpoint", "root", "hydra.run.dir", path_lists=path_lists)
    loaded: list[Loaded] = []
    start(
        name,
        lambda cfg: run(cfg, loaded[-1]),
        dry_run=lambda cfg: loaded.append(load(cfg)),
        one="run",
    )


def quote_paths(*options: str, path_lists: Sequence[str] = ()) -> None:
    """Quote the paths in sys.argv, which may contain characters that Hydra's grammar interprets.

    Interpolations are not quoted, nor quoted texts and lists that are no existing path.

    Args:
        options: Options whose value is a path.
        path_lists: Options whose value is a list of paths, separated by commas.
    """
    for i, text in enumerate(sys.argv[1:], start=1):
        name, _, value = text.partition("=")
        exists = os.path.exists(value)
        raw = value not in ("", "null", "???") and value[0] not in "'\"["
        if "${" in value or not (raw or exists):
            continue
        if name in options:
            sys.argv[i] = f"{name}={quoted(value)}"
        elif name in path_lists:
            values = [value] if exists else value.split(",")
            sys.argv[i] = f"{name}=[{','.join(map(quoted, values))}]"


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Print errors of files, data and networks on one line; exit code 1.

    The output directory is removed if it is empty.
    """
    try:
        yield
        return
    except OSError as error:
        message = format_os_error(error)
    except Exception as error:
        from cnntrain.data import DataError
        from cnntrain.inference import ExportError
        from cnntrain.training import CheckpointError

        if not isinstance(error, (CheckpointError, DataError, ExportError)):
            raise
        message = str(error)
    if HydraConfig.initialized():
        with contextlib.suppress(OSError):
            os.removedirs(HydraConfig.get().runtime.output_dir)
    print(f"cnntrain: {message}", file=sys.stderr)
    sys.exit(1)
