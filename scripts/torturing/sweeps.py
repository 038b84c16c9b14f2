"""Sweeps and searches killed at random times: results must equal those of uninterrupted ones.

In turn, all processes, that of the sweep or that of a member are killed, or receive SIGINT or
SIGTERM.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "train.py"
TINY = ["data=fashion_mnist_mini", "trainer=cpu", "data.batch_size=32"]
TINY += ["+trainer.limit_train_batches=4", "tensorboard=scalars"]
SWEEPS = {
    "grid": [*TINY, "backend=native,im2col", "seed=0,1", "trainer.max_epochs=6"],
    "search": [*TINY, "search=lenet5_lr", "search.trials=12", "trainer.max_epochs=2"],
}


def kill_sweeps(overrides: list[str], folder: Path, kills: int, rng: random.Random) -> list[str]:
    """Kill each of SWEEPS so many times; problems, a line each."""
    problems = list[str]()
    for name, options in SWEEPS.items():
        command = [*options, f"sweep={name}", *overrides]
        uninterrupted, killed = folder / "uninterrupted", folder / "killed"
        started = time.monotonic()
        if code := _start(uninterrupted, command).wait():
            return [*problems, f"sweep {name}: exit code {code}"]
        seconds = time.monotonic() - started
        for number in range(kills):
            process = _start(killed, command)
            time.sleep(rng.uniform(0.1, 0.8) * seconds)
            kind = ("all", "sweep", "member", "SIGINT", "SIGTERM")[number % 5]
            if kind == "member":
                for member in _group(process.pid)[-1:]:
                    os.kill(member, signal.SIGKILL)
            elif process.poll() is None:
                signum = getattr(signal, kind, signal.SIGKILL)
                (os.kill if kind in ("sweep", "SIGTERM") else os.killpg)(process.pid, signum)
            code = process.wait()
            print(f"{number + 1:4}  sweep {name}: {kind}, exit code {code}", flush=True)
        if code := _start(killed, command).wait():
            problems.append(f"sweep {name}: exit code {code} after {kills} kills")
        if _rows(uninterrupted, name) != _rows(killed, name):
            problems.append(
                f"sweep {name}: results differ from the uninterrupted ones, see {killed}"
            )
    return problems


def _start(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(TRAIN), "-m", *command],
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _group(leader: int) -> list[int]:
    """The processes of a sweep, the newest last (Linux)."""
    found = subprocess.run(["pgrep", "-g", str(leader)], capture_output=True, text=True)
    return sorted(int(text) for text in found.stdout.split() if int(text) != leader)


def _rows(folder: Path, name: str) -> dict[str, dict[str, str]]:
    with (folder / "outputs/sweeps" / name / "sweep.csv").open(newline="") as file:
        return {row["directory"]: {**row, "seconds": ""} for row in csv.DictReader(file)}
