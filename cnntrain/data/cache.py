"""The cache folder: checked at every start, filled from the first source that has the files.

Any number of processes may start at once on an empty or damaged folder: one fetches under a
lock, the others wait and find the files. A file has its final name only when it is complete.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import BaseFileLock, FileLock, Timeout

from cnntrain.data.idx import DataError, IdxFile
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
    try:
        return _read(root, files, wanted)
    except OSError as error:
        wrong = f"{Path(error.filename).name} ({error.strerror})"
    with _locked(root, purpose=f"fetch {wrong}"):
        with suppress(OSError):  # another process may have fetched them while this one waited
            return _read(root, files, wanted)
        _fill(root, files)
        try:
            return _read(root, files, wanted)
        except OSError as error:
            raise DataError(
                f"FashionMNIST: {error.filename}: {error.strerror}, though it was right a moment "
                "ago: another program or a failing disk changes it; choose another folder with "
                "data.root=<folder>"
            ) from error


def _read(root: Path, files: Sequence[IdxFile], wanted: Sequence[IdxFile]) -> list[bytes]:
    """The content of the `wanted` files; OSError if any of `files` is missing or wrong."""
    for file in files:
        file.look(root / file.name)
    return [file.read(root / file.name) for file in wanted]


@contextmanager
def _writing(root: Path, purpose: str) -> Iterator[None]:
    """Turns what the operating system says about the cache folder into what to do about it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename and Path(error.filename) != root:
            reason = f"{Path(error.filename).name}: {reason}"
        elif isinstance(error, FileExistsError):
            reason = "it is not a folder"
        raise DataError(
            f"FashionMNIST: cannot write the cache folder {root} ({reason}) to {purpose}: "
            "choose another with data.root=<folder>, or train on data=fashion_mnist_mini"
        ) from error


def _locked(root: Path, purpose: str) -> AbstractContextManager[BaseFileLock]:
    """The folder, made if need be, and its lock, acquired. Its holder's death releases it."""
    with _writing(root, purpose):
        root.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            (root / LOCK).rmdir()  # an empty folder in the lock's place; a lock is a file
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
            "FashionMNIST: no source has all files: put the four files of Debian's package "
            f"{PACKAGE} into {root}, or train on the set that comes with cnntrain, "
            "data=fashion_mnist_mini\nTried:" + "".join(f"\n  {reason}" for reason in reasons)
        )
    log.info("FashionMNIST: %s is complete", root)


def _problem(root: Path, file: IdxFile) -> str | None:
    """What is wrong with a file of the cache, if anything; a wrong one is named and set aside."""
    path = root / file.name
    try:
        file.look(path)
        file.read(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        _set_aside(path, str(error.strerror))
        return f"was set aside ({error.strerror})"
    return None


def _set_aside(path: Path, problem: str) -> None:
    """Renames a wrong file, in the place of an earlier one unless either is a folder."""
    names = (path.with_name(f"{path.name}.bad{n or ''}") for n in count())
    aside = next(
        name for name in names if not (os.path.lexists(name) and (name.is_dir() or path.is_dir()))
    )
    log.warning("FashionMNIST: %s: %s; set aside as %s", path, problem, aside.name)
    with _writing(path.parent, f"set {path.name} aside ({problem})"):
        os.replace(path, aside)


def _take(folder: Path, root: Path, missing: Sequence[IdxFile]) -> tuple[list[IdxFile], str]:
    """Copies the `missing` files that `folder` has into the cache; what remains, and why."""
    remaining, reasons = [], []
    for file in missing:
        paths = [folder / file.name, folder / f"{file.name}.gz"]
        paths = [path for path in paths if path.is_file()]
        for path in paths:
            try:
                data = file.read(path)
            except OSError as error:
                reasons.append(f"{path}: {error.strerror}")
                if folder == root:
                    _set_aside(path, str(error.strerror))
                continue
            _write(root / file.name, data)
            break
        else:
            remaining.append(file)
            if not paths and folder != root:
                reasons.append(f"no {file.name}")
    return remaining, "; ".join(reasons)


def _write(path: Path, data: bytes) -> None:
    """Writes a file that has its name only when its bytes are on the disk."""
    part = path.with_name(f".{path.name}.part")
    with _writing(path.parent, f"store {path.name}"):
        part.unlink(missing_ok=True)  # a killed process may have left it
        try:
            with part.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
