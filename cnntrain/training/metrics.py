"""Loss and accuracy of an epoch; confusion matrix, means over classes and calibration of an
evaluation."""

from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from cnntrain.training.distributed import all_gather, all_sum, is_single_process

Stage = Literal["train", "val", "test"]


class RunningMetrics:
    """Sum of losses and number of correct predictions, added up without synchronisation.

    Attributes:
        class_means: `Predictions.class_means` of an evaluation, once it has ended.
    """

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0
        self.class_means: dict[str, float] = {}

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: mean loss, logits (B, classes), labels (B,) or probabilities (B, classes) of
        mixed images, the largest of which is the label. `images` is left to the caller, since a
        CUDA graph repeats only what the device does."""
        self.loss.add_(loss.detach(), alpha=len(labels))
        labels = labels if labels.ndim == 1 else labels.argmax(dim=1)
        self.correct.add_((logits.argmax(dim=1) == labels).sum())

    def clear(self) -> None:
        """Reset to zero in place."""
        self.loss.zero_()
        self.correct.zero_()
        self.images = 0

    def state(self) -> dict[str, Any]:
        return {"loss": self.loss.cpu(), "correct": self.correct.cpu(), "images": self.images}

    def load_state(self, state: dict[str, Any]) -> None:
        self.loss.copy_(state["loss"])
        self.correct.copy_(state["correct"])
        self.images = state["images"]

    def total(self) -> "RunningMetrics":
        """The sums over all processes. Synchronises."""
        total = RunningMetrics(torch.device("cpu"))
        sums = all_sum([float(self.loss), int(self.correct), self.images])
        total.loss, total.correct = torch.tensor(sums[:2], dtype=torch.float64)
        total.images, total.class_means = int(sums[2]), self.class_means
        return total

    def metrics(self, stage: Stage) -> dict[str, float]:
        """Mean loss (nats) and accuracy (0 to 1) as `<stage>/loss` and `<stage>/acc`, then the
        means over classes; nothing before the first image. Synchronises."""
        if not self.images:
            return {}
        loss, correct = float(self.loss), int(self.correct)
        found = {"loss": loss / self.images, "acc": correct / self.images} | self.class_means
        return {f"{stage}/{name}": value for name, value in found.items()}


Batches = list[tuple[Tensor, Tensor]]  # logits (B, classes) and labels (B,)


@dataclass(frozen=True)
class Predictions:
    """Predicted probabilities of a data set and the metrics computed from them.

    Attributes:
        probabilities: (N, classes), float32, on the CPU.
        labels: (N,).
    """

    probabilities: Tensor
    labels: Tensor

    @classmethod
    def of(cls, batches: Batches) -> "Predictions":
        """Concatenate the batches of this process; in a distributed run, where it has every
        `world`-th image of each batch, those of all processes in their original order."""
        if not is_single_process():
            gathered = all_gather([(logits.cpu(), labels.cpu()) for logits, labels in batches])
            batches = []
            for parts in zip_longest(*gathered):  # the last batch may have fewer
                logits, labels = map(torch.cat, zip(*filter(None, parts), strict=True))
                places, world = torch.arange(len(labels)), len(parts)
                order = torch.cat([places[rank::world] for rank in range(world)]).argsort()
                batches.append((logits[order], labels[order]))
        logits, labels = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
        return cls(logits.float().softmax(1), labels)

    @property
    def classes(self) -> int:
        return self.probabilities.shape[1]

    @cached_property
    def confidence(self) -> Tensor:
        """The largest probability of each image (N,)."""
        return self.probabilities.amax(1)

    @cached_property
    def predicted(self) -> Tensor:
        """The predicted class of each image (N,)."""
        return self.probabilities.argmax(1)

    @cached_property
    def confusion(self) -> tuple[Tensor, Tensor]:
        """Pairs of true and predicted class that occur (M, 2), and how often (M,), int64."""
        pairs, counts = (self.labels * self.classes + self.predicted).unique(return_counts=True)
        return torch.stack([pairs // self.classes, pairs % self.classes], 1), counts

    @cached_property
    def support(self) -> Tensor:
        """Number of images of each class (classes,)."""
        return self.labels.bincount(minlength=self.classes)

    @cached_property
    def per_class(self) -> dict[str, Tensor]:
        """Precision, recall and F1 of each class (classes,), 0 to 1; 0 where undefined."""
        right = self.labels[self.predicted == self.labels].bincount(minlength=self.classes).double()
        predicted = self.predicted.bincount(minlength=self.classes)
        return {
            "precision": right / predicted.clamp(min=1),
            "recall": right / self.support.clamp(min=1),
            "f1": 2 * right / (predicted + self.support).clamp(min=1),
        }

    @property
    def class_means(self) -> dict[str, float]:
        """Balanced accuracy, which is the mean recall, and macro F1, over the classes with images.

        As scikit-learn's `balanced_accuracy_score(y, predicted)` and `f1_score(y, predicted,
        labels=np.unique(y), average="macro")`.
        """
        names, present = {"balanced_acc": "recall", "macro_f1": "f1"}, self.support > 0
        return {name: float(self.per_class[of][present].mean()) for name, of in names.items()}

    @property
    def calibration_error(self) -> float:
        """Expected calibration error with 15 bins (Naeini et al. 2015)."""
        if self.classes == 1:
            return 0.0
        below = self.confidence.clamp(max=1 - 2**-24)  # torchmetrics puts 1 into a bin of its own
        right = (self.predicted == self.labels).int()
        return float(binary_calibration_error(below, right, n_bins=15, norm="l1"))

    def mistakes(self, most: int) -> Tensor:
        """Positions of at most `most` misclassified images, the most confident first."""
        wrong = (self.predicted != self.labels).nonzero()[:, 0]
        return wrong[self.confidence[wrong].argsort(descending=True, stable=True)[:most]]
