"""The cache folder: checked at every start, filled from the first source that has the files.

Any number of processes may start at once on an empty or damaged folder: one fetches under a
lock, the others wait and find the files. A file has its final name only when it is complete.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import BaseFileLock, FileLock, Timeout

from cnntrain.data.idx import DataError, IdxFile, read_bytes
from cnntrain.data.sources import PACKAGE, SOURCES, SourceError

log = logging.getLogger(__name__)

LOCK = ".lock"


def obtain(root: Path, files: Sequence[IdxFile], wanted: Sequence[IdxFile]) -> list[bytes]:
    """The content of the `wanted` files, from the cache folder or fetched into it.

    Only `wanted` files are opened; of the other `files` the length is looked at, so that all
    come together while the test set stays closed until it is asked for.

    Args:
        root: The cache folder; made if missing. It may be read-only once it is complete.
        files: All files of the data set.
        wanted: Those of them to read.

    Raises:
        DataError: No source has the files, or the folder cannot be written.
    """
    log.info("FashionMNIST: cache folder %s", root)
    contents = _read(root, files, wanted)
    if contents is None:
        with _writing(root):
            root.mkdir(parents=True, exist_ok=True)
            lock = _locked(root)
        with lock:
            # Another process may have fetched them while this one waited.
            contents = _read(root, files, wanted)
            if contents is None:
                _fill(root, files)
                contents = _read(root, files, wanted)
    if contents is None:
        raise DataError(f"FashionMNIST: {root}: changed or unreadable while in use; start again")
    return contents


def _read(root: Path, files: Sequence[IdxFile], wanted: Sequence[IdxFile]) -> list[bytes] | None:
    """The content of the `wanted` files, or None if any of `files` is missing or wrong."""
    try:
        if any((root / file.name).stat().st_size != file.size for file in files):
            return None
        contents = [(root / file.name).read_bytes() for file in wanted]
    except OSError:
        return None
    if any(file.difference(data) for file, data in zip(wanted, contents, strict=True)):
        return None
    return contents


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turns what the operating system says about the cache folder into what to do about it."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"FashionMNIST: cannot write the cache folder {root} ({error.strerror or error}): "
            "choose another with data.root=<folder>, or train on data=fashion_mnist_mini"
        ) from error


def _locked(root: Path) -> AbstractContextManager[BaseFileLock]:
    """The folder's lock, acquired."""
    lock = FileLock(root / LOCK)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log.info("FashionMNIST: waiting for another process that fills %s", root)
        return lock.acquire()


def _fill(root: Path, files: Sequence[IdxFile]) -> None:
    """Fetches what is missing or wrong; DataError says what was tried and what to do."""
    problems = {file: problem for file in files if (problem := _problem(root, file))}
    known = [f"{file.name} {problem}" for file, problem in problems.items()]
    reasons = [f"cache folder {root}: {', '.join(known)}"]
    missing, reason = _take(root, root, list(problems))  # gzipped files that a person put there
    if reason:
        reasons.append(reason)
    for source in SOURCES:
        if not missing:
            break
        log.info("FashionMNIST: trying %s", source.name)
        try:
            with TemporaryDirectory(prefix="cnntrain-", ignore_cleanup_errors=True) as scratch:
                missing, reason = _take(source.open(Path(scratch)), root, missing)
        except (SourceError, OSError) as error:
            reason = str(error)
        reasons.append(f"{source.name}: {reason}")
    if missing:
        raise DataError(
            "FashionMNIST: no source has all files. Tried:\n"
            + "".join(f"  {reason}\n" for reason in reasons)
            + f"Put the four files of Debian's package {PACKAGE} into {root}, "
            "or train on the set that comes with cnntrain: data=fashion_mnist_mini"
        )
    log.info("FashionMNIST: %s is complete", root)


def _problem(root: Path, file: IdxFile) -> str | None:
    """What is wrong with a file of the cache, if anything; a wrong one is named and set aside."""
    path = root / file.name
    try:
        problem = file.difference(path.read_bytes())
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        _set_aside(path, problem)
        return f"was set aside ({problem})"
    return None


def _set_aside(path: Path, problem: str) -> None:
    aside = path.with_name(path.name + ".bad")
    log.warning("FashionMNIST: %s: %s; set aside as %s", path, problem, aside.name)
    with _writing(path.parent):
        os.replace(path, aside)


def _take(folder: Path, root: Path, missing: Sequence[IdxFile]) -> tuple[list[IdxFile], str]:
    """Copies the `missing` files that `folder` has into the cache; what remains, and why."""
    remaining, reasons = [], []
    for file in missing:
        names = [name for name in (file.name, f"{file.name}.gz") if (folder / name).is_file()]
        if not names:
            remaining.append(file)
            if folder != root:
                reasons.append(f"no {file.name}")
            continue
        path = folder / names[0]
        try:
            data = read_bytes(path)
            problem = file.difference(data)
        except (DataError, OSError) as error:
            problem = str(error).removeprefix(f"{path}: ")
        if problem is None:
            _write(root / file.name, data)
            continue
        remaining.append(file)
        reasons.append(f"{path}: {problem}")
        if folder == root:
            _set_aside(path, problem)
    return remaining, "; ".join(reasons)


def _write(path: Path, data: bytes) -> None:
    """Writes a file that has its name only when its bytes are on the disk."""
    part = path.with_name(f".{path.name}.part")
    with _writing(path.parent):
        try:
            with part.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
