"""Running metrics and metrics of an evaluation, against sums in NumPy."""

import numpy as np
import pytest
import torch

from cnntrain.training import metrics as module
from cnntrain.training.metrics import Predictions, RunningMetrics


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    sizes = (40, 40, 7)
    return [
        (torch.randn(n, 4, generator=generator) * 2, torch.randint(0, 4, (n,), generator=generator))
        for n in sizes
    ]


def joined(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    logits = np.concatenate([part[0].double().numpy() for part in batches])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return shares, np.concatenate([part[1].numpy() for part in batches])


def test_confusion_precision_recall_f1(batches) -> None:
    found = Predictions.of(batches)
    shares, labels = joined(batches)
    predicted = shares.argmax(1)
    counts = np.zeros((4, 4), int)
    for label, answer in zip(labels, predicted, strict=True):
        counts[label, answer] += 1
    pairs, occurrences = found.confusion
    assert pairs.tolist() == np.argwhere(counts).tolist()
    assert occurrences.tolist() == counts[counts > 0].tolist()
    for k in range(4):
        right = counts[k, k]
        precision, recall = right / counts[:, k].sum(), right / counts[k].sum()
        assert found.per_class["precision"][k] == pytest.approx(precision)
        assert found.per_class["recall"][k] == pytest.approx(recall)
        f1 = 2 * precision * recall / (precision + recall)
        assert found.per_class["f1"][k] == pytest.approx(f1)


def test_class_that_is_never_predicted() -> None:
    found = Predictions.of([(torch.tensor([[9.0, 0, 0], [9.0, 0, 0]]), torch.tensor([0, 1]))])
    assert found.per_class["precision"].tolist() == [0.5, 0, 0]
    assert found.per_class["recall"].tolist() == [1, 0, 0]


def test_means_over_the_classes_with_images(batches) -> None:
    """scikit-learn's balanced_accuracy_score, and f1_score over the labels that occur."""
    batches = [(logits, labels.clamp(max=2)) for logits, labels in batches]  # none of class 3
    shares, labels = joined(batches)
    predicted = shares.argmax(1)
    assert (predicted == 3).any()
    recalls, scores = [], []
    for k in np.unique(labels):
        right = ((labels == k) & (predicted == k)).sum()
        false_positive = ((labels != k) & (predicted == k)).sum()
        false_negative = ((labels == k) & (predicted != k)).sum()
        recalls.append(right / (right + false_negative))
        scores.append(2 * right / (2 * right + false_positive + false_negative))
    found = Predictions.of(batches).class_means
    assert found == pytest.approx(
        {"balanced_acc": np.mean(recalls), "macro_f1": np.mean(scores)}, rel=1e-12
    )


def test_one_class_is_always_right() -> None:
    found = Predictions.of([(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))])
    assert [values.tolist() for values in found.confusion] == [[[0, 0]], [3]]
    assert {name: values.tolist() for name, values in found.per_class.items()} == {
        "precision": [1],
        "recall": [1],
        "f1": [1],
    }
    assert found.calibration_error == 0


@pytest.mark.parametrize("times", [1, 40])  # at 40 many probabilities are 1 to the last bit
def test_calibration_error(batches, times: int) -> None:
    batches = [(logits * times, labels) for logits, labels in batches]
    shares, labels = joined(batches)
    confidence, right = shares.max(1), shares.argmax(1) == labels
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert Predictions.of(batches).calibration_error == pytest.approx(error, abs=1e-6)


def test_mistakes_are_the_most_confident_first(batches) -> None:
    shares, labels = joined(batches)
    wrong = [i for i in range(len(labels)) if shares[i].argmax() != labels[i]]
    wrong.sort(key=lambda i: -shares[i].max())
    assert Predictions.of(batches).mistakes(10).tolist() == wrong[:10]
    assert Predictions.of(batches).mistakes(1000).tolist() == wrong


@pytest.mark.parametrize("world", [2, 3, 9])
def test_several_processes_give_the_same(batches, world: int, monkeypatch) -> None:
    """The last batch has fewer images than nine processes."""
    parts = [
        [
            (logits[rank::world], labels[rank::world])
            for logits, labels in batches
            if len(labels[rank::world])
        ]
        for rank in range(world)
    ]
    whole = Predictions.of(batches)
    monkeypatch.setattr(module, "is_single_process", lambda: False)
    monkeypatch.setattr(module, "all_gather", lambda mine: parts)
    shared = Predictions.of(parts[0])
    assert (shared.labels == whole.labels).all()
    torch.testing.assert_close(shared.probabilities, whole.probabilities)


def test_accuracy_with_mixed_labels_is_that_of_the_larger_share() -> None:
    running = RunningMetrics(torch.device("cpu"))
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    labels = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.6, 0.4], [0.0, 1.0, 0.0], [0.2, 0.0, 0.8]])
    running.add(torch.tensor(0.5), logits, labels)
    running.images = 4
    assert running.metrics("train") == {"train/loss": 0.5, "train/acc": 0.5}


@pytest.mark.parametrize("batches", [1, 6, 17])
@pytest.mark.parametrize("resumed_after", [[], [0, 5, 6]])
def test_running_metrics_after_any_batch(batches: int, resumed_after: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    running = RunningMetrics(torch.device("cpu"))
    losses, right, sizes = [], 0, []
    for batch in range(batches):
        size = 1 + batch % 5
        logits = torch.randn(size, 10, generator=generator, requires_grad=True)
        labels = torch.randint(10, (size,), generator=generator)
        loss = logits.square().mean()
        running.add(loss, logits, labels)
        running.images += size
        losses.append(loss.item())
        sizes.append(size)
        right += int((logits.detach().numpy().argmax(1) == labels.numpy()).sum())
        if batch in resumed_after:
            assert running.metrics("train")["train/acc"] == right / sum(sizes)
            state, running = running.state(), RunningMetrics(torch.device("cpu"))
            running.load_state(state)
    metrics = running.metrics("train")
    assert metrics["train/acc"] == right / sum(sizes)
    assert metrics["train/loss"] == pytest.approx(np.average(losses, weights=sizes), rel=1e-6)
    running.clear()
    assert running.metrics("train") == {}
    assert int(running.correct) == 0
