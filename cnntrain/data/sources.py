"""Where FashionMNIST's four files come from when the cache folder does not have them.

Each source is a function that gets an empty scratch folder and returns a folder that holds idx
files, plain or gzipped. What they hold is checked by the caller, so none has to be trusted.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"

# In seconds. A source that does not answer has to give way to the next one.
TORCHVISION_TIMEOUT = 600
APT_UPDATE_TIMEOUT = 300
APT_DOWNLOAD_TIMEOUT = 600
UNPACK_TIMEOUT = 120

# A process of its own bounds what a timeout of sockets does not (name lookups, a trickling
# server), keeps this process's socket default alone, and its progress bars out of sight.
TORCHVISION_DOWNLOAD = """\
import socket, sys
socket.setdefaulttimeout(10)
from torchvision.datasets import FashionMNIST
FashionMNIST(sys.argv[1], download=True)
"""


class SourceError(RuntimeError):
    """A source has nothing to give; the message is the reason, in one line."""


class Source(NamedTuple):
    """A place to get the files from.

    Args:
        name: What messages call it.
        open: Maps an empty scratch folder to the folder with the files, or raises SourceError.
    """

    name: str
    open: Callable[[Path], Path]


def system_folder(scratch: Path) -> Path:
    """The folder into which Debian's package installs the files."""
    if not SYSTEM_FOLDER.is_dir():
        raise SourceError("no such folder")
    return SYSTEM_FOLDER


def torchvision_download(scratch: Path) -> Path:
    """torchvision's own download."""
    command = [sys.executable, "-c", TORCHVISION_DOWNLOAD, str(scratch)]
    _run(command, "the download", TORCHVISION_TIMEOUT, scratch)
    return scratch / "FashionMNIST" / "raw"


def debian_archive(scratch: Path) -> Path:
    """Debian's package, downloaded and unpacked with private folders and no root rights."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise SourceError(f"{program} is not installed")
    lists, cache = scratch / "lists", scratch / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    apt = [
        "apt-get",
        *("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"),
        *("-o", "Acquire::Languages=none", "-o", "Acquire::Retries=1"),
        *("-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20"),
        # Root's apt-get hands downloads to a user who may not enter the private folders.
        *("-o", "APT::Sandbox::User=root"),
    ]
    # One dead entry among the machine's package sources fails the update and is no obstacle:
    # only the download decides, and its error comes with the update's.
    try:
        _run([*apt, "update"], "apt-get update", APT_UPDATE_TIMEOUT, scratch)
        warning = ""
    except SourceError as error:
        warning = f" (after {error})"
    try:
        _run([*apt, "download", PACKAGE], "apt-get download", APT_DOWNLOAD_TIMEOUT, scratch)
    except SourceError as error:
        raise SourceError(f"{error}{warning}") from error
    packages = sorted(scratch.glob(f"{PACKAGE}*.deb"))
    if not packages:
        raise SourceError("apt-get download left no package")
    unpacked = scratch / "unpacked"
    unpack = ["dpkg-deb", "-x", str(packages[0]), str(unpacked)]
    _run(unpack, "dpkg-deb", UNPACK_TIMEOUT, scratch)
    return unpacked / SYSTEM_FOLDER.relative_to("/")


def _run(command: list[str], what: str, timeout: float, folder: Path) -> None:
    """Runs a program in `folder`; SourceError with its last words unless it ends well in time."""
    # Output goes to a file: waiting on a pipe would wait for every process that inherited it.
    log = folder / "log"
    with log.open("wb") as output:
        try:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                cwd=folder,
                env={**os.environ, "LC_ALL": "C"},
            ).returncode
        except subprocess.TimeoutExpired:
            raise SourceError(f"{what}: no end after {timeout:g} s") from None
        except OSError as error:
            raise SourceError(f"{what}: {error.strerror or error}") from error
    if status < 0:
        raise SourceError(f"{what}: ended by {signal.Signals(-status).name}")
    if status != 0:
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        ]
        lines = [line for line in lines if line] or [f"exit code {status}"]
        errors = [line for line in lines if line.startswith("E: ")] or lines
        raise SourceError(f"{what}: {errors[-1]}")


SOURCES = (
    Source(f"system folder {SYSTEM_FOLDER}", system_folder),
    Source("torchvision's download", torchvision_download),
    Source(f"Debian's archive (apt-get download {PACKAGE})", debian_archive),
)
