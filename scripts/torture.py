"""Kill a training repeatedly and damage files of runs: results must not change.

    python scripts/torture.py --kills 100 --corruptions 200
    python scripts/torture.py --kills 0 --corruptions 0 --sweep-kills 20 --launcher joblib
    python scripts/torture.py --kills 0 --only 17      # one corruption of that seed once more

A training with all options is killed at random moments and resumed until it is completed: it must
then equal, bit for bit, an uninterrupted one. In copies of run directories, and of the data cache,
one file is damaged before they are resumed: the run must end as the uninterrupted one did, or be
rejected with a message that names the file. The exit code is 1 if anything failed; the runs that
failed stay in the folder.
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
from torturing.runs import EVERYTHING
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
    given = parser.parse_args()
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="torture-"))).absolute()
    dry_run(compose(EVERYTHING))  # imports what a training imports
    started, problems = time.monotonic(), list[str]()
    if given.kills:
        options = [*EVERYTHING, f"trainer.max_epochs={given.epochs}", f"backend={given.backend}"]
        counts, problems = kill(options, folder / "kills", given.kills, random.Random(given.seed))
        show(counts)
    if given.sweep_kills:
        typed = [f"hydra/launcher={given.launcher}"]
        folder_, random_ = folder / "sweeps", random.Random(given.seed)
        problems += kill_sweeps(typed, folder_, given.sweep_kills, random_)
    numbers = range(given.corruptions) if given.only is None else [given.only]
    if numbers:
        outcomes, failed = corrupt(folder / "corruptions", numbers, given.seed)
        problems += failed
        print(f"\n{outcomes.total()} corruptions")
        for part in (0, 1):
            tally: Counter[str] = Counter()
            for what, count in outcomes.items():
                tally[f"{what[part]}: {what[2]}"] += count
            show(tally)
    print(f"\n{len(problems)} problems, {time.monotonic() - started:.0f} s, {folder}")
    print("\n\n".join(problems))
    if not problems and given.folder is None:
        shutil.rmtree(folder)
    sys.exit(bool(problems))


def show(counts: Counter[str]) -> None:
    """A line for each, by name."""
    for what, count in sorted(counts.items()):
        print(f"{count:6}  {what}")


if __name__ == "__main__":
    main()
