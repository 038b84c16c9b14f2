"""Checkpoint files: atomic, with a SHA-256 checksum, loaded without executing code.

A file is what `torch.save` writes, a zip archive, with the checksum of all bytes before as its
comment. So `torch.load` and any zip program can read it.
"""

import hashlib
import io
import logging
import pickle
import struct
from pathlib import Path
from typing import Any

import torch

import cnntrain
from cnntrain.atomic import replacing
from cnntrain.terminal import NoTraceback

log = logging.getLogger(__name__)

FORMAT = 1  # of the content; to be raised when earlier versions cannot read it
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"

Content = dict[str, Any]

_MARK = b"cnntrain sha256 "
_COMMENT = len(_MARK) + 64
_END_OF_ARCHIVE = b"PK\x05\x06"  # followed by 16 bytes and the comment's length, a 16-bit integer


class CheckpointError(NoTraceback, Exception):
    """A checkpoint cannot be used; the message names the file and the reason, in one line."""


class DamagedError(CheckpointError):
    """A file is missing, truncated or altered."""


def write(path: Path, content: Content, *, keep: Path | None = None) -> None:
    """Write a checkpoint atomically, replacing the file that is there or renaming it to `keep`.

    Raises:
        OSError: It cannot be written; the file that was there stays.
    """
    buffer = io.BytesIO()
    torch.save({**content, "format": FORMAT, "cnntrain_version": cnntrain.__version__}, buffer)
    archive = buffer.getvalue()
    assert archive[-22:-18] == _END_OF_ARCHIVE, "not what torch.save wrote in earlier versions"
    body = archive[:-2] + struct.pack("<H", _COMMENT)
    with replacing(path, keep=keep) as file:
        file.write(body + _MARK + hashlib.sha256(body).hexdigest().encode())


def read(path: Path) -> Content:
    """The content of a checkpoint, on the CPU.

    Raises:
        DamagedError: The file is missing, or not as it was written.
        CheckpointError: It holds Python objects, which could run code, or has a newer format.
        OSError: It cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{path}: is missing") from None
    body, comment = data[:-_COMMENT], data[-_COMMENT:]
    if not comment.startswith(_MARK):
        raise DamagedError(f"{path}: is cut off, or was not written by cnntrain: no checksum")
    if comment[len(_MARK) :] != hashlib.sha256(body).hexdigest().encode():
        raise DamagedError(f"{path}: is damaged: its checksum is wrong")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        problem = "holds Python objects, which could run code; only plain containers are loaded"
        raise CheckpointError(f"{path}: {problem}") from None
    if content["format"] > FORMAT:
        version = content["cnntrain_version"]
        raise CheckpointError(f"{path}: was written by cnntrain {version}; use that or a newer one")
    return content


def newest(folder: Path) -> tuple[Path, Content] | None:
    """The newest intact checkpoint in a folder `checkpoints`, or None.

    A damaged one is renamed, with a warning, so that it never replaces the one before it. Raises as
    `read` does for any other problem.
    """
    if not any(folder.glob("*.ckpt*")):
        return None
    for path, before in ((folder / LAST, folder / PREVIOUS), (folder / PREVIOUS, None)):
        try:
            content = read(path)
            if "position" in content:
                return path, content
            problem = f"{path}: holds weights only"  # a copy of best.ckpt
        except DamagedError as error:
            problem = str(error)
        if path.exists():
            renamed = path.replace(path.with_name(f"{path.name}.damaged"))
            problem += f" (renamed to {renamed.name})"
        then = f"the one before it is used, {before}" if before else "starting from the beginning"
        log.warning(f"{problem}; {then}")
    return None
