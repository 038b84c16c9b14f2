"""TensorBoard's HParams tab over a sweep's folder: one schema for all members."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnntrain.sweeps.collect import plain

FIRST = ("val/acc", "test/acc", "val/loss", "test/loss", "train/acc", "train/loss")


def write_schema(folder: Path, over: dict[str, Sequence[Any]]) -> None:
    """An event file that lays the tab's columns down: the options that vary, and the metrics.

    Each member's own event file has its values. Without a schema TensorBoard would show every
    option of every member, and every scalar as a metric.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams import api
    from tensorboard.plugins.hparams.summary_v2 import hparams_config_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    old = list(folder.glob("events.out.tfevents.*"))
    columns = [api.HParam(option, _domain(values)) for option, values in over.items()]
    metrics = [api.Metric(name, display_name=name) for name in FIRST]
    writer = EventFileWriter(str(folder), filename_suffix=".hparams")
    writer.add_event(Event(summary=hparams_config_pb(columns, metrics)))
    writer.close()
    for file in old:  # of a smaller schema
        file.unlink()


def _domain(values: Sequence[Any]) -> Any:
    """Numbers as an interval, which the tab can be sorted and cut by; anything else as it is."""
    from tensorboard.plugins.hparams import api

    if not _numeric(values):
        return api.Discrete([cell(value, values) for value in values], dtype=str)
    return api.RealInterval(float(min(values)), float(max(values)))


def cell(value: Any, values: Sequence[Any]) -> Any:
    """A member's value in a column that has these: one type in all of it."""
    return value if _numeric(values) else plain(value)


def _numeric(values: Sequence[Any]) -> bool:
    return bool(values) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
    )
