"""What TensorBoard's pictures, histograms, curves and all cost of a run's time.

    python scripts/benchmark_tensorboard.py --epochs 10 backend=im2col

One run with the default recipe and everything on; the seconds spent in each hook of
`cnntrain.training.Insights`, and their share of all. Two runs, one with and one without, differ by
more than that from noise alone; so the clock stands inside.
"""

import argparse
import logging
import tempfile
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path
from typing import Any

from cnntrain.config import compose
from cnntrain.training import Insights, train

ONCE = ("begin", "on_train_batch_start", "on_test_end")
EVERY_EPOCH = ("on_before_optimizer_step", "on_validation_epoch_end", "on_train_epoch_end")


def timed(seconds: dict[str, float]) -> None:
    """Let every hook add up the time that it takes."""
    for name in (*ONCE, *EVERY_EPOCH):
        hook = getattr(Insights, name)

        @wraps(hook)
        def called(*arguments: Any, hook: Any = hook, name: str = name) -> Any:
            begun = time.perf_counter()
            try:
                return hook(*arguments)
            finally:
                seconds[name] += time.perf_counter() - begun

        setattr(Insights, name, called)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    logging.getLogger("cnntrain").setLevel(logging.WARNING)
    seconds: dict[str, float] = defaultdict(float)
    timed(seconds)
    options = [
        "trainer=cpu",
        "trainer.progress_bar=false",
        f"trainer.max_epochs={arguments.epochs}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        result = train(compose([*options, *arguments.overrides]), Path(folder) / "run")
    for names, what in ((ONCE, "once"), (EVERY_EPOCH, "in all epochs")):
        for name in names:
            print(f"{name:28}{seconds[name] * 1000:9.1f} ms {what}")
    whole = sum(seconds.values())
    print(f"{whole:.2f} s of {result.seconds:.1f} s: {whole / result.seconds:.2%}")


if __name__ == "__main__":
    main()
