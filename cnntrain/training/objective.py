"""What is minimised, and how the learning rate moves while it is."""

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

Share = Annotated[float, Field(ge=0, le=1)]


class CrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy of logits (N, classes) and labels (N,), in nats, mean over the batch.

    `label_smoothing` is the share of the target spread over all classes (Szegedy et al. 2015). It
    holds in training only, so that the losses of validation and test compare between runs.
    """

    def __init__(self, label_smoothing: Share = 0.0):
        super().__init__(label_smoothing=label_smoothing)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        smoothing = self.label_smoothing if self.training else 0.0
        return nn.functional.cross_entropy(input, target, label_smoothing=smoothing)


class HalfSquaredError(nn.Module):
    """(p - y)^2 / 2 of the probability p of the second of two classes, mean over the batch.

    Logits (N, 2) and labels (N,); ValueError for another number of classes. The probability is
    that of softmax, which for logits 0 and z is the sigmoid of z.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if input.shape[1] != 2:
            raise ValueError(f"is for two classes, not {input.shape[1]}")
        error = input.softmax(1)[:, 1] - target
        return error.square().mean() / 2


class OneCycle(OneCycleLR):
    """The one-cycle schedule of Smith and Topin (arXiv:1708.07120), a step being a batch's update.

    From lr / div_factor up to the optimizer's own lr during the first `pct_start` of the run, then
    down to lr / div_factor / final_div_factor.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int,
        pct_start: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        div_factor: PositiveFloat = 25.0,
        final_div_factor: PositiveFloat = 1e4,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
    ):
        if pct_start * total_steps == 1:
            pct_start *= 0.9  # OneCycleLR divides by the rise's length, pct_start * steps - 1
        super().__init__(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=total_steps,
            pct_start=pct_start,
            div_factor=div_factor,
            final_div_factor=final_div_factor,
            anneal_strategy=anneal_strategy,
            cycle_momentum=cycle_momentum,
        )


class WarmupCosine(LambdaLR):
    """A linear warm-up to the optimizer's lr, then half a cosine down to `final` times it.

    `warmup` is a share of the run's steps. Source: Loshchilov and Hutter, arXiv:1608.03983,
    without restarts.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int,
        warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05,
        final: Share = 0.0,
    ):
        rising = round(warmup * total_steps)

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            done = min(1.0, (step - rising) / max(1, total_steps - rising))
            return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

        super().__init__(optimizer, factor)
