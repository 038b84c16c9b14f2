"""Runs: results against plain loops, and the files of the run directory."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from weights import load

from cnntrain.atomic import write_json
from cnntrain.config import ConfigError, build, compose
from cnntrain.data import FashionMNISTMini
from cnntrain.training import Result, train

SHORT = ["data=fashion_mnist_mini", "trainer=cpu", "trainer.max_epochs=1"]
SCALARS = "tensorboard=scalars"


def run(directory: Path, *overrides: str) -> tuple[Result, DictConfig]:
    cfg = compose([*SHORT, "trainer.progress_bar=false", *overrides])
    return train(cfg, directory), cfg


def scalars(directory: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in events.Scalars(tag)]


@torch.no_grad()
def evaluate(network: nn.Module, loader: Any) -> tuple[float, float]:
    """Mean loss and accuracy over the whole set, in float64."""
    logits, labels = zip(*[(network(x), y) for x, y in loader], strict=True)
    scores, truth = torch.cat(logits).double(), torch.cat(labels)
    loss = -scores.log_softmax(1)[torch.arange(len(truth)), truth].mean()
    return loss.item(), (scores.argmax(1) == truth).double().mean().item()


def test_metrics_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    result, cfg = run(tmp_path / "run", "trainer.max_epochs=2", "loss.label_smoothing=0.1")
    data = build(cfg.data)
    network = load(
        cfg, tmp_path / "run/checkpoints/best.ckpt", in_shape=(1, 28, 28), num_classes=10
    )
    for stage, loader in [("val", data.val_loader()), ("test", data.test_loader())]:
        loss, accuracy = evaluate(network, loader)
        assert result.metrics[f"{stage}/acc"] == pytest.approx(accuracy, abs=1e-12)
        assert result.metrics[f"{stage}/loss"] == pytest.approx(loss, rel=1e-5)  # unsmoothed
    assert result.metrics["test/acc"] > 0.6


def test_training_is_the_plain_loop(tmp_path: Path) -> None:
    """The same weights as a loop in plain PyTorch."""
    result, cfg = run(
        tmp_path / "run",
        "model.dropout=0",
        "optimizer=sgd",
        "scheduler=none",
        "trainer.test_checkpoint=last",
        "optimizer.lr=0.02",
        "seed=5",
    )
    torch.manual_seed(5)
    import lightning

    lightning.seed_everything(5, verbose=False)
    data = build(cfg.data)
    network = build(cfg.model, conv=nn.Conv2d, in_shape=(1, 28, 28), num_classes=10)
    momentum = {"momentum": 0.9, "nesterov": True, "fused": cfg.optimizer.fused}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, **momentum)
    for images, labels in data.train_loader(seed=5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    trained = load(
        cfg, tmp_path / "run/checkpoints/last.ckpt", in_shape=(1, 28, 28), num_classes=10
    )
    for mine, theirs in zip(network.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    accuracy = evaluate(network.eval(), data.test_loader())[1]
    assert result.metrics["test/acc"] == pytest.approx(accuracy, abs=0.002)


def test_backends_train_equally_and_exchange_checkpoints(tmp_path: Path) -> None:
    losses, results = {}, {}
    for name in ("native", "im2col", "naive"):
        results[name], _ = run(
            tmp_path / name,
            f"backend={name}",
            "data.batch_size=80",
            "trainer.log_every_n_steps=1",
            "+trainer.limit_train_batches=40",
            # At a larger learning rate, a last bit that picks another pixel in max pooling grows
            # beyond comparison.
            "scheduler=none",
            "optimizer.lr=2e-4",
            SCALARS,
        )
        losses[name] = scalars(tmp_path / name, "train/loss_step")
    for name in ("im2col", "naive"):
        assert losses[name] == pytest.approx(losses["native"], abs=1e-4)
    data = FashionMNISTMini()
    for trained in losses:
        for used in losses:
            network = load(
                compose([*SHORT, f"backend={used}"]),
                tmp_path / trained / "checkpoints/best.ckpt",
                in_shape=(1, 28, 28),
                num_classes=10,
            )
            accuracy = evaluate(network, data.test_loader())[1]
            one_image = 1 / 1000
            assert abs(accuracy - results[trained].metrics["test/acc"]) < 1.5 * one_image


def test_seed_determines_everything(tmp_path: Path) -> None:
    options = ("data.hflip=0.5", "data.crop=2", "+trainer.limit_train_batches=5", SCALARS)
    first, again, other = (
        run(tmp_path / name, f"seed={seed}", *options)[0].metrics
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert first == again
    assert first["train/loss"] != other["train/loss"]


def test_test_set_is_opened_once_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, bool]] = []
    read = FashionMNISTMini.read

    def record(self: FashionMNISTMini, split: Any) -> Any:
        opened.append((split, (tmp_path / "run/checkpoints/last.ckpt").exists()))
        return read(self, split)

    monkeypatch.setattr(FashionMNISTMini, "read", record)
    run(tmp_path / "run", "+trainer.limit_train_batches=3")
    assert opened == [("train", False), ("test", True)]


def test_files_of_the_run_directory(tmp_path: Path) -> None:
    result, _ = run(
        tmp_path / "run",
        "trainer.max_epochs=3",
        "trainer.log_every_n_steps=2",
        "+trainer.limit_train_batches=6",
        "optimizer.lr=0",  # so that nothing changes, and the first epoch is the best
        "model.norm=false",
    )
    directory = tmp_path / "run"
    files = {str(p.relative_to(directory)).split(".tfevents")[0] for p in directory.rglob("*.*")}
    assert files == {
        ".hydra",
        ".hydra/config.yaml",
        ".hydra/overrides.yaml",
        ".lock",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "checkpoints/previous.ckpt",
        "curves/train/events.out",
        "curves/val/events.out",
        "environment.json",
        "events.out",
        "metrics.csv",
        "00003/projector/metadata.tsv",
        "00003/projector/sprite.png",
        "00003/projector/tensors.tsv",
        "projector_config.pbtxt",
        "result.json",
        "train.log",
    }
    assert len(list(directory.glob("events*"))) == 1

    recorded = json.loads((directory / "result.json").read_text())
    assert recorded["status"] == "completed"
    assert recorded["metrics"] == result.metrics
    evaluated = ("loss", "acc", "balanced_acc", "macro_f1")
    names = {"train": ("loss", "acc"), "val": evaluated, "test": evaluated}
    assert set(result.metrics) == {f"{stage}/{name}" for stage in names for name in names[stage]}
    rows = list(csv.DictReader((directory / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == ["6", "12", "18"]
    columns = "train/loss,train/acc,val/loss,val/acc,val/balanced_acc,val/macro_f1"
    assert ",".join(rows[0]) == f"epoch,step,lr,{columns},grad_norm"
    for tag in columns.split(","):
        logged = [float(row[tag]) for row in rows]
        assert scalars(directory, tag) == pytest.approx(logged)
    saved = {
        name: torch.load(directory / f"checkpoints/{name}.ckpt", weights_only=True)["epoch"]
        for name in ("best", "last")
    }
    assert saved == {"best": 0, "last": 2}
    assert result.metrics["val/acc"] == float(rows[0]["val/acc"])
    assert recorded["tested_epoch"] == 1
    norms, rates = (scalars(directory, f"weight_update/{name}") for name in ("grad_norm", "lr"))
    assert len(norms) == len(rates) == 9
    assert len(scalars(directory, "wall_time/images_per_second")) == 3

    environment = json.loads((directory / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(environment["git"]) == {"revision", "diff"}


def test_hparams_tab_has_options_and_final_metrics(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    result, _ = run(tmp_path / "run", "optimizer.lr=0.001", "+trainer.limit_train_batches=3")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    content = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(data)
        for tag, data in events.PluginTagToContent("hparams").items()
    }
    start = content["_hparams_/session_start_info"].session_start_info.hparams
    assert start["optimizer.lr"].number_value == 0.001
    assert start["model._target_"].string_value == "cnntrain.models.LeNet5"
    assert start["model.norm"].string_value == "true"
    assert start["model"].string_value == "lenet5"
    assert start["data"].string_value == "fashion_mnist_mini"
    metrics = content["_hparams_/experiment"].experiment.metric_infos
    assert {m.name.tag for m in metrics} == set(result.metrics)
    for tag, value in result.metrics.items():
        assert events.Scalars(tag)[-1].value == pytest.approx(value)
    assert "_hparams_/session_end_info" in content
    assert "hp_metric" not in events.Tags()["scalars"]


def test_options_reach_the_library(tmp_path: Path) -> None:
    run(
        tmp_path / "clip",
        "optimizer=sgd",
        "optimizer.momentum=0",
        "optimizer.nesterov=false",
        "optimizer.lr=1",
        "scheduler=none",
        "trainer.gradient_clip_val=0.01",
        "trainer.accumulate_grad_batches=2",
        "trainer.log_every_n_steps=1",
        "trainer.test_checkpoint=last",
        "+trainer.limit_train_batches=2",
    )
    assert len(scalars(tmp_path / "clip", "weight_update/lr")) == 1  # two batches, one step
    norms = scalars(tmp_path / "clip", "weight_update/grad_norm")
    assert norms[0] > 0.1  # as it was before clipping
    cfg = compose(SHORT)
    import lightning

    lightning.seed_everything(0, verbose=False)
    before = build(cfg.model, conv=nn.Conv2d, in_shape=(1, 28, 28), num_classes=10)
    after = load(cfg, tmp_path / "clip/checkpoints/last.ckpt", in_shape=(1, 28, 28), num_classes=10)
    steps = zip(before.parameters(), after.parameters(), strict=True)
    moved = math.sqrt(sum((a - b).square().sum().item() for a, b in steps))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_early_stopping_and_last_checkpoint(tmp_path: Path) -> None:
    run(
        tmp_path / "run",
        "trainer.max_epochs=9",
        "trainer.early_stopping=2",
        "trainer.monitor=val/loss",
        "optimizer.lr=0",
        "model.norm=false",
        "+trainer.limit_train_batches=1",
        "scheduler=none",
        SCALARS,
    )
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    assert len(rows) == 3  # the first, and two without a better one


@pytest.mark.parametrize("precision", ["bf16-mixed", "32"])
def test_precision_is_that_of_the_convolution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    from cnntrain.conv import Im2colConv2d

    seen = set()
    forward = Im2colConv2d.forward

    def observed(self: Im2colConv2d, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        if self.training:
            seen.add(out.dtype)
        return out

    monkeypatch.setattr(Im2colConv2d, "forward", observed)
    options = ("backend=im2col", "+trainer.limit_train_batches=2", SCALARS)
    run(tmp_path / "run", f"trainer.precision={precision}", *options)
    assert seen == {torch.bfloat16 if precision == "bf16-mixed" else torch.float32}


def test_deterministic_mode(tmp_path: Path) -> None:
    try:
        run(
            tmp_path / "run",
            "trainer.deterministic=true",
            "+trainer.limit_train_batches=1",
            SCALARS,
        )
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_compile_computes_the_same(tmp_path: Path) -> None:
    options = ("backend=im2col", "model=shallow", "+trainer.limit_train_batches=3")
    options = (*options, "data.batch_size=64", "data.eval_batch_size=500", SCALARS)
    compiled, eager = (
        run(tmp_path / str(mode), f"trainer.compile={mode}", *options)[0].metrics
        for mode in ("true", "false")
    )
    assert compiled == pytest.approx(eager, abs=1e-3)


def test_directory_of_another_run_is_rejected(tmp_path: Path) -> None:
    run(tmp_path / "run", "+trainer.limit_train_batches=1")
    before = (tmp_path / "run/result.json").read_text()
    with pytest.raises(ConfigError, match="holds another run already"):
        run(tmp_path / "run")
    assert (tmp_path / "run/result.json").read_text() == before


def test_error_of_a_constructor_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer: Invalid learning rate: -1"):
        run(tmp_path / "a", "optimizer.lr=-1")
    with pytest.raises(ConfigError, match=r"^data.val_size=5000 leaves nothing"):
        run(tmp_path / "b", "data.val_size=5000")
    assert not (tmp_path / "a").exists()  # rejected before anything is written


def test_failure_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, split: str) -> None:
        raise OSError("the disk failed")

    monkeypatch.setattr(FashionMNISTMini, "read", fail)
    with pytest.raises(OSError, match="the disk failed"):
        run(tmp_path / "run")
    recorded = json.loads((tmp_path / "run/result.json").read_text())
    assert recorded["status"] == "failed"
    assert recorded["error"] == "OSError: the disk failed"


def test_json_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
