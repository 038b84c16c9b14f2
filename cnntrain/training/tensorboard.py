"""TensorBoard logger, whose event files a resumed run continues."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.versions_pb2 import VersionDef
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from cnntrain.config import flat
from cnntrain.config.options import choice
from cnntrain.metric_names import EPOCH_METRICS, METRICS
from cnntrain.models import GraphNode

GROUPS = ("model", "backend", "data", "optimizer", "scheduler", "loss", "trainer")
# The first columns of the HParams tab, which shows only five by default.
FIRST = {*GROUPS[:3], "optimizer.lr", "data.batch_size", "trainer.max_epochs", "seed"}
FILES = "events.out.tfevents.*"


class TensorBoard(Logger):
    """Writes the event files of a run. A resumed run continues in new ones, after truncating those
    of before to the checkpoint, which Lightning's TensorBoardLogger cannot do."""

    experiment: SummaryWriter  # once `begin` or `resume` was called
    name = version = None

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory
        self.curves: dict[str, SummaryWriter] = {}

    def begin(self, cfg: DictConfig, labels: Mapping[str, Any] | None = None) -> None:
        """Start an event file with the hyperparameters for the HParams tab.

        A member of a sweep has further ones, `labels`. The sweep then has written the columns of
        the tab, which TensorBoard reads from the first run that has them.
        """
        self.resume({})
        names = ["test/acc", "val/acc", "test/loss", *EPOCH_METRICS, *METRICS]
        metrics = dict.fromkeys(names, 0.0)
        columns, values, _ = hparams({**options(cfg), **(labels or {})}, metrics)
        metadata = columns.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(metadata.content)
        for column in content.experiment.hparam_infos:
            column.differs = column.name in FIRST  # TensorBoard sorts by this, then by name
        metadata.content = content.SerializeToString()
        for summary in [columns, values] if labels is None else [values]:
            self.events.add_summary(summary)

    def resume(self, sizes: Mapping[str, int]) -> None:
        """Start an event file, and truncate those before it to these `sizes`: the resumed run logs
        again what came after them."""
        for name, file in self._files().items():
            if not file.is_file():  # TensorBoard could not read it
                file.rename(file.with_name(file.name.replace("tfevents", "damaged")))
            elif name not in sizes:
                file.unlink()
            elif file.stat().st_size > sizes[name]:
                os.truncate(file, sizes[name])
        # TensorBoard reads files in the order of their names, which begin with the second.
        while any(f".{int(time.time())}." in name for name in sizes):
            time.sleep(0.05)
        self.experiment = SummaryWriter(str(self.directory))
        self.events = cast(Any, self.experiment.file_writer)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each event file, by its path in the run directory."""
        for writer in (self.experiment, *self.curves.values()):
            writer.flush()
        return {name: file.stat().st_size for name, file in self._files().items()}

    def _files(self) -> dict[str, Path]:
        files = [f for folder in ("", "curves/*/") for f in self.directory.glob(folder + FILES)]
        return {file.relative_to(self.directory).as_posix(): file for file in files}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for tag, value in metrics.items():
            self.experiment.add_scalar(tag, value, step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: `begin` has written them."""

    def curve(self, name: str, values: Mapping[str, float], epoch: int) -> None:
        """Log scalars as the run `curves/<name>`, since TensorBoard colours curves by run."""
        if name not in self.curves:
            self.curves[name] = SummaryWriter(str(self.directory / "curves" / name))
        for tag, value in values.items():
            self.curves[name].add_scalar(tag, value, epoch)
        self.curves[name].flush()

    def graph(self, nodes: Sequence[GraphNode]) -> None:
        """Log a graph of layers. `add_graph` would show the operators within each convolution."""
        graph = GraphDef(versions=VersionDef(producer=22))
        for node in nodes:
            added = graph.node.add(name=node.name, op=node.kind, input=node.inputs)
            shape = added.attr["_output_shapes"].list.shape.add()
            for size in (-1, *node.shape):
                shape.dim.add(size=size)
        self.events.add_event(Event(graph_def=graph.SerializeToString()))

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Log a histogram of 64 bins; of values with NaN or Inf, which have none, nothing."""
        if values.isfinite().all():
            self.experiment.add_histogram(tag, values.float(), step, bins=64)

    def embed(self, points: Tensor, rows: list[list[str]], images: Tensor, step: int) -> None:
        """Write the files of the projector for points (N, D): N `rows` of true and predicted class,
        `images` uint8 (N, 3, H, W); `step` names the folder."""
        # The test of an interrupted run is repeated. A config that names damaged files would keep
        # the whole projector from loading.
        (self.directory / "projector_config.pbtxt").unlink(missing_ok=True)
        shutil.rmtree(self.directory / f"{step:05}", ignore_errors=True)
        self.experiment.add_embedding(
            points.cpu(),
            [[" ".join(text.split()) for text in row] for row in rows],
            (images + 0.5) / 255,  # not k / 255, as it rounds down
            step,
            "projector",
            ["class", "predicted"],
        )

    def end(self, cfg: DictConfig) -> None:
        """Mark the run as finished in the HParams tab and close all files."""
        self.events.add_summary(hparams(options(cfg), {})[2])
        for writer in (self.experiment, *self.curves.values()):
            writer.close()


def options(cfg: DictConfig) -> dict[str, Any]:
    """The config as a flat table for the HParams tab, with the chosen files of conf/ by name and
    booleans as text, which TensorBoard would show as 0 and 1."""
    found = {group: choice(group, cfg[group]) for group in GROUPS if group in cfg}
    for key, value in flat(cfg).items():
        if "._partial_" not in key and not key.startswith("tensorboard."):
            found[key] = value
    kept = (str, int, float)
    return {key: v if type(v) in kept else json.dumps(v) for key, v in found.items()}
