"""Checkpoint files: written whole or not at all, checked when read, and never code.

A file is what `torch.save` writes of plain containers: a zip archive, whose comment holds the
SHA-256 sum of everything before it. So `torch.load` and any zip program read it as they are.
"""

import hashlib
import io
import logging
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

import cnntrain
from cnntrain.atomic import replacing
from cnntrain.terminal import NoTraceback

log = logging.getLogger(__name__)

FORMAT = 1  # of the content; to be raised when older versions could not make sense of it
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"

Content = dict[str, Any]

_MARK = b"cnntrain sha256 "
_COMMENT = len(_MARK) + 64
_END_OF_ARCHIVE = b"PK\x05\x06"  # then 16 bytes and the comment's length, a 16-bit integer


class CheckpointError(NoTraceback, Exception):
    """A checkpoint cannot be used; the message names the file and says why, in one line."""


class DamagedError(CheckpointError):
    """A file is missing, cut off or altered."""


def write(path: Path, content: Content, *, keep: Path | None = None) -> None:
    """Put a checkpoint in the place of the one that is there, once it is on the disk.

    `keep` is the name that the one before it is to have from then on.

    Raises:
        CheckpointError: It holds something else than plain containers, tensors and numbers.
        OSError: It cannot be written; the file that was there stays.
    """
    buffer = io.BytesIO()
    torch.save({**content, "format": FORMAT, "cnntrain_version": cnntrain.__version__}, buffer)
    data = _sealed(buffer.getvalue())
    with replacing(path, keep=keep) as file:
        file.write(data)


def read(path: Path) -> Content:
    """The content of a checkpoint, on the CPU.

    Raises:
        DamagedError: The file is missing, or not as it was written.
        CheckpointError: It holds Python objects, which could run code, or is of a newer format.
        OSError: It cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{path}: is missing") from None
    _check_seal(path, data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: holds Python objects, which could run code; only plain containers are loaded"
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: is no checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise CheckpointError(f"{path}: is no checkpoint of cnntrain")
    if content["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: was written by cnntrain {content.get('cnntrain_version')} in format "
            f"{content['format']}, this is {cnntrain.__version__} with format {FORMAT}; "
            "use that version or a newer one"
        )
    return content


def newest(folder: Path) -> tuple[Path, Content] | None:
    """The newest checkpoint in a run's folder `checkpoints` that is whole; None without one.

    A damaged one is named in a warning and set aside, so that it never takes the place of the
    good one before it. Raises as `read` does for what is not damage.
    """
    if not any(folder.glob("*.ckpt*")):
        return None  # none was ever written
    for path, before in ((folder / LAST, folder / PREVIOUS), (folder / PREVIOUS, None)):
        try:
            content = read(path)
            if "position" in content:
                return path, content
            said = f"{path}: holds weights only"  # a copy of best.ckpt
        except DamagedError as error:
            said = str(error)
        if path.exists():
            aside = path.with_name(f"{path.name}.damaged")
            path.replace(aside)
            said += f" (set aside as {aside.name})"
        then = f"the one before it is used, {before}" if before else "starting from the beginning"
        log.warning(f"{said}; {then}")
    return None


def _sealed(archive: bytes) -> bytes:
    """A zip archive without comment, with its own checksum as the comment."""
    assert archive[-22:-18] == _END_OF_ARCHIVE, "torch.save has always ended so"
    body = archive[:-2] + struct.pack("<H", _COMMENT)
    return body + _MARK + hashlib.sha256(body).hexdigest().encode()


def _check_seal(path: Path, data: bytes) -> None:
    body, comment = data[:-_COMMENT], data[-_COMMENT:]
    if not comment.startswith(_MARK):
        raise DamagedError(
            f"{path}: is cut off, or was not written by cnntrain: it has no checksum"
        )
    if comment[len(_MARK) :] != hashlib.sha256(body).hexdigest().encode():
        raise DamagedError(f"{path}: is damaged: its checksum is wrong")
