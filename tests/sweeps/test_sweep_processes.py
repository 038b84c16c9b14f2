"""Sweeps as real processes: killed, interrupted, extended, failing, in parallel.

Results after any interruption are compared with those of an uninterrupted sweep. More moments and
launchers: scripts/torture.py --sweep-kills.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from forked import run_command
from sweep_commands import completed, end, hparams, numbers, rows, start, wait_until

from cnntrain.config.resume import read_result
from cnntrain.sweeps.records import METRICS, history

pytestmark = pytest.mark.xdist_group("sweep processes")  # share one uninterrupted sweep

TINY = ["data=fashion_mnist_mini", "trainer=cpu", "data.batch_size=32"]
TINY += ["+trainer.limit_train_batches=4", "tensorboard=scalars", "trainer.max_epochs=6"]
FOUR = [*TINY, "model.dropout=0.2,0.1", "seed=0,1", "sweep=s"]
MEMBERS = [f"model.dropout={d},seed={s}" for d in (0.2, 0.1) for s in (0, 1)]


def training(member: Path) -> bool:
    """Whether it is past its second epoch, and not at its end."""
    return 2 <= len(history(member)) < 6  # the first one has its checkpoint


def lock_holder(member: Path) -> int | None:
    """The process that trains there: it has the directory's lock open."""
    lock = member.resolve() / ".lock"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(f.is_symlink() and f.readlink() == lock for f in (process / "fd").iterdir()):
                return int(process.name)
    return None


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of an uninterrupted sweep of four, and the lines it printed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    lines = end(start(folder, *FOUR))
    return folder / "outputs/sweeps/s", lines


def test_lines_and_records(uninterrupted: tuple[Path, list[str]]) -> None:
    folder, lines = uninterrupted
    assert lines[0] == "sweep s: 4 members, 1 thread each; outputs/sweeps/s"
    for i, line in enumerate(lines[1:5], 1):
        assert line.startswith(f"[{i}/4] model.dropout=")
        assert "val/acc" in line
        assert ("left" in line) == (i < 4)
    assert lines[5].startswith("s: best by val/acc is ")
    assert lines[-1] == "4 completed"
    assert [*rows(folder)] == MEMBERS
    for name, row in rows(folder).items():
        result = json.loads((folder / name / "result.json").read_text())
        assert float(row["val/acc"]) == result["metrics"]["val/acc"]
        assert row["status"] == result["status"] == "completed"
        assert name == f"model.dropout={row['model.dropout']},seed={row['seed']}"
    assert (folder / "report/report.html").exists()


def test_a_member_is_the_run_alone(uninterrupted: tuple[Path, list[str]], tmp_path: Path) -> None:
    typed = [*TINY, "model.dropout=0.1", "seed=1", "hydra.run.dir=run"]
    done = run_command(["train", *typed], tmp_path)
    assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / "run/result.json").read_text())
    member = read_result(uninterrupted[0] / MEMBERS[3])
    assert member is not None
    assert alone["metrics"] == member["metrics"]
    assert alone["config_hash"] == member["config_hash"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_killed_interrupted_and_resumed(
    uninterrupted: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """A member is killed, then sweep and members, then Ctrl-C; always in a training."""
    folder = tmp_path / "outputs/sweeps/s"
    process = start(tmp_path, *FOUR)
    wait_until(process, lambda: training(folder / MEMBERS[0]))
    member = lock_holder(folder / MEMBERS[0])
    assert member is not None
    assert os.getsid(member) == process.pid
    os.kill(member, signal.SIGKILL)
    wait_until(process, lambda: training(folder / MEMBERS[1]))  # the sweep continues
    error = "its process was ended by SIGKILL (by the system, if memory ran out)"
    killed = read_result(folder / MEMBERS[0])
    assert killed is not None
    assert (killed["status"], killed["error"]) == ("failed", error)
    os.killpg(process.pid, signal.SIGKILL)  # as when the machine loses power
    process.communicate()
    assert completed(folder) == {}
    # The second time with threads of the environment, which must not change any number.
    process = start(tmp_path, *FOUR, OMP_NUM_THREADS="2", MKL_NUM_THREADS="2")
    wait_until(process, lambda: training(folder / MEMBERS[2]))
    os.killpg(process.pid, signal.SIGINT)
    lines = end(process, 130)
    assert lines[-1] == "interrupted by SIGINT; the same command resumes what is left"
    assert any(f"] {MEMBERS[2]}: interrupted after " in line for line in lines)
    statuses = [row["status"] for row in rows(folder).values()]
    assert statuses == ["completed", "completed", "interrupted", "pending"]
    assert not (folder / ".stop").exists()
    done = completed(folder)
    lines = end(start(tmp_path, *reversed(FOUR)))
    assert lines[0].startswith("sweep s: 4 members, 2 completed before")
    assert lines[-1] == "4 completed"
    assert done.items() <= completed(folder).items()
    for name in MEMBERS[:3]:  # resumed, not started again
        assert (folder / name / "train.log").read_text().count("epoch 1/6 ") == 1
    assert numbers(folder) == {m: numbers(uninterrupted[0])[m] for m in numbers(folder)}
    assert set(numbers(folder)) == set(MEMBERS)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
def test_ctrl_c_while_the_members_server_imports(tmp_path: Path) -> None:
    def preparing() -> bool:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_text()
                own = os.getpgid(int(process.name)) == sweep.pid
                if (
                    own
                    and "forkserver" in command
                    and "torch/lib" in (process / "maps").read_text()
                ):
                    return True
        return False

    sweep = start(tmp_path, *FOUR)
    wait_until(sweep, preparing)
    os.killpg(sweep.pid, signal.SIGINT)
    printed, errors = sweep.communicate(timeout=100)
    assert sweep.returncode == 130
    # The sweep itself may still be checking, or be waiting for its first member.
    assert "interrupted by SIGINT" in printed + errors
    assert "Traceback" not in printed + errors
    assert not list(tmp_path.rglob("metrics.csv"))


def test_hparams_of_an_extended_sweep(
    uninterrupted: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Members completed before an option varied have its value, under one schema."""
    folder = Path(shutil.copytree(uninterrupted[0], tmp_path / "outputs/sweeps/s"))
    more = ["model.dropout=0.1", "seed=1", "trainer.gradient_clip_val=null,1.0", "sweep=s"]
    lines = end(start(tmp_path, *TINY, *more))
    assert lines[0].startswith("sweep s: 2 members, 1 completed before")
    columns, metrics, members = hparams(folder)
    varied = ["model.dropout", "seed", "trainer.gradient_clip_val"]
    assert (set(columns), metrics) == (set(varied), list(METRICS))
    assert set(members) == set(rows(folder))
    assert len(members) == 5
    for name, row in rows(folder).items():
        values = members[name]
        for option in varied:
            text = str(values[option])
            assert text == row[option] or float(text) == float(row[option])
        # The tab has the last scalar of each; sweep.csv has those of the selected epoch.
        last = {**history(folder / name)[-1], **{k: float(row[k]) for k in METRICS[2:4]}}
        assert {k: values[k] for k in METRICS} == pytest.approx({k: last[k] for k in METRICS})


def test_waits_for_a_running_member(tmp_path: Path) -> None:
    """It may belong to a cluster's job of a sweep that was killed."""
    folder = tmp_path / "outputs/sweeps/s"
    command = [*TINY, "seed=1", f"hydra.run.dir='{folder / 'seed=1'}'"]
    alone = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    wait_until(alone, (folder / "seed=1/metrics.csv").exists)
    alone.send_signal(signal.SIGSTOP)  # however long the sweep takes to start
    sweep = start(tmp_path, *TINY, "seed=0,1", "sweep=s")
    wait_until(sweep, (folder / "sweep.csv").exists)
    status = rows(folder)["seed=1"]["status"]
    alone.send_signal(signal.SIGCONT)
    assert status == "running"
    assert end(sweep)[-1] == "2 completed"
    assert alone.wait() == 0
    assert (folder / "seed=1/train.log").read_text().count("epoch 1/6 ") == 1


def test_a_failure_is_reported_and_stops_a_sweep_that_fails_fast(tmp_path: Path) -> None:
    diverging = ["model.norm=false", "model.activation=relu", "optimizer=sgd", "optimizer.lr=1e20"]
    typed = [*TINY, *diverging, "seed=0,1", "sweep=bad"]
    lines = end(start(tmp_path, *typed, "sweep.fail_fast=true"), 1)
    assert lines[-1] == "0 completed, 1 failed, 1 unfinished"
    first, second = rows(tmp_path / "outputs/sweeps/bad").values()
    assert (first["status"], second["status"]) == ("failed", "pending")
    assert first["error"].startswith("NonFiniteError: epoch 1/6, batch 2")
    assert any(f"failed: {first['error']}" in line for line in lines)


def test_a_parallel_search_is_interrupted_killed_and_extended(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="needs optuna")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs hydra-joblib-launcher")
    folder = tmp_path / "outputs/sweeps/lenet5_lr"
    typed = [*TINY, "search=lenet5_lr", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = start(tmp_path, *typed, "search.trials=4")
    wait_until(process, lambda: len(list(folder.glob("*/checkpoints/last.ckpt"))) == 2)
    os.kill(process.pid, signal.SIGTERM)  # the sweep alone
    lines = end(process, 143)
    assert lines[-1] == "interrupted by SIGTERM; the same command resumes what is left"
    process = start(tmp_path, *typed, "search.trials=4")
    wait_until(process, lambda: len(completed(folder)) >= 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = completed(folder)
    assert end(start(tmp_path, *typed, "search.trials=4"))[-1] == "4 ended"
    assert done.items() <= completed(folder).items()
    statuses = Counter(row["status"] for row in rows(folder).values())
    assert sum(statuses.values()) == statuses["completed"] + statuses["pruned"] == 4
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(study_name=None, storage=storage)
    states = Counter(trial.state.name for trial in study.trials)
    assert (states["COMPLETE"], states["PRUNED"]) == (statuses["completed"], statuses["pruned"])
    assert sum(states.values()) == 4
    found = {f"{t.value:.12g}" for t in study.trials if t.state.name == "COMPLETE"}
    assert found == {
        f"{float(row['val/acc']):.12g}"
        for row in rows(folder).values()
        if row["status"] == "completed"
    }
