"""How long it takes from a command to its first step, and what of that is importing libraries.

    python scripts/benchmark_startup.py --rounds 7 backend=im2col

In turns: a process that imports torch and Lightning and ends at once, and a run, up to the moment
when its first step has been made and saved; the data is in its cache. Machines are shared and
noisy: of the seconds, the lowest mean most.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "train.py"


def imports() -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import os, torch, lightning.pytorch; os._exit(0)"], check=True
    )
    return time.perf_counter() - started


def first_step(options: list[str]) -> float:
    """Seconds until last.ckpt is there, which the first step writes."""
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
            sys.exit(f"{' '.join(command)} has failed")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("options", nargs="*", help="of the run")
    arguments = parser.parse_args()
    pairs = []
    for number in range(arguments.rounds + 1):
        pairs.append((imports(), first_step(arguments.options)))
        if number == 0:
            pairs.clear()  # the first one has read the files from the disk
            continue
        print("round {}: imports {:.2f} s, first step after {:.2f} s".format(number, *pairs[-1]))
    bare, whole = (min(column) for column in zip(*pairs, strict=True))
    over = [after - before for before, after in pairs]
    print(
        f"lowest: imports {bare:.2f} s, first step after {whole:.2f} s, {whole - bare:.2f} s more; "
        f"median of the differences {statistics.median(over):.2f} s"
    )


if __name__ == "__main__":
    main()
