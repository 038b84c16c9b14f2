"""Names of the metrics of a run, and whether more or less of each is better. Imports no torch."""

from typing import Literal, get_args

# Columns of metrics.csv.
EPOCH_METRICS = "train/loss", "train/acc", "val/loss", "val/acc", "val/balanced_acc", "val/macro_f1"
Monitored = Literal[
    "val/acc", "val/loss", "train/acc", "train/loss", "val/balanced_acc", "val/macro_f1"
]
Tested = Literal["test/acc", "test/loss", "test/balanced_acc", "test/macro_f1"]
Metric = Literal[Monitored, Tested]
METRICS: tuple[str, ...] = get_args(Metric)


def higher_is_better(metric: str) -> bool:
    """False for a loss, in nats; True for all others, which are shares from 0 to 1."""
    return not metric.endswith("loss")
