"""Speedup of a parallel sweep, and the overhead of a sweep per member.

    python scripts/benchmark_sweep.py --rounds 3 --members 16 --processes 2

The same command runs alternately on Hydra's basic launcher and on joblib's processes; the wall time
of the whole command is measured. The overhead is the time from the end of one member's training to
the start of the next one's in the sequential runs. Compare ratios only: machines differ.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "train.py"


def sweep(folder: Path, members: int, epochs: int, *options: str) -> float:
    """Seconds of a sweep over seeds, in `folder`."""
    command = [
        *(sys.executable, str(TRAIN), "-m", f"seed=range({members})", "data=fashion_mnist_mini"),
        *(f"trainer.max_epochs={epochs}", "trainer=cpu", f"hydra.sweep.dir={folder}", *options),
    ]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def gaps(folder: Path) -> list[float]:
    """Seconds between the end of each member's training and the start of the next one's."""
    spans = []
    for file in folder.glob("*/result.json"):
        ended, seconds = file.stat().st_mtime, json.loads(file.read_text())["timings"]["seconds"]
        spans.append((ended - seconds, ended))
    spans.sort()
    return [after[0] - before[1] for before, after in itertools.pairwise(spans)]


def own(folder: Path) -> list[float]:
    """Seconds of each member's own training."""
    results = [json.loads(file.read_text()) for file in folder.glob("*/result.json")]
    return [result["timings"]["seconds"] for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20, help="of each member, on the small data")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    parallel = ("hydra/launcher=joblib", f"hydra.launcher.n_jobs={arguments.processes}")
    ratios, added, member = [], [], []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            one, many = Path(scratch) / "one", Path(scratch) / "many"
            alone = sweep(one, arguments.members, arguments.epochs)
            together = sweep(many, arguments.members, arguments.epochs, *parallel)
            ratios.append(alone / together)
            added += gaps(one)
            member += own(one)
        print(
            f"round {number + 1}: one after another {alone:.1f} s, "
            f"{arguments.processes} processes {together:.1f} s, ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(
        f"{arguments.members} members of {statistics.median(member):.1f} s: "
        f"{arguments.processes} processes are {statistics.median(ratios):.2f} times as fast "
        f"({min(ratios):.2f} to {max(ratios):.2f})\n"
        f"the sweep adds {statistics.median(added):.2f} s to a member "
        f"({min(added):.2f} to {max(added):.2f})"
    )


if __name__ == "__main__":
    main()
