"""Atomic file writes: a file is complete or unchanged. Does not import torch."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

NUMBERS = re.compile(r"\[\n([^][{}\"]+)]")  # a list of numbers in JSON, put on one line


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(content, indent=2) + "\n"
    text = NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path, *, keep: Path | None = None) -> Iterator[IO[bytes]]:
    """A binary file that replaces `path` once it is complete and on the disk.

    Raises OSError with the name of the file, which is then unchanged.

    Args:
        keep: New name of the previous file; None: it is deleted.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename2 is None:
            error.filename = str(path)
        raise
    if os.name == "posix":  # the directory entry, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
