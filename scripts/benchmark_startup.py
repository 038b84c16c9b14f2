"""Benchmark of the start-up time: from the command to the first saved step, and import time.

    python scripts/benchmark_startup.py --rounds 7 backend=im2col

In turns, a process that only imports torch and Lightning, and a run until the checkpoint of its
first step is written; the data is cached. On a shared machine the lowest times mean most.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "train.py"


def import_seconds() -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import os, torch, lightning.pytorch; os._exit(0)"], check=True
    )
    return time.perf_counter() - started


def first_step_seconds(options: list[str]) -> float:
    """Seconds until the first step has written last.ckpt."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, str(TRAIN), f"hydra.run.dir={folder}/run", "trainer.max_epochs=1"),
            *("trainer.checkpoint_every_n_steps=1", "+trainer.limit_train_batches=1", *options),
        ]
        file = Path(folder) / "run" / "checkpoints" / "last.ckpt"
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not file.exists() and process.poll() is None:
            time.sleep(0.002)
        seconds = time.perf_counter() - started
        if process.wait():
            sys.exit(f"failed: {' '.join(command)}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("options", nargs="*", help="of the run")
    arguments = parser.parse_args()
    pairs = []
    for number in range(arguments.rounds + 1):
        pair = import_seconds(), first_step_seconds(arguments.options)
        if number:  # the first round reads the files from the disk
            pairs.append(pair)
            print("round {}: imports {:.2f} s, first step after {:.2f} s".format(number, *pair))
    imports, first = (min(column) for column in zip(*pairs, strict=True))
    difference = statistics.median(after - before for before, after in pairs)
    print(
        f"lowest: imports {imports:.2f} s, first step after {first:.2f} s, "
        f"{first - imports:.2f} s more; median of the differences {difference:.2f} s"
    )


if __name__ == "__main__":
    main()
