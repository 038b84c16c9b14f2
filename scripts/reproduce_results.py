"""Test accuracies in docs/results.md: each recipe with several seeds, as a sweep.

    python scripts/reproduce_results.py
    python scripts/reproduce_results.py --recipes lenet5_quick --seeds 3 --at-once 1

Recipes are chosen on validation images. Each run is tested with the weights of its last epoch, with
and without averaging over horizontal flips. The sweeps are outputs/sweeps/results_<recipe>; the
same command resumes them.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cnntrain.inference import evaluate
from cnntrain.inference.trained import load_trained
from cnntrain.sweeps.records import collect
from cnntrain.sweeps.tables import markdown_table, number
from cnntrain.training.run_directory import versions

TRAIN = Path(__file__).parents[1] / "train.py"
RECIPES = {
    "lenet5": ["experiment=lenet5"],
    "lenet5_quick": ["experiment=lenet5_quick"],
    "default": ["trainer.test_checkpoint=last"],
}


def sweep(recipe: str, seeds: int, at_once: int, folder: Path, options: Sequence[str]) -> None:
    """Train the members that are not completed."""
    launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={at_once}"] if at_once > 1 else []
    command = [
        *(sys.executable, str(TRAIN), "-m", *RECIPES[recipe], *options),
        *(f"seed={','.join(map(str, range(seeds)))}", f"hydra.sweep.dir={folder}", *launcher),
    ]
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(done.returncode)


def row(recipe: str, folder: Path) -> list[str]:
    """The row of a recipe in the table."""
    members = collect(folder).members
    plain, flipped, validated, seconds = [], [], [], []
    for member in members:
        assert member.status == "completed", member
        trained = load_trained(member.directory, "last")
        assert trained.epoch == trained.cfg.trainer.max_epochs, trained
        assert trained.cfg.trainer.test_checkpoint == "last", trained
        plain.append(member.metrics["test/acc"])
        validated.append(member.metrics["val/acc"])
        flipped.append(evaluate(trained, tta="flip").accuracy)
        seconds.append(member.seconds or 0.0)
    parameters = sum(p.numel() for p in trained.network.parameters())
    return [
        f"`{' '.join(RECIPES[recipe])}`",
        *map(spread, (plain, flipped, validated)),
        str(len(members)),
        f"{parameters:,}",
        str(trained.cfg.trainer.max_epochs),
        f"{statistics.median(seconds):.0f} s",
    ]


def spread(shares: Sequence[float]) -> str:
    """`92.31 ± 0.12`, in %: mean and standard deviation."""
    mean = number("test/acc", statistics.mean(shares))
    if len(shares) == 1:
        return mean
    return f"{mean} ± {number('test/acc', statistics.stdev(shares))}"


HEAD = [
    "recipe",
    "test accuracy %",
    "with flips averaged %",
    "validation %",
    "n",
    "parameters",
    "epochs",
    "time, one thread",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="runs in parallel")
    parser.add_argument("--folder", type=Path, default=Path("outputs/sweeps"))
    parser.add_argument("options", nargs="*", help="of all runs, such as backend=im2col")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in the members
    rows = []
    for recipe in arguments.recipes:
        folder = arguments.folder / f"results_{recipe}"
        sweep(recipe, arguments.seeds, arguments.at_once, folder, arguments.options)
        rows.append(row(recipe, folder))
    table = markdown_table(HEAD, rows)
    file = arguments.folder / "results.md"
    file.write_text(table + "\n")
    used = ", ".join(f"{name} {versions()[name]}" for name in ("python", "torch", "lightning"))
    print(f"\n{table}\n\n{file}; {used}")


if __name__ == "__main__":
    main()
