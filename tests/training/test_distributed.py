"""Runs of several processes: results equal to those of one process, and ends of processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Start
from forked import wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torturing.runs import differences, record

from cnntrain.config import ConfigError, build, compose
from cnntrain.config.cross_checks import cross_check_data
from cnntrain.config.resume import resume_problems, with_overrides
from cnntrain.process_info import ProcessInfo
from cnntrain.training import ProcessLost, checkpoint_file, train
from cnntrain.training.distributed import connect

DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.progress_bar=false"]
MINI = ["data=fashion_mnist_mini", "data.hflip=0.5", "data.crop=2", "data.erase=0.3"]
MINI += ["trainer.max_epochs=2", "trainer.log_every_n_steps=1", "optimizer.fused=false"]
MINI += ["trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1.0"]
# Nothing depends on which images are together in a process. The parts are uneven, and one is empty:
# the last batch of the 500 validation images has one.
EXACT = [
    *MINI,
    "model=shallow",
    "data.val_size=500",
    "data.batch_size=1001",
    "data.eval_batch_size=499",
    "trainer.progress_bar=false",
    "loss.class_weights=balanced",
    "data.sampler=balanced",
    "trainer.monitor=val/macro_f1",
]
# All that has a state, batch statistics and dropout of each process included.
EVERYTHING = [
    *MINI,
    "data.batch_size=100",
    "data.eval_batch_size=200",
    "trainer.ema=0.9",
    "trainer.early_stopping=5",
    "trainer.checkpoint_every_n_steps=2",
    "+trainer.limit_train_batches=25",
    "optimizer.lr=0.005",
    "tensorboard=scalars",
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def scalars(folder: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in events.Scalars(tag)]


def children(process: Any) -> list[int]:
    """The worker processes that a command has started."""
    found = (
        line.split(maxsplit=2) for line in ps("-Aww", "-o", "pid=", "-o", "ppid=", "-o", "args=")
    )
    mine = [(pid, args) for pid, parent, args in found if int(parent) == process.pid]
    return [int(pid) for pid, args in mine if "multiprocessing.spawn" in args]


def ps(*options: str) -> list[str]:
    return subprocess.run(["ps", *options], capture_output=True, text=True).stdout.splitlines()


def steps(checkpoint: Path) -> int:
    for _ in range(100):
        with contextlib.suppress(checkpoint_file.DamagedError):  # has no name for a moment
            return checkpoint_file.read(checkpoint)["global_step"]
        time.sleep(0.01)
    raise AssertionError(f"{checkpoint} is missing")


def epochs(log: Path) -> int:
    return log.read_text().count("epoch ") if log.exists() else 0


def gone(pid: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(state.startswith("Z") for state in ps("-o", "stat=", "-p", str(pid))):
            return True
        time.sleep(0.02)
    return False


def test_two_processes_compute_what_one_does(start: Start, tmp_path: Path) -> None:
    runs = tmp_path / "one", tmp_path / "two"
    train(compose([*EXACT, "trainer=cpu"]), runs[0])
    process = start(*EXACT, *DDP, "hydra.run.dir=two")
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    assert out.count("epoch 1/2") == out.count("test accuracy") == 1
    files = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in runs]
    for key, tensor in files[0]["state_dict"].items():
        torch.testing.assert_close(files[1]["state_dict"][key], tensor, rtol=1e-5, atol=1e-6)
    tags = "train/loss_step", "weight_update/grad_norm", "train/loss", "train/acc", "val/loss"
    for tag in tags:
        one, two = (scalars(run, tag) for run in runs)
        assert len(two) == (6 if tag in tags[:2] else 2)  # updates, or epochs
        assert two == pytest.approx(one, rel=1e-5)
    metrics = [result(run)["metrics"] for run in runs]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    assert {path.name for path in runs[1].iterdir() if "tfevents" in path.name}
    assert not differences_of_names(*runs)


def differences_of_names(one: Path, two: Path) -> set[str]:
    """Files that only one of the runs has, except those of a command line or a resume."""
    names = [
        {str(f.relative_to(run)) for f in run.rglob("*") if "tfevents" not in f.name}
        for run in (one, two)
    ]
    return (names[0] ^ names[1]) - {"train.log", ".hydra/overrides.yaml"}


def test_killed_interrupted_and_resumed(start: Start, tmp_path: Path) -> None:
    """To the bits of an uninterrupted run, which torchrun starts."""
    uninterrupted = start(*EVERYTHING, *DDP, "hydra.run.dir=uninterrupted", by=TORCHRUN)
    last = tmp_path / "run/checkpoints/last.ckpt"
    for rank, signum, code in [(1, "KILL", 1), (1, "INT", 130), (0, "KILL", -9), (0, "", 0)]:
        before = steps(last) if last.exists() else 0
        process = start(*EVERYTHING, *DDP, "hydra.run.dir=run", "resume=auto")
        if signum:
            wait_until(process, last.exists)
            wait_until(process, lambda before=before: steps(last) != before)
            (other,) = children(process)
            os.kill(other if rank else process.pid, getattr(signal, f"SIG{signum}"))
        _, err = process.communicate(timeout=180)
        assert process.returncode == code, err
        assert not signum or gone(other)
        status = {1: "failed", 130: "interrupted", -9: "running", 0: "completed"}[code]
        assert result(tmp_path / "run")["status"] == status
        if code == 1:
            lost = "process 2 of 2 was killed by SIGKILL"
            assert err == f"cnntrain: {lost}; resume with resume=run\n"
            assert result(tmp_path / "run")["error"] == f"ProcessLost: {lost}"
        elif code == 130:
            interrupted = "cnntrain: interrupted by SIGINT; resume with resume=run"
            assert err.splitlines()[-1] == interrupted
            assert checkpoint_file.read(last)["position"]["batch"] > 0
    out, err = uninterrupted.communicate(timeout=180)
    assert uninterrupted.returncode == 0, err
    assert "Traceback" not in err
    assert out.count("epoch 1/2") == out.count("test accuracy") == 1
    runs = tmp_path / "uninterrupted", tmp_path / "run"
    assert not list(differences(*map(record, runs)))
    assert not differences_of_names(*runs)


BAD = """\
import torch

from cnntrain.training import CrossEntropy


class Bad(CrossEntropy):
    calls = 0

    def forward(self, input, target):
        loss = super().forward(input, target)
        self.calls += self.training and torch.is_grad_enabled()
        there = torch.distributed.is_initialized() and torch.distributed.get_rank() == 1
        return loss * float("nan") if there and self.calls >= 3 else loss
"""


def test_nan_in_one_process(start: Start, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    accumulated = "trainer.accumulate_grad_batches=4"  # a batch without communication
    process = start(*EXACT, *DDP, accumulated, "hydra.run.dir=run", "loss._target_=bad.Bad")
    _, err = process.communicate(timeout=180)
    assert process.returncode == 3, err
    file = tmp_path / "run/not_finite.pt"
    assert err.startswith("cnntrain: epoch 1/2, batch 3, step 0, lr ")
    assert (
        "the loss of 500 images is nan; every output is finite, but the loss of Bad is not" in err
    )
    assert err.endswith(f"to reproduce it: {file}\n")
    assert err.count("\n") == 1
    saved = torch.load(file, weights_only=True)
    loader = build(compose(EXACT).data).train_loader(0, rank=1, world=2)
    images, labels = loader.batch(0, 2)
    assert torch.equal(saved["images"], images)
    assert torch.equal(saved["labels"], labels)
    seed = np.random.SeedSequence([0, 0, 2, 1]).generate_state(1, np.uint64)[0]
    assert saved["torch_seed"] == int(seed)
    assert result(tmp_path / "run")["status"] == "failed"


def test_srun(start: Start, tmp_path: Path) -> None:
    """Ranks as Slurm starts them; started again, all end with the completed run."""
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": "71"}
    slurm |= {"SLURM_STEP_ID": str(os.getpid() % 1000), "SLURM_STEP_NODELIST": "localhost"}
    options = [*EXACT, *DDP, "trainer.max_epochs=1", "hydra.run.dir=run", "resume=auto"]
    for line in ("epoch 1/1", "already completed"):
        tasks = [
            start(*options, **slurm, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
            for rank in range(2)
        ]
        (out, err), others = (task.communicate(timeout=180) for task in tasks)
        assert [task.returncode for task in tasks] == [0, 0], err
        assert line in out
        assert others == ("", "")
    assert result(tmp_path / "run")["status"] == "completed"


def test_batch_that_cannot_be_divided_is_rejected() -> None:
    options = [*DDP, "data=fashion_mnist_mini", "data.val_size=500", "trainer.devices=3"]
    for size, limit, images in [(2, "1.0", 2), (4498, "1.0", 2), (4498, "1", 0), (1500, "1.0", 0)]:
        cfg = compose(
            [*options, f"data.batch_size={size}", f"+trainer.limit_train_batches={limit}"]
        )
        problems = cross_check_data(cfg, build(cfg.data))
        assert problems == images // 2 * [
            f"data.batch_size={size}: a batch of {images} of the 4500 images cannot be shared by "
            "3 processes (trainer.devices); take another"
        ]


def test_other_number_of_processes_is_rejected() -> None:
    run, wanted = (compose([*DDP, f"trainer.devices={n}"]) for n in (2, 3))
    (problem,) = resume_problems(run, wanted)
    assert problem.startswith("trainer.devices=3: the run was started with 2")


def test_other_trainer_for_two_processes_is_rejected(tmp_path: Path) -> None:
    run = compose([*DDP, "trainer.devices=2"])
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/overrides.yaml").write_text("- trainer=ddp\n- trainer.devices=2\n")
    message = f"trainer=cpu: the run in {tmp_path} has 2 processes.*set trainer.accelerator=cpu"
    with pytest.raises(ConfigError, match=message):
        with_overrides(run, tmp_path, ["trainer=cpu"])
    assert with_overrides(run, tmp_path, ["trainer=ddp"]).trainer == run.trainer
    assert resume_problems(run, compose(["trainer=cpu"])) == [
        "trainer.devices: the run has 2, and is resumed with as many; add trainer=ddp "
        "trainer.devices=2, or start a new run"
    ]
    faster = compose([*DDP, "trainer.devices=2", "trainer.timeout=600"])
    assert resume_problems(run, faster) == []


def test_stuck_process(start: Start, tmp_path: Path) -> None:
    """The main thread waits in a collective: a second SIGINT is handled without it, and without
    any signal the wait is bounded."""
    options = [*EVERYTHING, *DDP, "trainer.max_epochs=300", "hydra.run.dir=run", "resume=auto"]
    options += ["trainer.limit_train_batches=4", "trainer.early_stopping=null"]
    log = tmp_path / "run/train.log"
    for signals, code in [([signal.SIGINT, signal.SIGINT], 130), ([], 1)]:
        before = epochs(log)
        process = start(*options, *([] if signals else ["trainer.timeout=5"]))
        wait_until(process, lambda before=before: epochs(log) > before + 1)
        (other,) = children(process)
        os.kill(other, signal.SIGSTOP)
        time.sleep(1)
        for signum in signals:
            process.send_signal(signum)
            time.sleep(0.5)
        _, err = process.communicate(timeout=180)
        assert process.returncode == code, err
        assert gone(other)
        last = err.splitlines()[-1]
        if signals:
            assert last.startswith("cnntrain: interrupted by SIGINT")
        else:
            assert "ended, or not responded for 5 s (trainer.timeout); resume with resume" in last
        assert result(tmp_path / "run")["status"] == ("interrupted" if signals else "failed")


def test_port_in_use_and_port_without_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        info = ProcessInfo(world_size=2, launcher="srun", timeout=2)
        monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost")
        with pytest.raises(ProcessLost, match=f"MASTER_PORT={port}: the port is in use; set"):
            connect(info)
        text = f"not all 2 processes .* 127.0.0.1:{port} .*MASTER_PORT.* within 2 s"
        with pytest.raises(ProcessLost, match=text):
            connect(replace(info, rank=1))
    with pytest.raises(ProcessLost, match="not all 2 processes have connected"):
        connect(info)
