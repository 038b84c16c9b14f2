"""Files that are written whole or not at all. Imports no torch: a report writes files, too."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

NUMBERS = re.compile(r"\[\n([^][{}\"]+)]")  # a list of them in JSON: it goes on one line


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write all of a file or nothing: readers never see half of it, nor does a crash leave half."""
    with replacing(path) as file:
        text = json.dumps(content, indent=2) + "\n"
        text = NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
        file.write(text.encode())


@contextmanager
def replacing(path: Path, *, keep: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write that gets its name, in place of any other, when all of it is on the disk.

    The file that was there is lost, or renamed to `keep`. Raises OSError, with the file's name,
    and leaves what was there.
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
    if os.name == "posix":  # the name, too, has to be on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
