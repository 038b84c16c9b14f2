"""Sweeps as real processes: killed, interrupted, extended, failing, in parallel.

Results after any interruption are compared with those of an uninterrupted sweep. More moments and
launchers: scripts/torture.py --sweep-kills.
"""

import contextlib
import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from forked import Command, run_command
from sweep_commands import completed, end, hparams, numbers, rows, start, wait_until

from cnntrain.config.resume import read_result
from cnntrain.metric_names import METRICS
from cnntrain.sweeps.records import history

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
    done = run_command(["train", "-m", *FOUR], folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "outputs/sweeps/s", done.stdout.splitlines()[1:]


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


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep in which a member is killed, then sweep and members, then Ctrl-C; each in a training.

    Returns the working directory.
    """
    cwd = tmp_path_factory.mktemp("stopped")
    folder = cwd / "outputs/sweeps/s"
    process = start(cwd, *FOUR)
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
    process = start(cwd, *FOUR, OMP_NUM_THREADS="2", MKL_NUM_THREADS="2")
    wait_until(process, lambda: training(folder / MEMBERS[2]))
    os.killpg(process.pid, signal.SIGINT)
    lines = end(process, 130)
    assert lines[-1] == "interrupted by SIGINT; the same command resumes what is left"
    assert any(f"] {MEMBERS[2]}: interrupted after " in line for line in lines)
    statuses = [row["status"] for row in rows(folder).values()]
    assert statuses == ["completed", "completed", "interrupted", "pending"]
    assert not (folder / ".stop").exists()
    return cwd


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_stopped_resumed_and_extended(stopped: Path, uninterrupted: tuple[Path, list[str]]) -> None:
    """A member of the extended sweep is running already, as in a cluster's job.

    One seed is extended: one member is completed, one is resumed, two are new.
    """
    folder, clip = stopped / "outputs/sweeps/s", "trainer.gradient_clip_val"
    name = f"{MEMBERS[2]},{clip}=1.0"
    typed = ["model.dropout=0.1", "seed=0", f"{clip}=1.0", f"hydra.run.dir='{folder / name}'"]
    alone = Command(["train", *TINY, *typed], stopped)
    wait_until(alone, (folder / name / "metrics.csv").exists)
    alone.send_signal(signal.SIGSTOP)
    done = completed(folder)
    sweep = start(stopped, f"{clip}=null,1.0", "seed=0", *reversed(FOUR[:-2]), "sweep=s")
    wait_until(sweep, lambda: len(completed(folder)) == 4)
    status = rows(folder)[name]["status"]
    alone.send_signal(signal.SIGCONT)
    assert status == "running"
    lines = end(sweep)
    assert lines[0].startswith("sweep s: 4 members, 1 completed before")
    assert lines[-1] == "4 completed"
    assert alone.wait() == 0
    assert done.items() <= completed(folder).items()
    assert rows(folder)[MEMBERS[3]]["status"] == "pending"  # of the other seed
    for member in (*MEMBERS[:3], name):  # resumed, not started again
        assert (folder / member / "train.log").read_text().count("epoch 1/6 ") == 1
    found = {m: {k: v for k, v in row.items() if k != clip} for m, row in numbers(folder).items()}
    alike = numbers(uninterrupted[0])
    assert {m: found[m] for m in MEMBERS[:3]} == {m: alike[m] for m in MEMBERS[:3]}
    # Members completed before an option varied have its value, under one schema.
    columns, metrics, members = hparams(folder)
    varied = ["model.dropout", "seed", clip]
    assert (set(columns), metrics) == (set(varied), list(METRICS))
    assert set(members) == set(rows(folder)) - {name, MEMBERS[3]}
    for member, values in members.items():
        row = rows(folder)[member]
        for option in varied:
            text = str(values[option])
            assert text == row[option] or float(text) == float(row[option])
        # The tab has the last scalar of each; sweep.csv has those of the selected epoch.
        last = {
            **history(folder / member)[-1],
            **{k: float(row[k]) for k in METRICS if "test" in k},
        }
        assert {k: values[k] for k in METRICS} == pytest.approx({k: last[k] for k in METRICS})


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


def test_a_failure_is_reported_and_stops_a_sweep_that_fails_fast(tmp_path: Path) -> None:
    diverging = ["model.norm=false", "model.activation=relu", "optimizer=sgd", "optimizer.lr=1e20"]
    typed = [*TINY, *diverging, "seed=0,1", "sweep=bad", "sweep.fail_fast=true"]
    done = run_command(["train", "-m", *typed], tmp_path)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (1, "")
    assert lines[-1] == "0 completed, 1 failed, 1 unfinished"
    first, second = rows(tmp_path / "outputs/sweeps/bad").values()
    assert (first["status"], second["status"]) == ("failed", "pending")
    assert first["error"].startswith("NonFiniteError: epoch 1/6, batch 2")
    assert any(f"failed: {first['error']}" in line for line in lines)


def test_a_parallel_search_is_interrupted_and_resumed(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="needs optuna")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs hydra-joblib-launcher")
    folder = tmp_path / "outputs/sweeps/lenet5_lr"
    typed = [*TINY, "trainer.max_epochs=3", "search=lenet5_lr", "search.trials=3"]
    typed.append("search.at_once=2")
    process = start(tmp_path, *typed, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    wait_until(process, lambda: len(list(folder.glob("*/checkpoints/last.ckpt"))) == 2)
    os.kill(process.pid, signal.SIGTERM)  # the sweep alone
    lines = end(process, 143)
    assert lines[-1] == "interrupted by SIGTERM; the same command resumes what is left"
    done = completed(folder)
    resumed = run_command(["train", "-m", *typed], tmp_path)  # on another launcher
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert resumed.stdout.splitlines()[-1] == "3 ended"
    assert done.items() <= completed(folder).items()
    statuses = Counter(row["status"] for row in rows(folder).values())
    assert sum(statuses.values()) == statuses["completed"] + statuses["pruned"] == 3
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(study_name=None, storage=storage)
    states = Counter(trial.state.name for trial in study.trials)
    assert (states["COMPLETE"], states["PRUNED"]) == (statuses["completed"], statuses["pruned"])
    assert sum(states.values()) == 3
    found = {f"{t.value:.12g}" for t in study.trials if t.state.name == "COMPLETE"}
    assert found == {
        f"{float(row['val/acc']):.12g}"
        for row in rows(folder).values()
        if row["status"] == "completed"
    }
