"""Loss and accuracy so far, against a count by NumPy."""

import numpy as np
import pytest
import torch

from cnntrain.training.tally import Tally

CPU = torch.device("cpu")


@pytest.mark.parametrize("batches", [1, 6, 7, 8, 17])
@pytest.mark.parametrize("together", [1, 7])
@pytest.mark.parametrize("looked_at", [[], [0, 5, 6]])
def test_metrics_at_any_batch(batches: int, together: int, looked_at: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    tally = Tally(CPU, together)
    losses, right, sizes = [], 0, []
    for batch in range(batches):
        size = 1 + batch % 5
        logits = torch.randn(size, 10, generator=generator, requires_grad=True)
        labels = torch.randint(10, (size,), generator=generator)
        loss = logits.square().mean()
        tally.add(loss, logits, labels)
        tally.images += size
        losses.append(loss.item())
        sizes.append(size)
        right += int((logits.detach().numpy().argmax(1) == labels.numpy()).sum())
        if batch in looked_at:
            assert tally.metrics("train")["train/acc"] == right / sum(sizes)
            state, tally = tally.state(), Tally(CPU, together)
            tally.restore(state)  # as of a checkpoint
    metrics = tally.metrics("train")
    assert metrics["train/acc"] == right / sum(sizes)
    assert metrics["train/loss"] == pytest.approx(np.average(losses, weights=sizes), rel=1e-6)
    tally.clear()
    assert tally.metrics("train") == {}
    assert int(tally.correct) == 0
