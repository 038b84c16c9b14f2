"""Benchmark of TensorBoard logging: the share of a run's time that its callback takes.

    python scripts/benchmark_tensorboard.py --epochs 10 backend=im2col

One run of the default recipe with everything logged. The time of each hook of
`cnntrain.training.Insights` is measured within the run, because the difference between a run with
and one without the callback is below the noise between runs.
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


def time_hooks(seconds: dict[str, float]) -> None:
    """Make every hook add its time to `seconds`."""
    for name in (*ONCE, *EVERY_EPOCH):
        hook = getattr(Insights, name)

        @wraps(hook)
        def called(*arguments: Any, hook: Any = hook, name: str = name) -> Any:
            start = time.perf_counter()
            try:
                return hook(*arguments)
            finally:
                seconds[name] += time.perf_counter() - start

        setattr(Insights, name, called)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    logging.getLogger("cnntrain").setLevel(logging.WARNING)
    seconds: dict[str, float] = defaultdict(float)
    time_hooks(seconds)
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
    total = sum(seconds.values())
    print(f"{total:.2f} s of {result.seconds:.1f} s: {total / result.seconds:.2%}")


if __name__ == "__main__":
    main()
