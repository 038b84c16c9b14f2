"""`cnntrain evaluate`: metrics against a plain loop, on every backend, and its error lines."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finished_runs import FEW, answers, command, finished, plain_network
from omegaconf import OmegaConf

from cnntrain.config import ConfigError
from cnntrain.conv import BACKENDS
from cnntrain.data import FashionMNISTMini
from cnntrain.inference import evaluate
from cnntrain.training import CheckpointError, checkpoint_file
from cnntrain.training.metrics import Predictions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("evaluate") / "[a=b, 'c' (d) \\f", FEW)


def node(backend: str) -> OmegaConf:
    return OmegaConf.create({"_target_": f"cnntrain.conv.{backend}", "_partial_": True})


@pytest.mark.parametrize("backend", [None, *(conv.__name__ for conv in BACKENDS.values())])
@pytest.mark.parametrize("split", ["test", "val"])
def test_accuracy_and_loss_on_every_backend(run: Path, backend: str | None, split: str) -> None:
    data = FashionMNISTMini()
    loader = data.test_loader() if split == "test" else data.val_loader()
    logits, labels = answers(plain_network(run), loader)
    found = evaluate(run, split=split, backend=node(backend) if backend else None)
    right = (logits.argmax(1) == labels).double().mean().item()
    assert found.accuracy == pytest.approx(right, abs=1.5 / len(labels))
    loss = -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean().item()
    assert found.loss == pytest.approx(loss, abs=1e-5)
    assert found.outcome.confusion[1].sum() == len(labels)
    torch.testing.assert_close(
        found.outcome.probabilities, logits.softmax(1).float(), atol=1e-4, rtol=0
    )


def test_metrics_are_those_of_the_run(run: Path) -> None:
    recorded = json.loads((run / "result.json").read_text())["metrics"]
    found = evaluate(run)
    assert found.accuracy == recorded["test/acc"]
    assert found.loss == pytest.approx(recorded["test/loss"], rel=1e-6)
    assert evaluate(run, split="val").accuracy == recorded["val/acc"]


def test_flips_are_averaged(run: Path) -> None:
    network, data = plain_network(run), FashionMNISTMini()
    logits, labels = answers(network, data.test_loader())
    flipped, _ = answers(lambda images: network(images.flip(-1)), data.test_loader())
    mean = (logits.softmax(1) + flipped.softmax(1)) / 2
    found = evaluate(run, tta="flip")
    torch.testing.assert_close(found.outcome.probabilities, mean.float(), atol=1e-4, rtol=0)
    assert found.loss == pytest.approx(-mean.log()[torch.arange(1000), labels].mean().item(), 1e-4)


def test_checkpoints(run: Path, tmp_path: Path) -> None:
    data = FashionMNISTMini()
    for name in ("best", "last"):
        logits, labels = answers(plain_network(run, name), data.val_loader())
        right = (logits.argmax(1) == labels).double().mean().item()
        assert evaluate(run, checkpoint=name, split="val").accuracy == pytest.approx(
            right, abs=3e-3
        )
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes((run / "checkpoints/last.ckpt").read_bytes())
    assert evaluate(run, checkpoint=str(copy)).accuracy == evaluate(run, checkpoint="last").accuracy
    damaged = bytearray(copy.read_bytes())
    damaged[5000] ^= 1
    copy.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"copy.ckpt: is damaged: its checksum is wrong"):
        evaluate(run, checkpoint=str(copy))


def test_mistakes_have_their_index_in_the_files(run: Path) -> None:
    found = evaluate(run, split="val")
    images, labels = FashionMNISTMini().read("train")
    worst = found.mistakes[0]
    names = FashionMNISTMini.classes
    assert names[labels[worst["index"]]] == worst["class"] != worst["predicted"]
    image = FashionMNISTMini().normalised(torch.from_numpy(images[[worst["index"]]]))
    with torch.no_grad():
        shares = plain_network(run)(image).softmax(1)[0]
    assert names[int(shares.argmax())] == worst["predicted"]
    assert shares.max().item() == pytest.approx(worst["probability"], abs=1e-4)


def test_files_of_an_earlier_evaluation_are_removed(run: Path, tmp_path: Path) -> None:
    found = evaluate(run)
    assert len(found.write(tmp_path)) == 3
    right = replace(
        found, outcome=Predictions(found.outcome.probabilities, found.outcome.predicted)
    )
    assert [file.name for file in right.write(tmp_path)] == ["evaluation.json", "confusion.png"]
    assert len(list(tmp_path.iterdir())) == 2


def test_command(run: Path, tmp_path: Path) -> None:
    done = command("evaluate", f"run={run.name}", "backend=naive", "tta=flip", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    (folder,) = (run / "evaluate").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == [
        "confusion.png",
        "evaluation.json",
        "mistakes.png",
    ]
    content = json.loads((folder / "evaluation.json").read_text())
    assert content["backend"] == "cnntrain.conv.NaiveConv2d"
    assert content["images"] == 1000
    assert f"test accuracy   {content['accuracy']:.2%}" in done.stdout
    assert "weights of epoch 2" in done.stdout
    assert "averaged with their horizontal flips" in done.stdout
    shirt = next(row for row in content["classes"] if row["class"] == "Shirt")
    line = next(line for line in done.stdout.splitlines() if line.strip().startswith("Shirt"))
    assert line.split()[1:5] == [
        "100",
        *(f"{shirt[name]:.1%}" for name in ("precision", "recall", "f1")),
    ]


def test_invalid_options_are_reported_on_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in {
        ("run=empty",): "run=empty: is not a run directory",
        (
            f"run={run}",
            "split=vall",
            "tta=flop",
        ): "split=vall: input should be 'test' or 'val'\n  tta=flop: input should be 'flip'",
        (
            f"run={run}",
            "-m",
            "split=val,test",
        ): "-m: evaluate takes one run; start it once for each",
    }.items():
        done = command("evaluate", *arguments, cwd=tmp_path)
        assert done.returncode == 2, (arguments, done)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not list((tmp_path / "empty").iterdir())
    for options, message in (
        ({"checkpoint": "bst"}, "checkpoint=bst: no such file; use best, last, or a path"),
        ({"root": "/x"}, "root=/x: the data set of this run has no folder"),
        ({"precision": "16-mixed"}, "precision=16-mixed: the CPU has no fast float16"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(run, **options)


def test_log_is_not_written_to_a_file(run: Path, tmp_path: Path) -> None:
    shown = command("evaluate", f"run={run}", "--cfg", "hydra", cwd=tmp_path).stdout
    assert "cnntrain.terminal.TerminalHandler" in shown
    assert "FileHandler" not in shown


def test_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"best\.ckpt is missing; there is none: the run has"):
        evaluate(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": {"_target_": "shutil.copyfile", "src": "a", "dst": "b"}},
            "data._target_=shutil.copyfile: must be a class derived from cnntrain.data.ImageData",
        ),
        (
            {"loss": {"_target_": "torch.nn.Dropout", "p": {"_target_": "shutil.copyfile"}}},
            "a _target_ may stand only in",
        ),
        ({"model": {"_target_": "nomod.X"}}, "model._target_=nomod.X: cannot be imported"),
        ({"trainer": None}, "trainer=null: must name a choice"),
    ],
)
def test_checkpoint_runs_no_code(
    change: dict, message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("")
    content = checkpoint_file.read(run / "checkpoints/best.ckpt")
    content["config"] |= change
    checkpoint_file.write(tmp_path / "evil.ckpt", content)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        evaluate(run, checkpoint="evil.ckpt")
    assert not (tmp_path / "b").exists()


def test_damaged_checkpoint_has_exit_code_1(run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.ckpt").write_bytes(b"PK")
    before = sorted(run.iterdir())
    done = command("evaluate", f"run={run}", "checkpoint=bad.ckpt", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("cnntrain: bad.ckpt: is cut off")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(run.iterdir()) == before
