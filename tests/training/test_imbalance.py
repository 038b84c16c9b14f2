"""Runs with few images of some classes: class weights, sampler, metrics over the classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_runs import OPTIONS

from cnntrain.config import ConfigError, compose
from cnntrain.data import FashionMNISTMini
from cnntrain.inference import evaluate
from cnntrain.training import checkpoint_file, dry_run, train

FEW = [
    "data._target_=test_imbalance.Few",
    "data.batch_size=50",
    "loss.class_weights=balanced",
    "loss.label_smoothing=0.1",
    "trainer.monitor=val/balanced_acc",
    "trainer.early_stopping=9",
    "scheduler=none",
]


class Few(FashionMNISTMini):
    """The first classes have a tenth of their images, the last has none."""

    train_size = 5_000 * 9 // 10 - 4 * 450

    def read(self, split):
        images, labels = super().read(split)
        if split == "test":
            return images, labels
        kept = [np.flatnonzero(labels == k)[: 50 if k < 4 else 500] for k in range(9)]
        rows = np.sort(np.concatenate(kept))
        return images[rows], labels[rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("few") / "run"
    train(compose([*OPTIONS, *FEW]), directory)
    return directory


def test_weights_are_counted_on_the_images_to_train_on(run: Path) -> None:
    data = Few()
    labels = data.read("train")[1][data.split()[0]]
    counts = np.bincount(labels, minlength=10)
    assert counts[9] == 0
    expected = [len(labels) / (9 * count) if count else 0.0 for count in counts]
    for name in ("best", "last"):
        state = checkpoint_file.read(run / f"checkpoints/{name}.ckpt")["state_dict"]
        assert state["loss.weight"].tolist() == pytest.approx(expected, rel=1e-6)


def test_evaluate_has_the_metrics_of_the_run(run: Path, tmp_path: Path) -> None:
    recorded = json.loads((run / "result.json").read_text())["metrics"]
    for split in ("val", "test"):
        found = evaluate(run, split=split)
        found.write(tmp_path)
        content = json.loads((tmp_path / "evaluation.json").read_text())
        for name in ("balanced_acc", "macro_f1"):
            assert content[name] == recorded[f"{split}/{name}"]
        # Neither weighted nor smoothed.
        chosen = found.outcome.probabilities[range(len(found.images)), found.outcome.labels]
        assert found.loss == pytest.approx(-chosen.log().mean().item(), rel=1e-5)
        assert found.loss == pytest.approx(recorded[f"{split}/loss"], rel=1e-5)
    assert content["balanced_acc"] == pytest.approx(content["accuracy"])  # classes of equal size


def test_best_epoch_is_that_of_the_monitored_metric(run: Path) -> None:
    content = checkpoint_file.read(run / "checkpoints/best.ckpt")
    result = json.loads((run / "result.json").read_text())
    assert content["value"] == result["metrics"]["val/balanced_acc"]


def test_resumed_with_the_stored_weights(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    last = tmp_path / "run/checkpoints/last.ckpt"
    content = checkpoint_file.read(last)
    content["state_dict"]["loss.weight"] *= 2
    checkpoint_file.write(last, content)
    more = [*OPTIONS, *FEW, "trainer.max_epochs=3"]
    train(compose(more), tmp_path / "run", resume=True)
    stored = checkpoint_file.read(last)["state_dict"]["loss.weight"]
    assert torch.equal(stored, content["state_dict"]["loss.weight"])
    with pytest.raises(ConfigError, match=r"loss\.class_weights=null: the run was started with"):
        train(compose([*more, "loss.class_weights=null"]), tmp_path / "run", resume=True)


def test_checkpoint_from_before_class_weights(tmp_path: Path) -> None:
    options = [*OPTIONS, "+trainer.limit_train_batches=2", "scheduler=none"]
    train(compose([*options, "trainer.max_epochs=1"]), tmp_path)
    last = tmp_path / "checkpoints/last.ckpt"
    content = checkpoint_file.read(last)
    del content["config"]["loss"]["class_weights"], content["config"]["data"]["sampler"]
    for row in content["callbacks"]["EpochLog"]["epochs"]:
        del row["val/balanced_acc"], row["val/macro_f1"]
    checkpoint_file.write(last, content)
    result = train(compose(options), tmp_path, resume=True)
    assert np.isnan(result.history["val/macro_f1"]).tolist() == [True, False]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1,2]", "loss.class_weights=[1, 2]: has 2 numbers for 10 classes; give one per class"),
        ("balance", "loss.class_weights=balance: input should be 'balanced', or input should be"),
        ("[1,-2]", "loss.class_weights=[1, -2]: input should be "),
    ],
)
def test_invalid_weights(value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dry_run(compose([*OPTIONS, f"loss.class_weights={value}"]))
    (problem,) = caught.value.problems
    assert problem.startswith(message)
