"""Signals, a full disk and invalid resumes, with real processes."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Start
from forked import Command, run_command, wait_until

from cnntrain.training import checkpoint_file

MINI = ["data=fashion_mnist_mini", "tensorboard=scalars", "hydra.run.dir=run"]
LONG = ["trainer.max_epochs=500", "data.batch_size=16", "trainer.accumulate_grad_batches=3"]
LONG.append("+trainer.limit_train_batches=70")


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/result.json").read_text())


@pytest.mark.parametrize(("signum", "code"), [("TERM", 143), ("INT", 130), ("USR1", 138)])
def test_signal_saves_and_exits(start: Start, tmp_path: Path, signum: str, code: int) -> None:
    process = start(*MINI, *LONG)
    wait_until(process, (tmp_path / "run/checkpoints/previous.ckpt").exists)
    if signum == "TERM":
        rejected = run_command(["train", MINI[0], "resume=run"], tmp_path)
        assert rejected.returncode == 2
        assert "run: another process is training there" in rejected.stderr

    process.send_signal(getattr(signal, f"SIG{signum}"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    lines = [line for line in err.splitlines() if line]
    assert lines[0].startswith(f"cnntrain: SIG{signum}: saving a checkpoint")
    assert lines[1:] == [f"cnntrain: interrupted by SIG{signum}; resume with resume=run"]
    assert result(tmp_path)["status"] == "interrupted"
    saved = checkpoint_file.read(tmp_path / "run/checkpoints/last.ckpt")
    epochs = result(tmp_path)["epochs"]
    assert saved["position"]["epoch"] == epochs >= 2
    *_, last = csv.DictReader((tmp_path / "run/metrics.csv").open())
    for name in ("train/loss", "val/loss", "val/acc"):
        assert result(tmp_path)["metrics"][name] == float(last[name])
    steps = -(-70 // 3)  # in an epoch: a third of its batches
    done = epochs * steps + -(-saved["position"]["batch"] // 3)
    assert saved["global_step"] == done


BLOCKED = """
import ctypes
from cnntrain import interruption

interruption.SIGNAL_TIMEOUT = 2
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with interruption.watching("leave"), interruption.interruption.answering("{answer}"):
    interruption.interruption.before_leaving = lambda: print("left", flush=True)
    libc.pthread_mutex_lock(mutex)
    print("blocked", flush=True)
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a default mutex blocks its own thread")
@pytest.mark.parametrize(
    ("answer", "signums", "message"),
    [
        ("note", ["INT", "INT"], ""),
        ("note", ["USR1", "INT"], ""),
        ("leave", ["TERM"], ""),
        ("raise", ["TERM"], "; stuck for 2 s, no checkpoint was saved"),
        ("note", ["USR2"], "; stuck for 2 s, no checkpoint was saved"),
    ],
)
def test_signal_while_the_main_thread_is_blocked(
    answer: str, signums: list[str], message: str
) -> None:
    """In C, as in a collective, where Python's handlers do not run."""
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED.format(answer=answer)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "blocked\n"
        for name in signums:
            time.sleep(0.5)
            process.send_signal(getattr(signal, f"SIG{name}"))
        try:
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 128 + getattr(signal, f"SIG{signums[-1]}")
    assert out == "left\n"
    assert err == f"\ncnntrain: interrupted by SIG{signums[-1]}{message}\n"


def test_signal_before_the_first_checkpoint(start: Start, tmp_path: Path) -> None:
    process = start(*MINI, *LONG)
    wait_until(process, (tmp_path / "run/.hydra/config.yaml").exists)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert "SIGTERM" in err


def test_signal_while_python_exits() -> None:
    """A second Ctrl-C often comes after the checkpoint is saved."""
    code = (
        "import os, signal\n"
        "from cnntrain.interruption import interruption, watching\n"
        "with watching('leave'):\n"
        "    interruption.received = signal.SIGTERM\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('not reached')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 130
    assert (done.stdout, done.stderr) == ("", "\ncnntrain: interrupted by SIGINT\n")


SLOW = """\
import time
from pathlib import Path

from torch import nn


class Slow(nn.Conv2d):
    def forward(self, x):
        if len(x) > 2:  # no dry run
            Path("computing").touch()
            time.sleep(100)
        return super().forward(x)
"""


def test_second_ctrl_c_exits_within_a_step(start: Start, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    process = start(*MINI, "backend._target_=slow.Slow", "model=shallow")
    wait_until(process, (tmp_path / "computing").exists)
    process.send_signal(signal.SIGINT)
    first = "\ncnntrain: SIGINT: saving a checkpoint; interrupt again to stop at once\n"
    wait_until(process, lambda: process.output()[1] == first)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == f"{first}\ncnntrain: interrupted by SIGINT\n"
    assert result(tmp_path)["status"] == "interrupted"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prlimit")
def test_no_space_for_a_checkpoint(tmp_path: Path) -> None:
    """As on a full disk: the checkpoint stays, and the run resumes once there is space."""
    options = ["train", *MINI, "scheduler=none", "+trainer.limit_train_batches=3"]
    assert run_command([*options, "trainer.max_epochs=1"], tmp_path).returncode == 0
    path = tmp_path / "run/checkpoints/last.ckpt"
    before, names = path.read_bytes(), sorted(path.parent.iterdir())
    assert len(before) > 600_000
    more = [*options, "resume=auto", "trainer.max_epochs=3"]
    full = Command(more, tmp_path)
    resource.prlimit(full.pid, resource.RLIMIT_FSIZE, (600_000, 600_000))
    _, err = full.communicate()
    assert full.returncode == 1
    assert err == f"cnntrain: {path}: File too large; once that is fixed, resume with resume=run\n"
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == names
    assert result(tmp_path)["status"] == "failed"
    assert result(tmp_path)["epochs"] == 2  # the second was computed
    assert "val/acc" in result(tmp_path)["metrics"]

    resumed = run_command(more, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from last.ckpt at epoch 2, batch 1" in resumed.stdout
    assert result(tmp_path)["epochs"] == 3

    # The result of a completed run is printed without importing torch.
    imported = "print('torch imported:', 'torch' in sys.modules)"
    code = f"import sys\nfrom cnntrain.commands import main\ntry: main()\nfinally: {imported}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *more]
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("already completed\n")
    assert f"{result(tmp_path)['metrics']['test/acc']:.2%}" in again.stdout
    assert "torch imported: False" in again.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["resume=nowhere"], "resume=nowhere: holds no run; give the folder of one, or auto"),
        (["resume="], "resume=: holds no run"),
        (["resume=auto", "-m"], "resume=auto: continues one run; leave out -m"),
        (["resume=auto", "hydra.run.dir=null"], "hydra.run.dir"),
        (["resume=begun", "optimizer.lr=1"], "optimizer.lr=1: the run was started with 0.005"),
        (["resume=begun", "hydra.run.dir=x"], "hydra.run.dir=x: goes with resume=auto"),
        (["resume=begun", "optimizer.lrr=1"], "did you mean 'lr'"),
        (["resume=broken"], "resume=broken: .hydra/config.yaml or result.json is damaged"),
    ],
    ids=str,
)
def test_invalid_resume_is_rejected(tmp_path: Path, options: list[str], message: str) -> None:
    from omegaconf import OmegaConf

    from cnntrain.config import compose

    for name in ("begun", "broken"):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        OmegaConf.save(compose(["data=fashion_mnist_mini"]), tmp_path / name / ".hydra/config.yaml")
    (tmp_path / "begun/.hydra/overrides.yaml").write_text("- data=fashion_mnist_mini\n")
    (tmp_path / "broken/result.json").write_text("{}")
    before = {file: file.is_file() and file.read_bytes() for file in tmp_path.rglob("*")}
    done = run_command(["train", *options], tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert {f: f.is_file() and f.read_bytes() for f in tmp_path.rglob("*")} == before


def test_resume_auto_requires_a_fixed_folder(tmp_path: Path) -> None:
    done = run_command(["train", "resume=auto"], tmp_path)
    assert done.returncode == 2
    assert "resume=auto: needs a folder that stays the same; add hydra.run.dir=" in done.stderr
    assert list(tmp_path.iterdir()) == []
