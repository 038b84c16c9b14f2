"""What a network has said of labelled images, and what that is worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from cnntrain.pictures import sparse
from cnntrain.training.distributed import all_gather, is_single_process

BINS = 15  # of the calibration error, as is usual

FULL = 1000  # classes up to which all probabilities are kept

Answers = list[tuple[Tensor, Tensor]]  # of each batch `answer` of its logits, and labels (B,)


def answer(logits: Tensor) -> Tensor:
    """What is kept of the logits (B, classes) of a batch: all, or beyond FULL classes, where they
    would need more memory than the network, the largest probability and its class, (B, 2)."""
    if logits.shape[1] <= FULL:
        return logits
    return torch.stack(logits.float().softmax(1).max(1), 1)


@dataclass(frozen=True)
class Outcome:
    """Probabilities (N, classes), float32, and labels (N,), on the CPU, in the data's order.

    Beyond FULL classes the probabilities are sparse: the largest one of each image.
    """

    probabilities: Tensor
    labels: Tensor

    @classmethod
    def of(cls, answers: Answers, classes: int = 0) -> "Outcome":
        """Of what this process has been answered; of several, each gets that of all.

        Each of these must have seen every `world`-th image of every batch, as loaders share them.
        `classes` has to be given if there are more than FULL.
        """
        if is_single_process():
            rows, labels = (torch.cat(parts).cpu() for parts in zip(*answers, strict=True))
            rows = rows.float()
        else:
            here = [(rows.float().cpu(), labels.cpu()) for rows, labels in answers]
            batches = [
                _interleaved([part for part in parts if part is not None])
                for parts in zip_longest(*all_gather(here))  # a last batch may have fewer parts
            ]
            rows, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        if classes <= FULL:
            return cls(rows.softmax(1), labels)
        places = torch.stack([torch.arange(len(rows)), rows[:, 1].long()])
        return cls(sparse(places, rows[:, 0], (len(rows), classes)), labels)

    @property
    def classes(self) -> int:
        return self.probabilities.shape[1]

    @cached_property
    def confidence(self) -> Tensor:
        """The probability of the most probable class of each image (N,)."""
        shares = self.probabilities
        return shares.values() if shares.is_sparse else shares.amax(1)

    @cached_property
    def predicted(self) -> Tensor:
        """The most probable class of each image (N,)."""
        shares = self.probabilities
        return shares.indices()[1] if shares.is_sparse else shares.argmax(1)

    @cached_property
    def confusion(self) -> Tensor:
        """How many images of class i were taken for class j: int64 (classes, classes), a sparse
        COO tensor of the pairs that there are."""
        pairs, counts = (self.labels * self.classes + self.predicted).unique(return_counts=True)
        places = torch.stack([pairs // self.classes, pairs % self.classes])
        return sparse(places, counts, (self.classes, self.classes))

    @cached_property
    def support(self) -> Tensor:
        """The number of images of each class (classes,)."""
        return self.labels.bincount(minlength=self.classes)

    @cached_property
    def per_class(self) -> dict[str, Tensor]:
        """Precision, recall and F1 of each class (classes,), from 0 to 1; 0 where undefined."""
        right = self.labels[self.predicted == self.labels].bincount(minlength=self.classes)
        guessed = self.predicted.bincount(minlength=self.classes)
        return {
            "precision": right / guessed.clamp(min=1),
            "recall": right / self.support.clamp(min=1),
            "f1": 2 * right / (guessed + self.support).clamp(min=1),
        }

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: the mean distance of confidence and accuracy in 15 equal
        bins of confidence, weighted by their images (Naeini et al. 2015)."""
        if self.classes == 1:  # of which one is certain, and right
            return 0.0
        below = self.confidence.clamp(max=1 - 2**-24)  # torchmetrics gives 1 a bin of its own
        right = (self.predicted == self.labels).int()
        return float(binary_calibration_error(below, right, n_bins=BINS, norm="l1"))

    def mistakes(self, most: int) -> Tensor:
        """The images that were taken for something else, the most confident first (<= most,)."""
        wrong = (self.predicted != self.labels).nonzero()[:, 0]
        return wrong[self.confidence[wrong].argsort(descending=True, stable=True)[:most]]


def _interleaved(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch from the parts of all processes: that of rank r has every world-th image from r."""
    whole = []
    for pieces in zip(*parts, strict=True):
        joined = pieces[0].new_empty(sum(map(len, pieces)), *pieces[0].shape[1:])
        for rank, piece in enumerate(pieces):
            joined[rank :: len(pieces)] = piece
        whole.append(joined)
    return whole[0], whole[1]
