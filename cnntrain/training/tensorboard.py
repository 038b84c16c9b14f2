"""TensorBoard logger: one event file per run, which a resumed run continues."""

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.versions_pb2 import VersionDef
from tensorboard.compat.tensorflow_stub.errors import DataLossError
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from cnntrain.config import flat
from cnntrain.config.options import choice
from cnntrain.models import GraphNode

log = logging.getLogger(__name__)

METRICS = ["train/loss", "train/acc", "val/loss", "val/acc"]
GROUPS = ("model", "backend", "data", "optimizer", "scheduler", "loss", "trainer")
# The first columns of the HParams tab, which shows only five by default.
FIRST = {*GROUPS[:3], "optimizer.lr", "data.batch_size", "trainer.max_epochs", "seed"}
FRAME = 16  # bytes of a record besides its content: length and two checksums


class TensorBoard(Logger):
    """Writes the event file of a run. (Lightning's TensorBoardLogger cannot continue one.)

    Args:
        directory: The run directory.

    Attributes:
        experiment: The SummaryWriter, once `begin` or `resume` was called.
        first_epoch: Number of the first epoch in all records of the run: 1, or 0 in runs that
            early versions have begun.
    """

    experiment: SummaryWriter
    name = version = None

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory
        self.first_epoch = 1
        self.curves: dict[str, SummaryWriter] = {}

    def numbered(self, epoch: int) -> int:
        """The number under which Lightning's epoch `epoch`, counted from 0, is recorded."""
        return epoch + self.first_epoch

    def begin(self, cfg: DictConfig, labels: Mapping[str, Any] | None = None) -> None:
        """Start the event file with the hyperparameters for the HParams tab.

        Args:
            cfg: Config of the run.
            labels: Further hyperparameters, of a member of a sweep. The sweep then has written the
                columns of the tab, which TensorBoard reads from the first run that has them.
        """
        self.resume(0)
        metrics = dict.fromkeys(["test/acc", "val/acc", "test/loss", *METRICS], 0.0)
        columns, values, _ = hparams({**options(cfg), **(labels or {})}, metrics)
        metadata = columns.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(metadata.content)
        for column in content.experiment.hparam_infos:
            column.differs = column.name in FIRST  # TensorBoard sorts by this, then by name
        metadata.content = content.SerializeToString()
        for summary in [columns, values] if labels is None else [values]:
            self.events.add_summary(summary)

    def resume(self, position: int) -> None:
        """Continue the event file after its first `position` bytes of records.

        Later records are dropped, as the resumed run writes them again. The kept ones are copied to
        a new file: a running TensorBoard reads a file that was truncated as damaged.
        """
        # Of two files, the newer one is the incomplete copy of an interrupted `resume`.
        old = sorted(self.directory.glob("events.out.tfevents.*"), key=lambda f: f.stat().st_mtime)
        # With `purge_step`, a running TensorBoard discards what it has read from the old file.
        self.experiment = writer = SummaryWriter(str(self.directory), purge_step=0)
        self.events = cast(Any, writer.file_writer)
        self.experiment.flush()
        (self.path,) = {*self.directory.glob("events.out.tfevents.*")} - {*old}
        self.head = self.path.stat().st_size
        copied = 0
        for record in records(old[0]) if old and position else ():
            if copied >= position:
                break
            self.events.add_event(Event.FromString(record))
            copied += len(record) + FRAME
        if copied < position:
            log.warning(
                f"{old[0] if old else self.directory}: damaged or missing; TensorBoard has lost "
                "scalars from before the checkpoint, metrics.csv has every epoch"
            )
        self.experiment.flush()
        for file in old:
            file.unlink()

    @property
    def position(self) -> int:
        """Bytes of records written so far, without the head of the file."""
        self.experiment.flush()
        return self.path.stat().st_size - self.head

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for tag, value in metrics.items():
            self.experiment.add_scalar(tag, value, step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: `begin` has written them."""

    def curve(self, name: str, values: Mapping[str, float], epoch: int) -> None:
        """Log scalars as the run `curves/<name>`, since TensorBoard colours curves by run."""
        if name not in self.curves:
            # On resume, `purge_step` drops the epochs after the checkpoint.
            folder = self.directory / "curves" / name
            self.curves[name] = SummaryWriter(str(folder), purge_step=epoch)
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
        """Write the files of the projector.

        Args:
            points: Float (N, D).
            rows: A header and N rows of texts.
            images: A picture of each point, uint8 (N, 3, H, W).
            step: Names the folder of the files.
        """
        folder = self.directory / f"{step:05}"
        # The test of an interrupted run is repeated. A config that names damaged files would keep
        # the whole projector from loading.
        (self.directory / "projector_config.pbtxt").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        digits = 5 - math.ceil(math.log10(float(points.abs().max()) or 1))
        self.experiment.add_embedding(
            np.round(points.cpu().double().numpy(), digits),
            [[" ".join(text.split()) for text in row] for row in rows[1:]],
            (images + 0.5) / 255,  # not k / 255, as it rounds down
            step,
            "projector",
            rows[0],
        )

    def finalize(self, status: str) -> None:
        """Called after fitting; the file stays open for the test, and `end` closes it."""
        self.experiment.flush()

    def end(self, cfg: DictConfig) -> None:
        """Mark the run as finished in the HParams tab and close all files."""
        self.events.add_summary(hparams(options(cfg), {})[2])
        for writer in (self.experiment, *self.curves.values()):
            writer.close()


def records(path: Path) -> Iterator[bytes]:
    """The serialised events of a file, without its head, up to its end or the first damage."""
    try:
        for record in RawEventFileLoader(str(path)).Load():
            if Event.FromString(record).WhichOneof("what") not in ("file_version", "session_log"):
                yield record
    except DataLossError:
        return


def options(cfg: DictConfig) -> dict[str, Any]:
    """The config as a flat table for the HParams tab, with the chosen files of conf/ by name and
    booleans as text, which TensorBoard would show as 0 and 1."""
    found = {group: choice(group, cfg[group]) for group in GROUPS if group in cfg}
    for key, value in flat(cfg).items():
        if "._partial_" not in key and not key.startswith("tensorboard."):
            found[key] = value
    numbers_or_text = (str, int, float)
    return {
        key: value
        if isinstance(value, numbers_or_text) and not isinstance(value, bool)
        else json.dumps(value)
        for key, value in found.items()
    }
