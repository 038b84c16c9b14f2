"""What TensorBoard shows of a run beside its scalars: what goes in, what is learned, what fails."""

import logging
from collections.abc import Callable, Mapping, Sequence
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
from cnntrain.models.introspection import (
    feature_maps,
    named_convolutions,
    penultimate_features,
)
from cnntrain.training.outcome import Outcome
from cnntrain.training.run_directory import environment
from cnntrain.training.tensorboard import TensorBoard

log = logging.getLogger(__name__)

BATCH = 32  # training images that are shown
EXAMPLES = 4  # images whose feature maps are shown
CHANNELS = 16  # feature maps shown of each convolution, of each image
MISTAKES = 32
POINTS, NUMBERS = 2000, 1_000_000  # in the projector, and in all points together
SPRITE = 64  # pixels: the largest side of an image in the projector
CURVES = 100  # classes beyond which there are no curves of each


class Insights(lightning.Callback):
    """Writes to a run's TensorBoard what its network sees, learns and takes for what.

    All over epochs, of the validation images and of the weights that were validated; the test set
    is seen once, at the end, with its confusion and its mistakes.

    Args:
        speed: Training images/s, and the share of that time that making the batches takes.
        text: The config and the environment.
        graph: The network, layer by layer.
        batch: Images of the first training batch, as they were augmented.
        kernels: The weights of the first convolution.
        features: What each convolution makes of some images.
        histograms: Weights, and the gradients of an epoch's last step.
        classes: The accuracy of each class.
        confusion: Which class is taken for which.
        mistakes: The wrong answers that were given with the most confidence.
        pr_curves: Precision and recall of each class.
        embedding: What the last layer is given of at most 2,000 images, with a picture of each.
        charts: Training and validation as runs, which TensorBoard draws in one chart and in two
            colours.
        every_n_epochs: How often pictures, histograms and curves are written, and at the last of
            `max_epochs`; None: after 1, 2, 4, 8, ... epochs, as TensorBoard keeps ten pictures of a
            kind.
    """

    def __init__(
        self,
        *,
        speed: bool = True,
        text: bool = True,
        graph: bool = True,
        batch: bool = True,
        kernels: bool = True,
        features: bool = True,
        histograms: bool = True,
        classes: bool = True,
        confusion: bool = True,
        mistakes: bool = True,
        pr_curves: bool = True,
        embedding: bool = True,
        charts: bool = True,
        every_n_epochs: PositiveInt | None = None,
        board: TensorBoard | None = None,
        data: ImageData | None = None,
    ):
        self.speed, self.text, self.graph, self.batch = speed, text, graph, batch
        self.kernels, self.features, self.histograms = kernels, features, histograms
        self.classes, self.confusion, self.mistakes = classes, confusion, mistakes
        self.pr_curves, self.embedding, self.charts = pr_curves, embedding, charts
        self.every_n_epochs = every_n_epochs
        if board and data:  # else it is only checked that it can be made
            self.board, self.data = board, data

    @classmethod
    def none(cls, board: TensorBoard, data: ImageData) -> "Insights":
        """All switched off."""
        defaults = cls.__init__.__kwdefaults__ or {}
        switches = [name for name, default in defaults.items() if default is True]
        return cls(**dict.fromkeys(switches, False), board=board, data=data)

    @property
    def writer(self) -> Any:
        return self.board.experiment

    def begin(
        self, cfg: DictConfig, network: nn.Module, before: Mapping[str, Any] | None = None
    ) -> None:
        """What there is to see before the first step; of a run that goes on, what its switches
        `before` have not shown."""
        before = before or {}
        if self.text and not before.get("text"):
            self.writer.add_text("config", _code(OmegaConf.to_yaml(cfg, resolve=True)), 0)
            here = environment()
            here["git"].pop("diff")  # as long as one likes; environment.json has it
            self.writer.add_text("environment", _code(OmegaConf.to_yaml(here)), 0)
        if self.charts and not before.get("charts"):
            self.writer.add_custom_scalars(self._layout())
        if self.graph and not before.get("graph"):
            self.board.graph(layer_graph(network, self.data.shape))

    def _layout(self) -> dict[str, dict[str, list[Any]]]:
        """Charts with several curves, which are runs; their tags by regular expressions."""
        return {
            "training and validation": {
                "loss": ["Multiline", ["^loss$"]],
                "accuracy": ["Multiline", ["^acc$"]],
            }
        }

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.batch and trainer.current_epoch == batch_idx == 0:
            images, labels = (part[:BATCH].cpu() for part in batch)
            names = [self.data.classes[label] for label in labels]
            seen = pictures.pixels(images, self.data.mean, self.data.std)
            self.board.picture("train/batch", pictures.captioned(seen, names), self._epoch(trainer))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        # Here and not at the epoch's end: a run that is interrupted has no gradient afterwards.
        last = trainer.fit_loop.epoch_loop.batch_idx == trainer.num_training_batches - 1
        if self.histograms and last and self._due(trainer):
            scale = module.gradient_scale(optimizer)
            for name, parameter in module.network.named_parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad / scale
                    self.board.histogram(f"gradients/{name}", gradient, self._epoch(trainer))

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        # Now, as a moving average of the weights is in its place only during validation.
        if not self._due(trainer):
            return
        epoch, network = self._epoch(trainer), module.network
        if self.histograms:
            for name, parameter in network.named_parameters():
                self.board.histogram(f"weights/{name}", parameter, epoch)
        if self.kernels:
            for name, first in named_convolutions(network)[:1]:
                self.board.picture(f"kernels/{name}", _kernels(first.weight.detach()), epoch)
        if self.features:
            loader: Any = trainer.val_dataloaders
            rows = self._examples(loader.labels)
            seen = pictures.in_colour(loader.stored(rows))
            for name, maps in feature_maps(network, loader.rows(rows)):
                self.board.picture(f"features/{name}", _maps(maps, seen), epoch)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        epoch, outcome = self._epoch(trainer), module.outcome
        names, recall = self.data.classes, outcome.per_class["recall"]
        if self.classes and len(names) <= CURVES:
            for name, share, count in zip(names, recall, outcome.support, strict=True):
                if count:
                    self.writer.add_scalar(f"val_class_acc/{name}", float(share), epoch)
        if not self._due(trainer):
            return
        self._show(outcome, trainer.val_dataloaders, "val", epoch)
        if self.pr_curves and len(names) <= CURVES:
            for k, name in enumerate(names):
                scores = outcome.probabilities[:, k]
                self.writer.add_pr_curve(f"pr/{name}", outcome.labels == k, scores, epoch)

    def on_test_end(self, trainer: Any, module: Any) -> None:
        last = self.board.numbered(max(trainer.current_epoch - 1, 0))  # the count of those done
        self._show(module.outcome, trainer.test_dataloaders, "test", last)
        if self.embedding:
            self._embed(module.network, trainer.test_dataloaders, module.outcome)

    def _epoch(self, trainer: Any) -> int:
        return self.board.numbered(trainer.current_epoch)

    def _due(self, trainer: Any) -> bool:
        done, every = trainer.current_epoch + 1, self.every_n_epochs
        due = done % every == 0 if every else done & (done - 1) == 0
        return due or done == trainer.max_epochs

    def _show(self, outcome: Outcome, loader: Any, stage: str, epoch: int) -> None:
        """What was taken for what."""
        names = self.data.classes
        if self.confusion:
            picture = pictures.confusion(outcome.confusion, names, stage)
            self.board.picture(f"{stage}/confusion", picture, epoch)
        if self.mistakes and len(outcome.mistakes(MISTAKES)):
            picture = worst(outcome, loader.stored, names, MISTAKES)
            self.board.picture(f"{stage}/mistakes", picture, epoch)

    def _embed(self, network: nn.Module, loader: Any, outcome: Outcome) -> None:
        features = penultimate_features(network, loader.rows(torch.arange(1)))
        count = min(POINTS, NUMBERS // features.shape[1], len(outcome.labels))
        if not count:
            log.info(
                f"no projector: the last layer is given {features.shape[1]:,} numbers an image"
            )
            return
        batches = torch.arange(count).split(loader.batch_size)
        points = torch.cat([penultimate_features(network, loader.rows(rows)) for rows in batches])
        images = pictures.in_colour(loader.stored(torch.arange(count))).cpu()
        step = -(-max(images.shape[2:]) // SPRITE)
        images = images[:, :, ::step, ::step]
        names = self.data.classes
        labels = outcome.labels[:count].tolist()
        answers = zip(labels, outcome.predicted.tolist(), strict=False)
        about = [(names[true], names[answer]) for true, answer in answers]
        # TensorBoard colours nothing by itself: "Color by" is empty until it is chosen.
        images = pictures.framed(images, labels, len(names))
        self.board.embed(points, ("class", "predicted"), about, images)

    def _examples(self, labels: Tensor) -> Tensor:
        """The first image of each of the first classes that there are; of few classes, more."""
        labels = labels.cpu()
        firsts = [int((labels == k).nonzero()[0]) for k in labels.unique()[:EXAMPLES]]
        others = [i for i in range(min(EXAMPLES, len(labels))) if i not in firsts]
        return torch.tensor([*firsts, *others][:EXAMPLES])


def worst(
    outcome: Outcome, images: Callable[[Tensor], Tensor], names: Sequence[str], most: int
) -> pictures.Picture:
    """The most confident mistakes: of each the predicted class with its probability, and the true
    class. `images` maps positions (B,) to their images, uint8 (B, C, H, W)."""
    wrong = outcome.mistakes(most)
    answers, labels = outcome.predicted.tolist(), outcome.labels.tolist()
    captions = [
        f"predicted {names[answers[i]]} {outcome.confidence[i]:.0%}\ntrue {names[labels[i]]}"
        for i in wrong.tolist()
    ]
    return pictures.captioned(pictures.in_colour(images(wrong)), captions)


def _code(text: str) -> str:
    """As it stands, in Markdown."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _kernels(weight: Tensor) -> pictures.Picture:
    """Kernels (out, in, H, W) with their numbers, in colour where there are three input channels,
    else a tile for each input channel; at most 64 kernels, and 16 input channels of each."""
    kernels, channels = weight.shape[:2]
    weight = weight[:64] if channels == 3 else weight[:64, :16]
    shown = f" (the first {len(weight)} of {kernels})" if kernels > len(weight) else ""
    numbers, columns, below = [str(i) for i in range(len(weight))], 16, "number of the kernel"
    if channels == 3:
        low, high = weight.amin(), weight.amax()
        tiles = ((weight - low) / (high - low).clamp(min=1e-12) * 255).to(torch.uint8)
        legend = f"Weights as red, green and blue: {low:.3g} is dark, {high:.3g} is full."
    else:
        tiles, legend = pictures.signed(weight).flatten(0, 1), pictures.legend(weight)
    if channels not in (1, 3):
        seen = weight.shape[1]
        numbers = [f"{number}, {channel}" for number in numbers for channel in range(seen)]
        columns = seen * (16 // seen)
        below = f"kernel{shown}, input channel"
        shown = f" (the first {seen} of {channels})" if channels > seen else ""
    heading = f"Below each: {below}{shown}. {legend}"
    return pictures.captioned(tiles, numbers, columns=columns, size=56, heading=heading)


def _maps(maps: Tensor, seen: Tensor) -> pictures.Picture:
    """Feature maps (N, C, H, W): a row for each image, itself first, a tile for each channel.

    `seen` are the images as one sees them, (N, 3, H, W), uint8.
    """
    channels = maps.shape[1]
    if maps.shape[2:] == (1, 1):  # all channels, as one strip of colours
        strip = pictures.signed(maps.reshape(len(maps), 1, -1).expand(-1, 4, -1))
        heading = f"Channels 0 to {channels - 1} from left to right. {pictures.legend(maps)}"
        images = [f"image {i}" for i in range(len(maps))]
        return pictures.captioned(strip, images, columns=1, size=900, heading=heading)
    maps = maps[:, :CHANNELS]
    tiles = pictures.signed(maps)  # (N, C, 3, H, W)
    first = F.interpolate(seen.float().cpu(), tiles.shape[3:], mode="area").to(torch.uint8)
    tiles = torch.cat([first[:, None], tiles], 1)
    captions = ["image", *map(str, range(maps.shape[1]))] * len(maps)
    shown = f" (the first {CHANNELS} of {channels})" if channels > CHANNELS else ""
    heading = f"Below each: number of the channel{shown}. {pictures.legend(maps)}"
    return pictures.captioned(
        tiles.flatten(0, 1), captions, columns=tiles.shape[1], size=56, heading=heading
    )
