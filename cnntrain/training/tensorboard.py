"""TensorBoard: one event stream at the root of the run directory, continued on resume."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from google.protobuf.text_format import MessageToString
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.versions_pb2 import VersionDef
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
from tensorboard.compat.tensorflow_stub.errors import DataLossError
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from cnntrain.atomic import replacing
from cnntrain.config import flat
from cnntrain.config.choices import choice
from cnntrain.models import GraphNode
from cnntrain.pictures import Picture, grid, png

log = logging.getLogger(__name__)

METRICS = ["train/loss", "train/acc", "val/loss", "val/acc"]
GROUPS = ("model", "backend", "data", "optimizer", "scheduler", "loss", "trainer")
# Columns of the HParams tab that come first; it shows five until more are chosen.
FIRST = {*GROUPS[:3], "optimizer.lr", "data.batch_size", "trainer.max_epochs", "seed"}
BUCKETS = 64  # of a histogram
FRAME = 16  # bytes of a record beside its content: length, two checksums


# TensorBoard's own is written in Python: 14 ms for 100 kB, in which no other Python runs.
pywrap_tensorflow.crc32c = google_crc32c.value


class TensorBoard(TensorBoardLogger):
    """Lightning's logger, writing into one file that is whole after a resume, too."""

    def __init__(self, directory: Path):
        super().__init__(directory, name="", version="", default_hp_metric=False)
        self.directory = directory
        self.first_epoch = 1  # 0 in a run that an earlier version has begun: it keeps its numbers
        self.curves: dict[str, SummaryWriter] = {}

    def numbered(self, epoch: int) -> int:
        """The number of an epoch in metrics.csv, result.json and TensorBoard; Lightning's own count
        from 0."""
        return epoch + self.first_epoch

    def begin(self, cfg: DictConfig, labels: Mapping[str, Any] | None = None) -> None:
        """Start the stream: the HParams tab has the options now, the metrics as they are logged
        under their names.

        With `labels` these stand beside the options, and which columns there are is left to the
        sweep: TensorBoard takes them from the first run that it finds to say so.
        Not `log_hyperparams`, which would log the metrics once more, at step 0.
        """
        self.go_on(0)
        metrics = dict.fromkeys(["test/acc", "val/acc", "test/loss", *METRICS], 0.0)
        columns, values, _ = hparams({**options(cfg), **(labels or {})}, metrics)
        about = columns.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(about.content)
        for column in content.experiment.hparam_infos:
            column.differs = column.name in FIRST  # TensorBoard sorts by this, then by name
        about.content = content.SerializeToString()
        for summary in [columns, values] if labels is None else [values]:
            self.experiment.file_writer.add_summary(summary)

    def go_on(self, position: int) -> None:
        """Continue the stream from where `position` was asked for.

        What was written after that will be written again. A file that is cut under a reader's
        hands is damaged for it, so a new one takes over what remains of the old.
        """
        # If there are two, the process ended while it took over: the older one is whole.
        old = sorted(self.directory.glob("events.out.tfevents.*"), key=lambda f: f.stat().st_mtime)
        # Tells a TensorBoard that is running to forget what it has read of the old file.
        self._experiment = SummaryWriter(str(self.directory), purge_step=0)
        writer = self.experiment.file_writer.event_writer
        self.experiment.flush()
        files = set(self.directory.glob("events.out.tfevents.*"))
        (self.path,) = files - set(old)
        self.head = self.path.stat().st_size
        copied = 0
        for record in records(old[0]) if old and position else ():
            if copied >= position:
                break
            writer.add_event(Event.FromString(record))
            copied += len(record) + FRAME
        if copied < position:
            log.warning(
                f"{old[0] if old else self.directory}: damaged or missing; TensorBoard has lost "
                "scalars from before the checkpoint, metrics.csv has every epoch"
            )
        self.experiment.flush()
        for file in old:
            file.unlink()

    def curve(self, name: str, values: Mapping[str, float], epoch: int) -> None:
        """Log scalars in an event file below this one's directory, so that TensorBoard takes them
        for a run by itself: it has a colour for each run, and one for all lines of a run."""
        if name not in self.curves:
            # What another process has logged from this epoch on is forgotten.
            where = self.directory / "curves" / name
            self.curves[name] = SummaryWriter(str(where), purge_step=epoch)
        for tag, value in values.items():
            self.curves[name].add_scalar(tag, value, epoch)
        self.curves[name].flush()

    def picture(self, tag: str, picture: Picture, step: int) -> None:
        """Not `add_image`, whose PNG takes longer than the picture."""
        height, width, _ = picture.shape
        image = Summary.Image(height=height, width=width, colorspace=3)
        image.encoded_image_string = png(picture)
        value = Summary.Value(tag=tag, image=image)
        self.experiment.file_writer.add_summary(Summary(value=[value]), step)

    def graph(self, nodes: Sequence[GraphNode]) -> None:
        """Not `add_graph`, which follows a convolution into what it computes with."""
        graph = GraphDef(versions=VersionDef(producer=22))
        for node in nodes:
            made = graph.node.add(name=node.name, op=node.kind, input=node.inputs)
            shape = made.attr["_output_shapes"].list.shape.add()
            for size in (-1, *node.shape):
                shape.dim.add(size=size)
        event = Event(graph_def=graph.SerializeToString())
        self.experiment.file_writer.add_event(event)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Not `add_histogram`, which takes ten times as long.

        Numbers that are not finite have no histogram: where they come from is for others to say.
        """
        # On the CPU: CUDA counts in no order, which `deterministic` forbids.
        values = values.detach().float().flatten().cpu()
        low, high = float(values.min()), float(values.max())
        if not math.isfinite(low + high):
            return
        high = high if high > low else low + 1e-6
        counts = torch.histc(values, BUCKETS, low, high)
        limits = torch.linspace(low, high, BUCKETS + 1)[1:]
        self.experiment.add_histogram_raw(
            tag,
            min=low,
            max=high,
            num=values.numel(),
            sum=float(values.sum()),
            sum_squares=float(values.square().sum()),
            bucket_limits=limits.tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def embed(
        self,
        points: Tensor,
        header: Sequence[str],
        about: Sequence[Sequence[str]],
        images: Tensor,
    ) -> None:
        """Give the projector `points`, (N, D) with a picture each, uint8 (N, 3, H, W), and words.

        It reads files of its own. Not `add_embedding`, which names their folder by the step.
        """
        folder = self.directory / "projector"
        folder.mkdir(exist_ok=True)
        pointer = self.directory / "projector_config.pbtxt"
        pointer.unlink(missing_ok=True)  # one that names a damaged file ends the whole projector
        digits = 5 - math.ceil(math.log10(float(points.abs().max()) or 1))
        numbers = points.cpu().double().numpy().round(digits).tolist()
        words = [[" ".join(word.split()) for word in row] for row in (header, *about)]
        for name, rows in [("points", (map(str, row) for row in numbers)), ("words", words)]:
            lines = ("\t".join(row) + "\n" for row in rows)
            (folder / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
        sprite = grid(images, math.ceil(math.sqrt(len(images))))
        (folder / "images.png").write_bytes(png(sprite))
        config = ProjectorConfig()
        embedding = config.embeddings.add(tensor_name="penultimate layer, test images")
        embedding.tensor_path = f"{folder.name}/points.tsv"
        embedding.metadata_path = f"{folder.name}/words.tsv"
        embedding.sprite.image_path = f"{folder.name}/images.png"
        embedding.sprite.single_image_dim.extend([images.shape[3], images.shape[2]])
        with replacing(pointer) as file:
            file.write(MessageToString(config).encode())

    @property
    def position(self) -> int:
        """How much of the stream is written: bytes of records, heads of files left out."""
        self.experiment.flush()
        return self.path.stat().st_size - self.head

    def save(self) -> None:
        """Nothing beside the event file: the options are in .hydra/config.yaml."""

    def finalize(self, status: str) -> None:
        """Not closed after fitting: testing goes on in the same stream. `end` closes it."""
        if self._experiment is not None:
            self.experiment.flush()

    def end(self, cfg: DictConfig) -> None:
        """Mark the run as finished in the HParams tab, and close the stream."""
        self.experiment.file_writer.add_summary(hparams(options(cfg), {})[2])
        for writer in (self.experiment, *self.curves.values()):
            writer.close()


def records(path: Path) -> Iterator[bytes]:
    """The events of a file up to its end or to where it is damaged, those of its head left out."""
    try:
        for record in RawEventFileLoader(str(path)).Load():
            if Event.FromString(record).WhichOneof("what") not in ("file_version", "session_log"):
                yield record
    except DataLossError:
        return


def options(cfg: DictConfig) -> dict[str, Any]:
    """The config as one flat table for HParams, with the choices that were made by their names, and
    `true` as one would type it, not as 1."""
    left_out = ("._partial_", "tensorboard.")  # what is shown changes nothing
    found = {group: choice(group, cfg[group]) for group in GROUPS if group in cfg}
    found |= {k: v for k, v in flat(cfg).items() if not any(part in k for part in left_out)}
    plain = {
        k: isinstance(v, str | float | int) and v not in (True, False) for k, v in found.items()
    }
    return {k: v if plain[k] else json.dumps(v) for k, v in found.items()}
