"""What a network has said of labelled images, and what that is worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor
from torchmetrics.functional import classification

from cnntrain.training.distributed import alone, gathered

BINS = 15  # of the calibration error, as is usual

Answers = list[tuple[Tensor, Tensor]]  # of each batch the logits (B, classes) and labels (B,)


@dataclass(frozen=True)
class Outcome:
    """Probabilities (N, classes), float32, and labels (N,), on the CPU, in the data's order."""

    probabilities: Tensor
    labels: Tensor

    @classmethod
    def of(cls, answers: Answers) -> "Outcome":
        """Of what this process has been answered; of several, each gets that of all.

        Each of these must have seen every `world`-th image of every batch, as loaders share them.
        """
        if alone():
            logits, labels = (torch.cat(parts) for parts in zip(*answers, strict=True))
            return cls(logits.float().softmax(1).cpu(), labels.cpu())
        here = [(logits.float().cpu(), labels.cpu()) for logits, labels in answers]
        batches = [
            _interleaved([part for part in parts if part is not None])
            for parts in zip_longest(*gathered(here))  # a last batch may have fewer parts
        ]
        logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return cls(logits.softmax(1), labels)

    @property
    def classes(self) -> int:
        return self.probabilities.shape[1]

    @cached_property
    def predicted(self) -> Tensor:
        """The most probable class of each image (N,)."""
        return self.probabilities.argmax(1)

    @cached_property
    def confusion(self) -> Tensor:
        """How many images of class i were taken for class j, int64 (classes, classes)."""
        return classification.multiclass_confusion_matrix(
            self.predicted, self.labels, self.classes, validate_args=False
        )

    @cached_property
    def per_class(self) -> dict[str, Tensor]:
        """Precision, recall and F1 of each class (classes,), from 0 to 1; 0 where undefined."""
        measures = {
            "precision": classification.multiclass_precision,
            "recall": classification.multiclass_recall,
            "f1": classification.multiclass_f1_score,
        }
        return {
            # Not validated: there may be one class.
            name: measure(
                self.predicted, self.labels, self.classes, average=None, validate_args=False
            )
            for name, measure in measures.items()
        }

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: the mean distance of confidence and accuracy in 15 equal
        bins of confidence, weighted by their images (Naeini et al. 2015)."""
        if self.classes == 1:  # of which one is certain, and right
            return 0.0
        below = self.probabilities.clamp(max=1 - 2**-24)  # torchmetrics gives 1 a bin of its own
        error = classification.multiclass_calibration_error(
            below, self.labels, self.classes, n_bins=BINS, norm="l1"
        )
        return float(error)

    def mistakes(self, most: int) -> Tensor:
        """The images that were taken for something else, the most confident first (<= most,)."""
        wrong = (self.predicted != self.labels).nonzero()[:, 0]
        confidence = self.probabilities[wrong, self.predicted[wrong]]
        return wrong[confidence.argsort(descending=True, stable=True)[:most]]


def _interleaved(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch from the parts of all processes: that of rank r has every world-th image from r."""
    whole = []
    for pieces in zip(*parts, strict=True):
        joined = pieces[0].new_empty(sum(map(len, pieces)), *pieces[0].shape[1:])
        for rank, piece in enumerate(pieces):
            joined[rank :: len(pieces)] = piece
        whole.append(joined)
    return whole[0], whole[1]
