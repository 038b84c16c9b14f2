"""Start of trainings as processes, and comparison of their records."""

import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cnntrain.commands.train import main as train
from cnntrain.training import checkpoint_file

ROOT = Path(__file__).parents[2]
TIMEOUT = 60  # seconds

# Everything that has a state: shuffling, augmentation, dropout, one-cycle, accumulation (with an
# incomplete last window), moving average, clipping, early stopping.
STATEFUL = [
    "data=fashion_mnist_mini",
    "data.batch_size=100",
    "data.eval_batch_size=200",
    "data.hflip=0.5",
    "data.crop=2",
    "data.erase=0.3",
    "model=lenet5",
    "scheduler=one_cycle",
    "optimizer.lr=0.005",
    "seed=4",
    "trainer=cpu",
    "trainer.accumulate_grad_batches=2",
    "trainer.ema=0.9",
    "trainer.early_stopping=100",
    "trainer.gradient_clip_val=1.0",
    "trainer.checkpoint_every_n_steps=3",
    "trainer.log_every_n_steps=1",
    "trainer.progress_bar=false",
]


def launch(
    arguments: Sequence[str], log: Path, *, prepare: Callable[[], object] = int, fresh: bool = False
) -> int:
    """Start a training with its output in `log`; the process id.

    The process is a fork, which calls `prepare` first, or, with `fresh`, `python train.py`.
    """
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    try:
        if fresh:
            words = [sys.executable, str(ROOT / "train.py"), *arguments]
            redirected = [(os.POSIX_SPAWN_DUP2, output, fd) for fd in (1, 2)]
            return os.posix_spawn(sys.executable, words, os.environ, file_actions=redirected)
        sys.stdout.flush()
        return os.fork() or _become_training(arguments, output, prepare)
    finally:
        os.close(output)


def _become_training(
    arguments: Sequence[str], output: int, prepare: Callable[[], object]
) -> NoReturn:
    code: Any = 1
    gc.freeze()  # a collection would copy every page of what the parent has imported
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        random.seed()
        np.random.seed()  # noqa: NPY002
        torch.seed()
        prepare()
        sys.argv = ["train.py", *arguments]
        train()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def ended(pid: int, seconds: float = TIMEOUT) -> int | None:
    """The exit code, negative for a signal; None if the process is still running."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found or time.monotonic() >= until:
            return os.waitstatus_to_exitcode(status) if found else None
        time.sleep(0.001)


def finish(pid: int) -> int | None:
    """The exit code; None if the process had to be killed after TIMEOUT."""
    code = ended(pid)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return code


def before_call(owner: Any, name: str, number: int, signum: int) -> None:
    """Send this process a signal right before the nth call (`number`, from 1) of a function."""
    function, calls = getattr(owner, name), iter(range(1, sys.maxsize))

    @wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signum)
        return function(*args, **options)

    setattr(owner, name, called)


def record(directory: Path) -> dict[str, Any]:
    """Content of a run directory that must be bitwise equal in two equal runs."""
    last, best = (
        checkpoint_file.read(directory / f"checkpoints/{n}.ckpt") for n in ("last", "best")
    )
    unlimited = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    events = EventAccumulator(str(directory), size_guidance=unlimited).Reload()
    tags = events.Tags()
    other = ("callbacks", "config", "versions")  # differ: seconds, directory, checkpoint interval
    return {
        "last.ckpt": {name: value for name, value in last.items() if name not in other},
        "best.ckpt": {name: value for name, value in best.items() if name not in other},
        "metrics.csv": (directory / "metrics.csv").read_bytes(),
        "tensorboard": {
            "scalars": {
                tag: [(event.step, event.value) for event in events.Scalars(tag)]
                for tag in tags["scalars"]
                if not tag.startswith("wall_time/")
            },
            "images": {
                tag: [(image.step, image.encoded_image_string) for image in events.Images(tag)]
                for tag in tags["images"]
            },
            "histograms": {
                tag: [(event.step, event.histogram_value) for event in events.Histograms(tag)]
                for tag in tags["histograms"]
            },
            "curves": {
                tag: [
                    (event.step, event.tensor_proto.SerializeToString())
                    for event in events.Tensors(tag)
                ]
                for tag in tags["tensors"]
                if not tag.endswith("text_summary")
            },
        },
        "result": facts(directory),
    }


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Paths of the values in which two records differ in any bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        if not same_kind or a.numpy().tobytes() != b.numpy().tobytes():
            yield where
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            yield from differences(a.get(key), b.get(key), f"{where}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{where}/{i}")
    elif a != b and not (a != a and b != b):
        yield f"{where}: {a!r} != {b!r}"[:200]


def facts(directory: Path) -> dict[str, Any]:
    """The reproducible part of result.json; empty if the file is missing or damaged."""
    try:
        content = json.loads((directory / "result.json").read_bytes())
        return {key: content.get(key) for key in ("status", "metrics", "epochs", "tested_epoch")}
    except (OSError, ValueError, AttributeError):
        return {}
