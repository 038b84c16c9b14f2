"""TensorBoard's HParams tab over a sweep's folder: one schema for all members."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnntrain.sweeps.record import METRICS, plain


def write_schema(folder: Path, over: Mapping[str, Sequence[Any]]) -> None:
    """An event file that lays the tab's columns down: the options that vary, and the metrics.

    Each member's own event file has its values. Without a schema TensorBoard would show every
    option of every member, and every scalar as a metric.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def column(option: str, values: Sequence[Any]) -> api_pb2.HParamInfo:
        """Numbers as an interval, by which the tab sorts and cuts; anything else as it is."""
        if _numeric(values):
            found = api_pb2.HParamInfo(name=option, type=api_pb2.DATA_TYPE_FLOAT64)
            found.domain_interval.min_value = min(values)
            found.domain_interval.max_value = max(values)
        else:
            found = api_pb2.HParamInfo(name=option, type=api_pb2.DATA_TYPE_STRING)
            found.domain_discrete.extend(cell(value, values) for value in values)
        found.differs = len(values) > 1
        return found

    # Not by tensorboard's own functions for it, which want TensorFlow.
    experiment = api_pb2.Experiment(
        hparam_infos=[column(option, values) for option, values in over.items()],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=metric)) for metric in METRICS
        ],
    )
    content = plugin_data_pb2.HParamsPluginData(
        experiment=experiment, version=metadata.PLUGIN_DATA_VERSION
    )
    about = SummaryMetadata.PluginData(
        plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString()
    )
    value = Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=SummaryMetadata(plugin_data=about))
    old = list(folder.glob("events.out.tfevents.*"))
    writer = EventFileWriter(str(folder), filename_suffix=".hparams")
    writer.add_event(Event(summary=Summary(value=[value])))
    writer.close()
    for file in old:  # of a smaller schema
        file.unlink()


def cell(value: Any, values: Sequence[Any]) -> Any:
    """A member's value in a column that has these: one type in all of it."""
    return value if _numeric(values) else plain(value)


def _numeric(values: Sequence[Any]) -> bool:
    return bool(values) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
    )
