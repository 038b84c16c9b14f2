"""Loss and accuracy, counted while batches go by."""

from typing import Any, Literal

import torch
from torch import Tensor

from cnntrain.training.distributed import all_sum

Stage = Literal["train", "val", "test"]

TOGETHER = 64  # batches whose right answers are counted at a time


class Tally:
    """Loss and accuracy over the images that this process has seen so far, kept on the device: no
    step waits for it. Right answers are counted for so many batches `together`."""

    def __init__(self, device: torch.device, together: int = TOGETHER):
        self.together = together
        self.loss = torch.zeros((), device=device)
        self.counted = torch.zeros((), dtype=torch.int64, device=device)
        self.uncounted: list[tuple[Tensor, Tensor]] = []  # predicted and right classes (B,)
        self.images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """What the device does for a batch; the host adds to `images`."""
        self.loss.add_(loss.detach(), alpha=len(labels))
        self.uncounted.append((logits.argmax(dim=1), labels))
        if len(self.uncounted) == self.together:
            self._count()

    def _count(self) -> None:
        predicted, right = (torch.cat(parts) for parts in zip(*self.uncounted, strict=True))
        self.counted += (predicted == right).sum()
        self.uncounted.clear()

    @property
    def correct(self) -> Tensor:
        """How many answers were right, int64 without dimensions."""
        if self.uncounted:
            self._count()
        return self.counted

    def clear(self) -> None:
        """Begin anew, in the same memory."""
        self.loss.zero_()
        self.counted.zero_()
        self.uncounted.clear()
        self.images = 0

    def state(self) -> dict[str, Any]:
        """All of it as plain containers, for `restore`."""
        return {"loss": self.loss, "correct": self.correct, "images": self.images}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state` that lies on any device."""
        device = self.loss.device
        self.loss, self.counted = state["loss"].to(device), state["correct"].to(device)
        self.images = state["images"]

    def total(self) -> "Tally":
        """Over the images that all processes have seen; waits for the device."""
        tally = Tally(torch.device("cpu"))
        loss, correct, images = all_sum([float(self.loss), int(self.correct), self.images])
        tally.loss, tally.images = torch.tensor(loss, dtype=torch.float64), int(images)
        tally.counted = torch.tensor(int(correct))
        return tally

    def metrics(self, stage: Stage) -> dict[str, float]:
        """Mean loss (nats) and accuracy (0 to 1); waits for the device."""
        if not self.images:
            return {}
        loss, correct = float(self.loss), int(self.correct)
        return {f"{stage}/loss": loss / self.images, f"{stage}/acc": correct / self.images}
