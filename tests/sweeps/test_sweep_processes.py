"""Sweeps as a user starts them: killed, failing, searching, and read by TensorBoard."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from sweep_commands import completed, end, hparams, numbers, rows, start, wait_until

from cnntrain.config.resume import read_result
from cnntrain.sweeps.records import METRICS

SMALL = ["data=fashion_mnist_mini", "trainer=cpu", "+trainer.limit_train_batches=6"]
SMALL += ["tensorboard=scalars"]
TWELVE = [*SMALL, "backend=native,im2col", "model=shallow,lenet5", "seed=0,1,2"]
TWELVE += ["trainer.max_epochs=3", "sweep=calm"]
LONG = [*SMALL, "trainer.max_epochs=400", "data.batch_size=16"]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An undisturbed sweep of twelve, and what it printed."""
    folder = tmp_path_factory.mktemp("twelve")
    return folder / "outputs/sweeps/calm", end(start(folder, *TWELVE))


@pytest.mark.xdist_group("twelve")
def test_a_line_a_member_and_an_answer(twelve: tuple[Path, list[str]]) -> None:
    folder, lines = twelve
    assert lines[0] == "sweep calm: 12 members, 1 thread each; outputs/sweeps/calm"
    for number, line in enumerate(lines[1:13], 1):
        assert line.startswith(f"[{number:>2}/12] backend=")
        assert "val/acc" in line
        assert ("left" in line) == (number < 12)
    assert lines[13].startswith("calm: best by val/acc is ")
    assert lines[-1] == "12 completed"
    assert not any("|" in line for line in lines)  # a bar's ends
    found = rows(folder)
    assert len(found) == 12
    for name, row in found.items():
        result = json.loads((folder / name / "result.json").read_text())
        assert float(row["val/acc"]) == result["metrics"]["val/acc"]
        assert row["status"] == result["status"] == "completed"
        assert name == f"backend={row['backend']},model={row['model']},seed={row['seed']}"


@pytest.mark.xdist_group("twelve")
def test_killed_three_times(twelve: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "outputs/sweeps/calm"
    before = completed(folder)
    for least in (2, 5, 9):
        process = start(tmp_path, *TWELVE)
        wait_until(process, lambda least=least: len(completed(folder)) >= least)
        if least > 2:  # within a training, too
            begun = len(list(folder.glob("*/checkpoints")))
            wait_until(process, lambda n=begun: len(list(folder.glob("*/checkpoints"))) > n)
        process.kill()
        process.communicate()
        now = completed(folder)
        assert before.items() <= now.items()  # none of them was run again
        before = now
    lines = end(start(tmp_path, *reversed(TWELVE)))
    assert f"12 members, {len(before)} completed before" in lines[0]
    assert before.items() <= completed(folder).items()
    assert numbers(folder) == numbers(twelve[0])
    assert Counter(row["status"] for row in rows(folder).values()) == {"completed": 12}


@pytest.mark.xdist_group("twelve")
def test_nothing_is_left_to_do(twelve: tuple[Path, list[str]]) -> None:
    folder = twelve[0]
    before, table = completed(folder), numbers(folder)
    lines = end(start(folder.parents[2], *TWELVE))
    assert lines[0].startswith("sweep calm: 12 members, 12 completed before")
    assert completed(folder) == before
    assert numbers(folder) == table


@pytest.mark.xdist_group("twelve")
def test_a_member_is_the_run_alone(twelve: tuple[Path, list[str]], tmp_path: Path) -> None:
    options = [*SMALL, "backend=im2col", "model=lenet5", "seed=2", "trainer.max_epochs=3"]
    command = [sys.executable, str(ROOT / "train.py"), *options, "hydra.run.dir=run"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=200)
    alone = json.loads((tmp_path / "run/result.json").read_text())
    member = read_result(twelve[0] / "backend=im2col,model=lenet5,seed=2")
    assert member is not None
    assert alone["metrics"] == member["metrics"]
    assert alone["config_hash"] == member["config_hash"]


@pytest.mark.xdist_group("twelve")
def test_hparams_show_every_member(twelve: tuple[Path, list[str]]) -> None:
    columns, metrics, members = hparams(twelve[0])
    assert list(columns) == ["backend", "model", "seed"]
    assert metrics == list(METRICS)
    assert set(members) == set(rows(twelve[0]))
    for name, row in rows(twelve[0]).items():
        assert {k: str(members[name][k]) for k in ("backend", "model")} == {
            k: row[k] for k in ("backend", "model")
        }
        assert members[name]["seed"] == int(row["seed"])
        for metric in ("test/acc", "test/loss"):
            assert members[name][metric] == pytest.approx(float(row[metric]))


@pytest.mark.parametrize(
    ("signum", "whole", "code"), [("INT", True, 130), ("TERM", True, 143), ("TERM", False, 143)]
)
def test_a_signal_saves_all_members(signum: str, whole: bool, code: int, tmp_path: Path) -> None:
    """Two train side by side; the signal is for the whole process group, or the sweep alone."""
    typed = ["seed=0,1,2", *LONG, "sweep=cut", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process, folder = start(tmp_path, *typed), tmp_path / "outputs/sweeps/cut"
    wait_until(process, lambda: len(list(folder.glob("*/checkpoints/last.ckpt"))) == 2)
    if not whole:
        busy = start(tmp_path, *typed)
        _, said = busy.communicate(timeout=100)
        assert busy.returncode == 2
        assert "sweep.name=cut: another process is running this sweep" in said
    (os.killpg if whole else os.kill)(process.pid, getattr(signal, f"SIG{signum}"))
    lines = end(process, code)
    assert lines[-1] == f"interrupted by SIG{signum}; the same command resumes what is left"
    statuses = Counter(row["status"] for row in rows(folder).values())
    assert statuses == {"interrupted": 2, "pending": 1}
    for name, row in rows(folder).items():
        result = read_result(folder / name) or {"epochs": 0}
        assert int(row["epochs"]) == result["epochs"]


def test_a_member_at_work_is_waited_for(tmp_path: Path) -> None:
    """As by a job that is left in a cluster's queue by a sweep that was killed."""
    folder, typed = tmp_path / "outputs/sweeps/s", [*SMALL, "trainer.max_epochs=40"]
    command = [*typed, "seed=1", f"hydra.run.dir='{folder / 'seed=1'}'"]
    alone = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    wait_until(alone, (folder / "seed=1/metrics.csv").exists)
    alone.send_signal(signal.SIGSTOP)  # however long the sweep takes to come
    sweep = start(tmp_path, *typed, "seed=0,1", "sweep=s", "hydra/launcher=joblib")
    wait_until(sweep, (folder / "sweep.csv").exists)
    seen = rows(folder)["seed=1"]["status"]
    alone.send_signal(signal.SIGCONT)
    assert seen == "running"
    lines = end(sweep)
    assert alone.wait() == 0
    assert lines[-1] == "2 completed"
    assert sum(line.startswith("[") for line in lines) == 2
    assert {row["status"] for row in rows(folder).values()} == {"completed"}
    assert (folder / "seed=1/train.log").read_text().count("epoch  1/40 ") == 1


DIVERGING = [*SMALL, "model.norm=false", "model.activation=relu", "optimizer=sgd"]
DIVERGING += ["trainer.max_epochs=1"]


def test_what_fails_is_told_and_retried(tmp_path: Path) -> None:
    """One diverges; the process of another is killed, as by a system that is out of memory."""
    (tmp_path / "mypkg.py").write_text(
        "import os, pathlib, signal\n"
        "from cnntrain.conv import NativeConv2d\n\n\n"
        "class Dies(NativeConv2d):\n"
        "    def forward(self, x):\n"
        "        if self.training and pathlib.Path('die').exists():\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().forward(x)\n"
    )
    varied = ["optimizer.lr=1e20,0.01", "backend._target_=mypkg.Dies,cnntrain.conv.NativeConv2d"]
    typed, folder = [*DIVERGING, *varied, "sweep=bad"], tmp_path / "outputs/sweeps/bad"
    # Rehearsed without the file, which comes when the first member has begun.
    process = start(tmp_path, *typed)
    wait_until(process, (folder / "sweep.yaml").exists)
    (tmp_path / "die").touch()
    lines = end(process, 1)
    found = {(r["optimizer.lr"], r["backend._target_"]): r for r in rows(folder).values()}
    killed = found["0.01", "mypkg.Dies"]
    assert killed["status"] == "failed"
    assert killed["error"] == "its process was ended by SIGKILL (by the system, if memory ran out)"
    diverged = found["1e+20", "cnntrain.conv.NativeConv2d"]
    assert diverged["error"].startswith("NonFiniteError: epoch 1/1, batch 2")
    assert found["0.01", "cnntrain.conv.NativeConv2d"]["status"] == "completed"
    assert sum("failed: its process was ended by SIGKILL" in line for line in lines) >= 1
    assert lines[-1] == "1 completed, 3 failed"
    (tmp_path / "die").unlink()
    assert end(start(tmp_path, *typed), 1)[-1] == "2 completed, 2 failed"


def test_fail_fast(tmp_path: Path) -> None:
    typed = [*DIVERGING, "optimizer.lr=1e20,0.01,0.02", "sweep=bad", "sweep.fail_fast=true"]
    assert end(start(tmp_path, *typed), 1)[-1] == "0 completed, 1 failed, 2 unfinished"
    statuses = Counter(row["status"] for row in rows(tmp_path / "outputs/sweeps/bad").values())
    assert statuses == {"failed": 1, "pending": 2}


def test_another_base_leaves_all_as_it_is(tmp_path: Path) -> None:
    end(start(tmp_path, *SMALL, "seed=0,1", "trainer.max_epochs=1", "sweep=base"))
    folder = tmp_path / "outputs/sweeps/base"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    process = start(tmp_path, *SMALL, "seed=0,1,2", "trainer.max_epochs=2", "sweep=base")
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "trainer.max_epochs=2: the sweep 'base' was begun with 1; take another name" in said
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


SEARCH = [*SMALL, "search=lenet5_lr", "trainer.max_epochs=2"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    assert end(start(folder, *SEARCH, "search.trials=14"))[-1] == "14 ended"
    return folder / "outputs/sweeps/lenet5_lr"


@pytest.mark.xdist_group("search")
def test_a_search_killed_in_the_middle(searched: Path, tmp_path: Path) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    folder = tmp_path / "outputs/sweeps/lenet5_lr"
    process = start(tmp_path, *SEARCH, "search.trials=14")
    ended = ("completed", "pruned")
    wait_until(
        process,
        lambda: sum((read_result(f) or {}).get("status") in ended for f in folder.glob("t*")) > 5,
    )
    process.kill()
    process.communicate()
    end(start(tmp_path, *SEARCH, "search.trials=14"))
    assert numbers(folder) == numbers(searched)
    assert len(rows(folder)) == 14
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    backend = JournalFileBackend(str(folder / "study.journal"))
    (study,) = optuna.get_all_study_names(JournalStorage(backend))
    trials = optuna.load_study(study_name=study, storage=JournalStorage(backend)).trials
    assert len(trials) == 14
    states = Counter(trial.state.name for trial in trials)
    statuses = Counter(row["status"] for row in rows(folder).values())
    assert states["COMPLETE"] == statuses["completed"] > 0
    assert states["PRUNED"] == statuses["pruned"]
    assert sum(states.values()) == states["COMPLETE"] + states["PRUNED"] == 14


@pytest.mark.xdist_group("search")
def test_a_search_is_made_longer(searched: Path) -> None:
    folder = searched.parents[2]
    assert "[" not in end(start(folder, *SEARCH, "search.trials=14"))[1]  # nothing was run
    end(start(folder, *SEARCH, "search.trials=16", "hydra/launcher=joblib"))
    assert len(rows(searched)) == 16
