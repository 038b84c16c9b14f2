"""Losses: cross-entropy with class weights, and half the squared error of one output."""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

Share = Annotated[float, Field(ge=0, le=1)]


class CrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy of logits (N, classes) and labels (N,) or probabilities (N, classes), in nats,
    mean over the batch.

    Args:
        label_smoothing: Share of the target that is spread over all classes (Szegedy et al. 2015),
            in training only, so that validation and test losses of different runs compare.
        class_weights: Weight of each class, likewise in training only. `balanced`: inversely
            proportional to the number of its training images, with mean 1 over the training images
            (scikit-learn's `compute_class_weight`); 0 for a class without any. None: all 1.

    The mean of weight times loss is divided by the number of images, not, as in
    `nn.CrossEntropyLoss`, by the sum of their weights: the gradient is then the same however a
    batch is divided among processes or accumulated, and weights have an effect in any batch.
    """

    def __init__(
        self,
        label_smoothing: Share = 0.0,
        class_weights: Literal["balanced"] | list[NonNegativeFloat] | None = None,
    ):
        super().__init__(label_smoothing=label_smoothing)
        self.class_weights = class_weights

    def set_class_counts(self, counts: Tensor) -> None:
        """Set the buffer `weight`, given the number of training images of each class (classes,).

        Raises ValueError if `class_weights` has another number of classes.
        """
        if self.class_weights is None:
            return
        if self.class_weights == "balanced":
            weight = counts.sum() / ((counts > 0).sum() * counts.double())
            weight[counts == 0] = 0.0
        elif len(self.class_weights) == len(counts):
            weight = torch.tensor([float(value) for value in self.class_weights])
        else:
            raise ValueError(
                f"loss.class_weights={self.class_weights}: has {len(self.class_weights)} numbers "
                f"for {len(counts)} classes; give one per class"
            )
        self.weight = weight.float()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        smoothing = self.label_smoothing if self.training else 0.0
        if self.weight is None or not self.training:
            return nn.functional.cross_entropy(input, target, label_smoothing=smoothing)
        total = nn.functional.cross_entropy(
            input, target, self.weight, reduction="sum", label_smoothing=smoothing
        )
        return total / len(target)


class HalfSquaredError(nn.Module):
    """(p - y)^2 / 2, mean over the batch, with the softmax probability p of the second class.

    Takes logits (N, 2) and labels (N,). Raises ValueError for another number of classes, and for
    probabilities instead of labels.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.shape[1] != 2:
            raise ValueError(f"is for two classes, not {input.shape[1]}")
        if target.ndim > 1:
            raise ValueError(
                "takes no labels mixed by data.mixup or cutmix; loss=cross_entropy does"
            )
        error = input.softmax(1)[:, 1] - target
        return error.square().mean() / 2
