"""Resume of runs with one damaged file in the run directory or the data cache."""

import gzip
import hashlib
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

from cnntrain.data import fashion_mnist
from cnntrain.training.checkpoints import Checkpoints
from torturing.runs import STATEFUL, before_call, differences, facts, finish, launch, record

SHORT = [*STATEFUL, "trainer.max_epochs=3", "+trainer.limit_train_batches=7"]
record_once = cache(record)
FROM_CACHE = [*SHORT, "data=fashion_mnist", "data.val_size=500"]

# Runs to resume, each interrupted right before a call of a function.
Interruption = tuple[Any, str, int, int]  # owner and name of the function, nth call, signal
STATES: dict[str, Interruption] = {
    "in an epoch": (Checkpoints, "on_train_batch_end", 10, signal.SIGTERM),
    "in validation": (Checkpoints, "on_validation_batch_end", 4, signal.SIGTERM),
    "between epochs": (Checkpoints, "on_train_epoch_end", 2, signal.SIGTERM),
    "in a rename": (Path, "replace", 10, signal.SIGKILL),
}
OTHER_RUNS = {
    "seed": ["seed=5"],
    "config": ["optimizer.lr=0.004"],
    "architecture": ["model=shallow"],
    "width": ["model.hidden=80"],
}


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([0, rng.randrange(len(data) + 1)])]


def _flip(data: bytes, rng: random.Random) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _overwrite(block: Callable[[random.Random, int], bytes]) -> Callable[..., bytes]:
    def overwrite(data: bytes, rng: random.Random) -> bytes:
        begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        return data[:begin] + block(rng, end - begin) + data[end:]

    return overwrite


CONTENT = {
    "cut off": _cut,
    "bits flipped": _flip,
    "zeros": _overwrite(lambda rng, length: bytes(length)),
    "random bytes": _overwrite(random.Random.randbytes),
}
KINDS = [*CONTENT, "deleted", "wrong kind", "stale part", "swapped", "a sibling's", "another run's"]


def damage(kind: str, path: Path, rng: random.Random, other: Path) -> set[str]:
    """Damage a file or folder in one of KINDS; the names of the damaged files.

    A kind that is not applicable, such as "swapped" for the only file of a folder, deletes it.
    `other` is the file of the same name in another run.
    """
    siblings = sorted(p for p in path.parent.iterdir() if p != path)
    if kind in CONTENT and path.is_file():
        path.write_bytes(CONTENT[kind](path.read_bytes(), rng))
    elif kind == "stale part":
        path.with_name(f".{path.name}.part").write_bytes(rng.randbytes(1000))
    elif kind in ("swapped", "a sibling's") and siblings:
        sibling = rng.choice(siblings)
        if kind == "swapped":
            temporary = path.with_name("temporary")
            path.rename(temporary)
            sibling.rename(path)
            temporary.rename(sibling)
            return {path.name, sibling.name}
        elif path.is_file() and sibling.is_file():
            shutil.copy(sibling, path)
    elif kind == "another run's" and other.is_file():
        shutil.copy(other, path)
    else:
        was_file = path.is_file()
        (Path.unlink if was_file else shutil.rmtree)(path)
        if kind == "wrong kind":
            (Path.mkdir if was_file else Path.touch)(path)
    return {path.name}


class IntactRuns:
    """Run directories and a data cache to copy and damage; a run is trained when first used."""

    def __init__(self, folder: Path):
        self.folder, self.cache = folder, folder / "cache"
        self.cache.mkdir()
        for packed in fashion_mnist.MINI_FOLDER.glob("*.gz"):
            (self.cache / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        cached = [*FROM_CACHE, f"data.root='{self.cache}'"]
        stopped = partial(use_mini_files, interruption=STATES["in an epoch"])
        self.runs: dict[str, tuple[list[str], Callable[[], object]]] = {
            "completed": (SHORT, int),
            "completed from cache": (cached, use_mini_files),
            "from cache": (cached, stopped),
            **{state: (SHORT, partial(before_call, *moment)) for state, moment in STATES.items()},
            **{f"other {name}": ([*SHORT, *more], int) for name, more in OTHER_RUNS.items()},
        }

    def directory(self, name: str) -> Path:
        directory, log = self.folder / name, self.folder / f"{name}.log"
        if not directory.exists():
            options, prepare = self.runs[name]
            code = finish(launch([*options, f"hydra.run.dir='{directory}'"], log, prepare=prepare))
            assert code in (0, -signal.SIGKILL, 128 + signal.SIGTERM), log.read_text()
        return directory


def use_mini_files(*, source: bool = True, interruption: Interruption | None = None) -> None:
    """Replace FashionMNIST by the files of the mini set in this process. With `source` they can be
    fetched again; with `interruption` the process sends itself a signal."""
    for packed in fashion_mnist.MINI_FOLDER.glob("*.gz"):
        content = gzip.decompress(packed.read_bytes())
        fashion_mnist.SIZES[packed.stem] = len(content)
        fashion_mnist.SHA256[packed.stem] = hashlib.sha256(content).hexdigest()
    fashion_mnist.FashionMNIST.train_size = fashion_mnist.FashionMNISTMini.train_size
    fashion_mnist.SOURCES.clear()
    if source:
        folder = fashion_mnist.MINI_FOLDER
        fashion_mnist.SOURCES["package"] = lambda name, scratch: folder / f"{name}.gz"
    if interruption:
        before_call(*interruption)


def trial(number: int, seed: int, intact: IntactRuns, folder: Path) -> tuple[str, str, str, str]:
    """Damage one file and resume: kind of damage, file, outcome, problem (or empty)."""
    rng = random.Random(f"{seed} {number}")
    state = rng.choice([*STATES, "completed", "from cache"])
    directory, log, root = folder / "run", folder / "run.log", folder / "cache"
    auto, other = ["resume=auto", f"hydra.run.dir='{directory}'"], intact.folder / "none"
    shutil.copytree(intact.directory(state), directory)
    prepare: Callable[[], object] = int
    if state == "from cache":
        shutil.copytree(intact.cache, root)
        target, kind = rng.choice(sorted(root.iterdir())), rng.choice(KINDS)
        prepare = partial(use_mini_files, source=rng.random() < 0.5)
        arguments = [*FROM_CACHE, f"data.root='{root}'", *auto]
    else:
        target, kind = rng.choice(sorted(directory.rglob("*"))), rng.choice(KINDS)
        another = f"other {rng.choice([*OTHER_RUNS])}"
        if kind == "another run's":
            other = intact.directory(another) / target.relative_to(directory)
        by_folder = [f"resume='{directory}'"]
        more = [*by_folder, "trainer.checkpoint_every_n_steps=2"]
        arguments = rng.choice([[*SHORT, *auto], by_folder, more])
    damaged = damage(kind, target, rng, other)
    name = re.sub(r"tfevents.*", "tfevents", target.name)
    fresh = state != "from cache" and rng.random() < 0.03
    code = finish(launch(arguments, log, prepare=prepare, fresh=fresh))
    expected = record_once(intact.directory("completed" + " from cache" * (state == "from cache")))
    outcome, problem = judge(code, log.read_text(), directory, damaged, expected)
    return kind, name, outcome, problem and f"{state}, {' '.join(arguments)}: {problem}"


def judge(
    code: int | None, text: str, directory: Path, damaged: set[str], expected: dict[str, Any]
) -> tuple[str, str]:
    """Outcome and problem (or empty) of a resumed run; `damaged` are names of files, `expected` is
    the record of the uninterrupted run."""
    if code is None:
        return "FAILED", "does not end"
    if "Traceback" in text:
        return "FAILED", f"a traceback\n{text}"
    if code in (1, 2):
        named = any(name in text for name in damaged)
        return ("rejected", "") if named else ("FAILED", f"{damaged} not named\n{text}")
    if code != 0:
        return "FAILED", f"exit code {code}\n{text}"
    if "already completed" in text:  # nothing else was read or changed
        metrics = expected["result"]["metrics"]
        shown = f"test accuracy   {metrics['test/acc']:.2%}   (loss {metrics['test/loss']:.4f}"
        same = shown in text and not list(differences(expected["result"], facts(directory)))
        return ("completed before", "") if same else ("FAILED", f"wrong numbers\n{text}")
    try:
        different = list(differences(expected, record(directory)))
    except Exception as error:
        return "FAILED", f"the record cannot be read: {error}\n{text}"
    if not different:
        return "recovered", ""
    events = any("tfevents" in name or name in ("curves", "train", "val") for name in damaged)
    if events and all(d.startswith("/tensorboard") for d in different):
        return "recovered but for TensorBoard", ""
    return "FAILED", f"{different}\n{text}"


def corrupt(
    folder: Path, numbers: Iterable[int], seed: int
) -> tuple[Counter[tuple[str, str, str]], list[str]]:
    """Run the trials of these numbers: counts of (kind, file, outcome), and problems. Directories
    of failed trials are kept in `folder`."""
    folder.mkdir(parents=True)
    intact = IntactRuns(folder)
    counts, problems = Counter[tuple[str, str, str]](), []
    for number in numbers:
        trial_folder = folder / f"trial {number}"
        trial_folder.mkdir()
        kind, file, outcome, problem = trial(number, seed, intact, trial_folder)
        counts[kind, file, outcome] += 1
        if problem:
            problems.append(f"--seed {seed} --only {number}: {file}, {kind}, {problem}")
        else:
            shutil.rmtree(trial_folder)
    return counts, problems
