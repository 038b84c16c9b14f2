"""The loss and the schedules against their formulas."""

import math
from typing import Any

import pytest
import torch

from cnntrain.training import CrossEntropy, OneCycle, WarmupCosine


def test_cross_entropy_against_the_formula() -> None:
    logits, label, smoothing = [0.5, -1.0, 2.0], 2, 0.3
    norm = math.log(sum(math.exp(x) for x in logits))
    target = [smoothing / 3 + (1 - smoothing) * (i == label) for i in range(3)]
    expected = -sum(t * (x - norm) for t, x in zip(target, logits, strict=True))
    loss = CrossEntropy(smoothing)
    given = torch.tensor([logits]), torch.tensor([label])
    assert loss.train()(*given).item() == pytest.approx(expected, rel=1e-6)
    assert loss.eval()(*given).item() == pytest.approx(norm - logits[label], rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_class_weights_against_the_formula(smoothing: float) -> None:
    """Of labels, and of the same as probabilities; divided by the number of images."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator)
    labels, weights = torch.tensor([2, 2, 0, 1, 2, 0]), [0.5, 0.0, 4.0]
    expected = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        norm = math.log(sum(map(math.exp, row)))
        target = [smoothing / 3 + (1 - smoothing) * (i == label) for i in range(3)]
        expected -= sum(w * t * (x - norm) for w, t, x in zip(weights, target, row, strict=True))
    loss = CrossEntropy(smoothing, weights)
    loss.set_class_counts(torch.tensor([5, 1, 2]))
    for target in (labels, torch.eye(3)[labels]):
        assert loss.train()(logits, target).item() == pytest.approx(expected / 6, rel=1e-6)
        plain = torch.nn.functional.cross_entropy(logits, labels)
        assert loss.eval()(logits, target).item() == pytest.approx(plain.item(), rel=1e-6)
    assert list(loss.state_dict()) == ["weight"]


def test_balanced_class_weights() -> None:
    """scikit-learn: n / (classes * count), of the classes that have images."""
    loss = CrossEntropy(class_weights="balanced")
    loss.set_class_counts(torch.tensor([10, 0, 30, 20]))
    assert loss.weight is not None
    assert loss.weight.tolist() == pytest.approx([2.0, 0.0, 60 / 90, 1.0])


def test_no_class_weights() -> None:
    loss = CrossEntropy(0.1)
    loss.set_class_counts(torch.tensor([1, 3]))
    assert not loss.state_dict()
    logits, labels = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    plain = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
    assert torch.equal(loss(logits, labels), plain)


def rates(scheduler_class: Any, steps: int, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0, momentum=0.9)
    scheduler = scheduler_class(optimizer, total_steps=steps, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()  # once more at the end than there are updates, as the trainer does
    return found


def test_one_cycle_rises_and_falls() -> None:
    found = rates(OneCycle, 101, pct_start=0.31, div_factor=20.0, final_div_factor=100.0)
    assert found[0] == pytest.approx(2.0 / 20)
    assert max(found) == pytest.approx(2.0, rel=1e-3)
    assert 29 <= found.index(max(found)) <= 31
    assert found[-1] == pytest.approx(2.0 / 20 / 100)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10])
def test_one_cycle_of_few_steps(steps: int) -> None:
    found = rates(OneCycle, steps)
    assert all(0 < rate <= 2 for rate in found)


def test_warmup_cosine_against_the_formula() -> None:
    found = rates(WarmupCosine, 50, warmup=0.2, final=0.1)
    assert found[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])
    falling = [
        2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (s - 10) / 40)) / 2) for s in range(10, 50)
    ]
    assert found[10:] == pytest.approx(falling)
