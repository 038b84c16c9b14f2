"""profile=true: trace and table of operators."""

import json
import shutil
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from finished_runs import OPTIONS

from cnntrain.config import ConfigError, compose
from cnntrain.training import Profile, train


def run(directory: Path, *options: str, profile: bool = True):
    cfg = compose([*OPTIONS, "trainer.max_epochs=1", "+trainer.limit_train_batches=12", *options])
    return train(cfg, directory, callbacks=[Profile(directory)] if profile else [])


def test_five_batches_are_in_the_trace_and_the_table(tmp_path: Path) -> None:
    run(tmp_path / "run")
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert sum(str(name).startswith("ProfilerStep#") for name in names) == 5
    for layer in ("Im2colConv2d: features.0", "Linear: classifier.3"):
        assert sum(str(name).endswith(f".{layer}") for name in names) == 5
    table = (tmp_path / "run/profile/operators.txt").read_text()
    assert "aten::bmm" in table
    assert "Self CPU" in table


def test_results_are_unchanged(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a"), run(tmp_path / "b", profile=False)
    assert first.metrics == second.metrics
    states = [
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("a", "b")
    ]
    assert all((states[0][name] == states[1][name]).all() for name in states[0])


@pytest.mark.parametrize(("batches", "steps"), [(1, 1), (6, 5)])
def test_short_epochs(batches: int, steps: int, tmp_path: Path) -> None:
    """The second one is recorded, as the first batches of a run are slow."""
    few = ["trainer.max_epochs=2", f"+trainer.limit_train_batches={batches}"]
    train(compose([*OPTIONS, *few]), tmp_path / "run", callbacks=[Profile(tmp_path / "run")])
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    names = [str(event.get("name")) for event in trace["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) == steps
    assert sum(name.endswith(".Im2colConv2d: features.0") for name in names) == steps


def test_resumed_epoch_with_too_few_batches_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = ["+trainer.limit_train_batches=12", "trainer.checkpoint_every_n_steps=10"]
    kept = list[bytes]()

    class Keep(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx: int) -> None:
            if batch_idx == 11:
                kept.append((tmp_path / "run/checkpoints/last.ckpt").read_bytes())

    cfg = compose([*OPTIONS, *few, "trainer.max_epochs=2"])
    train(cfg, tmp_path / "run", callbacks=[Keep()])
    for count, epochs in ((0, 1), (1, 0)):  # of two, resumed in the first and in the second
        (tmp_path / "run/checkpoints/last.ckpt").write_bytes(kept[count])
        (tmp_path / "run/result.json").unlink()
        train(cfg, tmp_path / "run", resume=True, callbacks=[Profile(tmp_path / "run")])
        assert (tmp_path / "run/profile").exists() == bool(epochs)
        shutil.rmtree(tmp_path / "run/profile", ignore_errors=True)
    assert caplog.messages.count("profile: no epoch had enough batches left") == 1


def test_command(cnntrain, tmp_path: Path) -> None:
    few = ["+trainer.limit_train_batches=12", "trainer.max_epochs=1", "tensorboard=scalars"]
    done = cnntrain(*OPTIONS[:3], *few, "profile=true", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "profile in run/profile: trace.json, operators.txt" in done.stdout
    assert "profile" not in (tmp_path / "run/.hydra/config.yaml").read_text()
    assert "profile" not in (tmp_path / "run/.hydra/overrides.yaml").read_text()
    done = cnntrain("-m", "profile=true", "seed=0,1")
    assert done.returncode == 2
    assert "profile=true: is for a single run; leave out -m" in done.stderr
    with pytest.raises(ConfigError, match="profile=3: input should be a valid boolean"):
        compose(["profile=3"])
