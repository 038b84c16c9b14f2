"""Robustness test: kill a training repeatedly and damage files of runs.

    python scripts/torture.py --kills 100 --corruptions 200
    python scripts/torture.py --kills 0 --corruptions 0 --sweep-kills 20 --launcher joblib
    python scripts/torture.py --kills 0 --only 17      # repeat one corruption

A training that uses all stateful options is killed at random times and resumed until it is
completed: it must then equal, bit for bit, an uninterrupted one. In copies of run directories, and
of the data cache, one file is damaged before they are resumed: the run must end as the
uninterrupted one did, or be rejected with a message that names the file. The exit code is 1 if
anything failed; the directories of failed runs are kept.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's other threads

from torturing.corruptions import corrupt
from torturing.kills import kill
from torturing.runs import STATEFUL
from torturing.sweeps import kill_sweeps

from cnntrain.config import compose
from cnntrain.training import dry_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--corruptions", type=int, default=200)
    parser.add_argument("--sweep-kills", type=int, default=0)
    parser.add_argument("--launcher", default="basic", help="of the sweeps: joblib, ray, ...")
    parser.add_argument("--only", type=int, help="number of the corruption to repeat alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20, help="of the training that is killed")
    parser.add_argument("--backend", default="native")
    parser.add_argument("--folder", type=Path, help="for all runs; a temporary one if not given")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="torture-"))).absolute()
    dry_run(compose(STATEFUL))  # imports what a training imports
    started, problems = time.monotonic(), list[str]()
    if arguments.kills:
        options = [
            *STATEFUL,
            f"trainer.max_epochs={arguments.epochs}",
            f"backend={arguments.backend}",
        ]
        counts, problems = kill(
            options, folder / "kills", arguments.kills, random.Random(arguments.seed)
        )
        show(counts)
    if arguments.sweep_kills:
        overrides = [f"hydra/launcher={arguments.launcher}"]
        folder_, random_ = folder / "sweeps", random.Random(arguments.seed)
        problems += kill_sweeps(overrides, folder_, arguments.sweep_kills, random_)
    numbers = range(arguments.corruptions) if arguments.only is None else [arguments.only]
    if numbers:
        outcomes, failures = corrupt(folder / "corruptions", numbers, arguments.seed)
        problems += failures
        print(f"\n{outcomes.total()} corruptions")
        for column in (0, 1):
            tally: Counter[str] = Counter()
            for what, count in outcomes.items():
                tally[f"{what[column]}: {what[2]}"] += count
            show(tally)
    print(f"\n{len(problems)} problems, {time.monotonic() - started:.0f} s, {folder}")
    print("\n\n".join(problems))
    if not problems and arguments.folder is None:
        shutil.rmtree(folder)
    sys.exit(bool(problems))


def show(counts: Counter[str]) -> None:
    """Print the counts, a line for each name."""
    for what, count in sorted(counts.items()):
        print(f"{count:6}  {what}")


if __name__ == "__main__":
    main()
