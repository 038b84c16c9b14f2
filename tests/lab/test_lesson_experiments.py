"""Lessons that train: backpropagation in NumPy, images of digits, and an ablation."""

import csv
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_runs import command

from cnntrain.config import compose, compose_all
from cnntrain.data import Strokes, TwoSigns
from cnntrain.training import train
from cnntrain.training.building import build_run

# The network of experiment=shallow_by_hand in NumPy, with gradients derived by hand.


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def by_hand(
    images: np.ndarray, labels: np.ndarray, weights: dict[str, np.ndarray], lr: float, epochs: int
) -> tuple[list[float], dict[str, np.ndarray]]:
    """The loss before each step, and the weights after the last.

    images (N, 6, 6); kernel (3, 3), bias (), fully connected (4,), its bias ().
    """
    w, b, v, c = (weights[name].copy() for name in ("w", "b", "v", "c"))
    losses = []
    for _ in range(epochs):
        loss, dw, db, dv, dc = 0.0, np.zeros_like(w), 0.0, np.zeros_like(v), 0.0
        for x, y in zip(images, labels, strict=True):
            # forward
            z = np.zeros((4, 4))  # a window slides over the image
            for i, j in product(range(4), range(4)):
                z[i, j] = (x[i : i + 3, j : j + 3] * w).sum() + b
            a = sigmoid(z)
            pooled, where = np.zeros((2, 2)), {}
            for i, j in product(range(2), range(2)):
                block = a[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                di, dj = divmod(int(block.argmax()), 2)
                where[i, j] = 2 * i + di, 2 * j + dj
                pooled[i, j] = block.max()
            s = (pooled.ravel() * v).sum() + c
            p = sigmoid(s)
            loss += (p - y) ** 2 / 2 / len(images)
            # backward: the chain rule, from the loss to the kernel
            ds = (p - y) * p * (1 - p) / len(images)
            dv += ds * pooled.ravel()
            dc += ds
            dpooled = (ds * v).reshape(2, 2)
            da = np.zeros((4, 4))  # max pooling: only the largest of each block has a gradient
            for block_index, (i, j) in where.items():
                da[i, j] = dpooled[block_index]
            dz = da * a * (1 - a)
            for i, j in product(range(4), range(4)):
                dw += dz[i, j] * x[i : i + 3, j : j + 3]
            db += dz.sum()
        losses.append(loss)
        w, b, v, c = w - lr * dw, b - lr * db, v - lr * dv, c - lr * dc
    return losses, {"w": w, "b": b, "v": v, "c": c}


def start(cfg) -> dict[str, np.ndarray]:
    """The weights that a run starts from."""
    state = build_run(cfg)[1].network.state_dict()
    return {
        "w": state["features.0.weight"][0, 0].double().numpy(),
        "b": state["features.0.bias"][0].double().numpy(),
        "v": state["classifier.weight"][0].double().numpy(),
        "c": state["classifier.bias"][0].double().numpy(),
    }


@pytest.mark.parametrize(
    ("backend", "options", "lr"),
    [
        ("native", [], 0.01),
        ("naive", [], 0.01),
        # A larger learning rate, another seed, more epochs.
        ("im2col", ["optimizer.lr=2", "seed=3", "trainer.max_epochs=150"], 2.0),
    ],
)
def test_shallow_by_hand(backend: str, options: list[str], lr: float, tmp_path: Path) -> None:
    cfg = compose([f"backend={backend}", *options, "experiment=shallow_by_hand"])
    result = train(cfg, tmp_path / "run")
    images, labels = TwoSigns().read("test")
    epochs = cfg.trainer.max_epochs
    losses, weights = by_hand(images[:, 0] / 255, labels, start(cfg), lr, epochs)
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    found = [float(row["train/loss"]) for row in rows]
    assert len(found) == epochs >= 100
    assert np.abs(np.array(found) - losses).max() < 1e-6
    assert [float(row["val/loss"]) for row in rows[:-1]] == pytest.approx(losses[1:], abs=1e-6)
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    trained = state["network.features.0.weight"][0, 0].double().numpy()
    assert np.abs(trained - weights["w"]).max() < 1e-5
    assert losses[-1] < losses[0]
    if lr == 2:
        assert result.metrics["test/acc"] == 1
        assert losses[-1] < 0.05


def test_strokes(tmp_path: Path) -> None:
    images, labels = Strokes().read("test")
    assert images.shape == (5, 1, 10, 10)
    assert labels.tolist() == [1, 1, 1, 1, 2]
    for image in images[:4, 0]:  # a bar from top to bottom, each at another position
        assert sorted(set(image.sum(0))) == [0, 2550]
    cfg = compose(["backend=im2col", "experiment=strokes"])
    network = build_run(cfg)[1].network
    assert network.features[0].weight.shape == (10, 1, 5, 5)
    assert network.classifier.weight.shape == (10, 360)
    assert (cfg.trainer.max_epochs, cfg.data.batch_size, cfg.optimizer.lr) == (100, 1, 0.01)
    result = train(cfg, tmp_path / "run")
    assert result.metrics["test/acc"] == result.metrics["val/acc"] == 1
    assert result.metrics["test/loss"] < 0.01


def test_ablation_is_a_sweep_whose_report_has_the_effect_of_each_option(tmp_path: Path) -> None:
    params = compose_all(["experiment=lenet5_ablation"], name="train").hydra.sweeper.params
    assert [*params] == ["model.norm", "model.dropout", "model.init", "model.activation"]
    few = ["data=fashion_mnist_mini", "trainer.max_epochs=1", "+trainer.limit_train_batches=4"]
    few += ["tensorboard=scalars", "model.init=default", "model.dropout=0"]  # 4 of 16 members
    done = command("train", "experiment=lenet5_ablation", *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4 completed"
    done = command("report", "outputs/sweeps/lenet5_ablation", cwd=tmp_path)
    report = (tmp_path / "outputs/sweeps/lenet5_ablation/report/report.md").read_text()
    effects = report.split("## Effect of each option")[1]
    for option in ("model.norm=", "model.activation="):
        (line,) = (line for line in effects.splitlines() if line.startswith(f"| {option}"))
        assert line.split("|")[-3].strip() == "2"  # pairs that differ in nothing else
