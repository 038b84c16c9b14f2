"""TensorBoard content besides the epoch metrics: images, feature maps, histograms, PR curves."""

import logging
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveInt
from torch import Tensor, nn

from cnntrain import pictures
from cnntrain.data import ImageData
from cnntrain.models import layer_graph
from cnntrain.models.introspection import feature_maps, named_convolutions, penultimate_features
from cnntrain.training.metrics import Predictions
from cnntrain.training.run_directory import environment
from cnntrain.training.tensorboard import TensorBoard

log = logging.getLogger(__name__)

BATCH = 32  # training images shown
EXAMPLES = 4  # images whose feature maps are shown
CHANNELS = 16  # channels of a feature map shown
MISTAKES = 32  # misclassified images shown
POINTS, NUMBERS = 2000, 1_000_000  # limits of the projector: points, numbers in all points
SPRITE = 64  # pixels: longest side of an image in the projector
CURVES = 100  # above this number of classes there are no per-class curves

CHARTS = {"loss": ["Multiline", ["^loss$"]], "accuracy": ["Multiline", ["^acc$"]]}


class Insights(lightning.Callback):
    """Logs inputs, weights, feature maps and predictions to the TensorBoard of a run.

    Everything is computed from the validation images and the validated weights, once per epoch; for
    the test set the confusion matrix and mistakes are logged once, at the end.
    """

    def __init__(
        self,
        *,
        speed: bool = True,  # training images/s and the share of that time spent on loading batches
        text: bool = True,  # config and environment
        graph: bool = True,  # the layers
        batch: bool = True,  # images of the first training batch after augmentation
        kernels: bool = True,  # kernels of the first convolution
        features: bool = True,  # feature maps of all convolutions
        histograms: bool = True,  # weights, and gradients of the last step of an epoch
        classes: bool = True,  # accuracy per class
        confusion: bool = True,  # confusion matrix
        mistakes: bool = True,  # the most confident misclassifications
        pr_curves: bool = True,  # precision-recall curve per class
        embedding: bool = True,  # inputs of the last layer for 2,000 test images, in the projector
        charts: bool = True,  # training and validation curves in one chart
        # Epochs between images, histograms and PR curves, which also follow the last of max_epochs.
        # None: after epochs 1, 2, 4, 8, ..., since TensorBoard keeps only ten images per tag.
        every_n_epochs: PositiveInt | None = None,
        board: TensorBoard,
        data: ImageData,
    ):
        self.speed, self.text, self.graph, self.batch = speed, text, graph, batch
        self.kernels, self.features, self.histograms = kernels, features, histograms
        self.classes, self.confusion, self.mistakes = classes, confusion, mistakes
        self.pr_curves, self.embedding, self.charts = pr_curves, embedding, charts
        self.every_n_epochs, self.board, self.data = every_n_epochs, board, data

    @classmethod
    def none(cls, board: TensorBoard, data: ImageData) -> "Insights":
        """With everything switched off."""
        defaults = cls.__init__.__kwdefaults__ or {}
        off = {name: False for name, default in defaults.items() if default is True}
        return cls(**off, board=board, data=data)

    def begin(self, cfg: DictConfig, network: nn.Module) -> None:
        """Log what is known before training: config, environment, charts, graph."""
        writer = self.board.experiment
        if self.text:
            facts = environment()
            facts["git"].pop("diff")  # may be long, and is in environment.json
            texts = {"config": OmegaConf.to_yaml(cfg, resolve=True)}
            texts["environment"] = OmegaConf.to_yaml(facts)
            for tag, text in texts.items():
                writer.add_text(tag, textwrap.indent(text, "    "), 0)  # a code block in Markdown
        if self.charts:
            writer.add_custom_scalars({"training and validation": CHARTS})
        if self.graph:
            try:
                self.board.graph(layer_graph(network, self.data.shape))
            except ValueError as error:
                log.warning(f"no graph in TensorBoard: {error}")

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.batch and trainer.current_epoch == batch_idx == 0:
            images, labels = (part[:BATCH].cpu() for part in batch)
            names = [_class_names(label, self.data.classes) for label in labels]
            shown = pictures.pixels(images, self.data.mean, self.data.std)
            self._image("train/batch", pictures.captioned(shown, names), trainer.current_epoch + 1)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        # Not at the end of the epoch: a run resumed there has no gradients.
        last = trainer.fit_loop.epoch_loop.batch_idx == trainer.num_training_batches - 1
        if self.histograms and last and self._due(trainer):
            scale = module.gradient_scale(optimizer)
            for name, parameter in module.network.named_parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad / scale
                    self.board.histogram(f"gradients/{name}", gradient, trainer.current_epoch + 1)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        # A moving average of the weights is swapped in only during validation.
        if not self._due(trainer):
            return
        epoch, network = trainer.current_epoch + 1, module.network
        if self.histograms:
            for name, parameter in network.named_parameters():
                self.board.histogram(f"weights/{name}", parameter, epoch)
        if self.kernels:
            for name, first in named_convolutions(network)[:1]:
                self._image(f"kernels/{name}", _kernels(first.weight.detach()), epoch)
        if self.features:
            loader: Any = trainer.val_dataloaders
            rows = self._examples(loader.labels)
            inputs = pictures.in_colour(loader.stored(rows))
            for name, maps in feature_maps(network, loader.rows(rows)):
                self._image(f"features/{name}", _maps(maps, inputs), epoch)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        epoch, found, writer = trainer.current_epoch + 1, module.predictions, self.board.experiment
        names = self.data.classes if len(self.data.classes) <= CURVES else []
        for k, name in enumerate(names if self.classes else ()):
            if found.support[k]:
                recall = float(found.per_class["recall"][k])
                writer.add_scalar(f"val_class_acc/{name}", recall, epoch)
        if not self._due(trainer):
            return
        self._show(found, trainer.val_dataloaders, "val", epoch)
        for k, name in enumerate(names if self.pr_curves else ()):
            scores = found.probabilities[:, k]
            writer.add_pr_curve(f"pr/{name}", found.labels == k, scores, epoch)

    def on_test_end(self, trainer: Any, module: Any) -> None:
        last, loader = trainer.current_epoch, trainer.test_dataloaders
        self._show(module.predictions, loader, "test", last)
        if self.embedding:
            self._embed(module.network, loader, module.predictions, last)

    def _image(self, tag: str, picture: pictures.Picture, epoch: int) -> None:
        self.board.experiment.add_image(tag, picture, epoch, dataformats="HWC")

    def _due(self, trainer: Any) -> bool:
        done, every = trainer.current_epoch + 1, self.every_n_epochs
        due = done % every == 0 if every else done & (done - 1) == 0
        return due or done == trainer.max_epochs

    def _show(self, found: Predictions, loader: Any, stage: str, epoch: int) -> None:
        names = self.data.classes
        if self.confusion:
            picture = pictures.confusion(*found.confusion, names, stage)
            self._image(f"{stage}/confusion", picture, epoch)
        if self.mistakes and len(found.mistakes(MISTAKES)):
            picture = worst(found, loader.stored, names, MISTAKES)
            self._image(f"{stage}/mistakes", picture, epoch)

    def _embed(self, network: nn.Module, loader: Any, found: Predictions, epoch: int) -> None:
        size = penultimate_features(network, loader.rows(torch.arange(1))).shape[1]
        count = min(POINTS, NUMBERS // size, len(found.labels))
        if not count:
            log.info(f"no projector: the last layer has {size:,} inputs per image")
            return
        batches = torch.arange(count).split(loader.batch_size)
        points = torch.cat([penultimate_features(network, loader.rows(rows)) for rows in batches])
        images = pictures.in_colour(loader.stored(torch.arange(count))).cpu()
        stride = -(-max(images.shape[2:]) // SPRITE)
        names, labels = self.data.classes, found.labels[:count].tolist()
        # The projector colours nothing until "Color by" is chosen: the frames show the class.
        images = pictures.framed(images[:, :, ::stride, ::stride], labels, len(names))
        pairs = zip(labels, found.predicted.tolist(), strict=False)
        rows = [[names[true], names[predicted]] for true, predicted in pairs]
        self.board.embed(points, rows, images, epoch)

    def _examples(self, labels: Tensor) -> Tensor:
        """The first image of each of the first classes, and more of them if there are few."""
        labels = labels.cpu()
        firsts = [int((labels == k).nonzero()[0]) for k in labels.unique()[:EXAMPLES]]
        others = [i for i in range(min(EXAMPLES, len(labels))) if i not in firsts]
        return torch.tensor([*firsts, *others][:EXAMPLES])


def worst(
    found: Predictions,
    images: Callable[[Tensor], Tensor],
    names: Sequence[str],
    most: int,
    files: Sequence[str] | None = None,
) -> pictures.Picture:
    """The most confident mistakes, captioned with predicted class, probability and true class.

    `images` returns images, uint8 (B, C, H, W), at positions (B,) of the data set, and
    `files` has their names.
    """
    wrong = found.mistakes(most)
    predicted, labels = found.predicted.tolist(), found.labels.tolist()
    captions = [
        f"predicted {names[predicted[i]]} {found.confidence[i]:.0%}\ntrue {names[labels[i]]}"
        + (f"\n{files[i]}" if files else "")
        for i in wrong.tolist()
    ]
    return pictures.captioned(pictures.in_colour(images(wrong)), captions)


def _kernels(weight: Tensor) -> pictures.Picture:
    """Kernels (out, in, H, W): in colour for three input channels, otherwise a tile per input
    channel; at most 64 kernels with 16 input channels each."""
    kernels, channels = weight.shape[:2]
    weight = weight[:64] if channels == 3 else weight[:64, :16]
    shown, tiled = weight.shape[:2]
    numbers, columns = [str(i) for i in range(shown)], 16
    below = f"number of the kernel{_part(shown, kernels)}"
    if channels == 3:
        low, high = weight.amin(), weight.amax()
        tiles = ((weight - low) / (high - low).clamp(min=1e-12) * 255).to(torch.uint8)
        legend = f"Weights as red, green and blue: {low:.3g} is dark, {high:.3g} is full."
    else:
        tiles, legend = pictures.signed(weight).flatten(0, 1), pictures.legend(weight)
    if channels not in (1, 3):
        numbers = [f"{number}, {channel}" for number in numbers for channel in range(tiled)]
        columns = tiled * (16 // tiled)
        below = f"kernel{_part(shown, kernels)}, input channel{_part(tiled, channels)}"
    heading = f"Below each: {below}. {legend}"
    return pictures.captioned(tiles, numbers, columns=columns, size=56, heading=heading)


def _maps(maps: Tensor, inputs: Tensor) -> pictures.Picture:
    """Feature maps (N, C, H, W) of images, uint8 (N, 3, H, W): a row per image, which comes first,
    and a tile per channel."""
    channels = maps.shape[1]
    if maps.shape[2:] == (1, 1):  # all channels of an image in one strip
        strip = pictures.signed(maps.reshape(len(maps), 1, -1).expand(-1, 4, -1))
        heading = f"Channels 0 to {channels - 1} from left to right. {pictures.legend(maps)}"
        images = [f"image {i}" for i in range(len(maps))]
        return pictures.captioned(strip, images, columns=1, size=900, heading=heading)
    maps = maps[:, :CHANNELS]
    tiles = pictures.signed(maps)  # (N, C, 3, H, W)
    first = F.interpolate(inputs.float().cpu(), tiles.shape[3:], mode="area").to(torch.uint8)
    tiles = torch.cat([first[:, None], tiles], 1).flatten(0, 1)
    captions, columns = ["image", *map(str, range(maps.shape[1]))], maps.shape[1] + 1
    below = f"number of the channel{_part(maps.shape[1], channels)}"
    heading, captions = f"Below each: {below}. {pictures.legend(maps)}", captions * len(maps)
    return pictures.captioned(tiles, captions, columns=columns, size=56, heading=heading)


def _class_names(label: Tensor, names: Sequence[str]) -> str:
    """Name of a label (), or names and shares of the largest of mixed labels (classes,)."""
    if not label.ndim:
        return names[int(label)]
    shares, labels = (part.tolist() for part in label.topk(min(2, len(label))))
    pairs = zip(labels, shares, strict=True)
    return ", ".join(f"{names[k]} {share:.0%}" for k, share in pairs if share > 0)


def _part(shown: int, total: int) -> str:
    return f" (the first {shown} of {total})" if total > shown else ""
