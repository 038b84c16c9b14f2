"""Sweeps as a user starts them: killed, interrupted, on every launcher, and read by TensorBoard."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import backend_context, get_experiment, list_session_groups
from tensorboard.plugins.hparams.api_pb2 import (
    GetExperimentRequest,
    ListSessionGroupsRequest,
    Status,
)

from cnntrain.config.resume import read_result

SMALL = ["data=fashion_mnist_mini", "trainer=cpu", "+trainer.limit_train_batches=6"]
TWELVE = ["backend=native,im2col", "model=shallow,lenet5", "seed=0,1,2", "trainer.max_epochs=3"]
FOUR = ["backend=native,im2col", "seed=0,1", "trainer.max_epochs=2"]
LONG = ["trainer.max_epochs=400", "data.batch_size=16"]


def start(folder: Path, *arguments: str, **how: Any) -> subprocess.Popen[str]:
    """`python train.py -m ...`, the leader of a process group."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(ROOT / "train.py"), "-m", *SMALL, *arguments]
    # A shell's background jobs ignore SIGINT, and so would what the tests start in one.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes, **heard, **how)


def sweep(folder: Path, *arguments: str, code: int = 0, **how: Any) -> str:
    process = start(folder, *arguments, **how)
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    return out


def rows(folder: Path) -> dict[str, dict[str, str]]:
    """sweep.csv by the members' directories."""
    with (folder / "sweep.csv").open(newline="") as file:
        return {row["directory"]: row for row in csv.DictReader(file)}


def numbers(folder: Path) -> dict[str, dict[str, str]]:
    """What sweep.csv says but for the time that it took."""
    found = rows(folder)
    return {name: {k: v for k, v in row.items() if k != "seconds"} for name, row in found.items()}


def completed(folder: Path) -> dict[Path, int]:
    """The result.json of each completed member, with the number of its file."""
    files = folder.glob("*/result.json")
    return {
        f: f.stat().st_ino
        for f in files
        if (read_result(f.parent) or {}).get("status") == "completed"
    }


def wait_until(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An undisturbed sweep of twelve, and what it printed."""
    folder = tmp_path_factory.mktemp("twelve")
    return folder / "outputs/sweeps/calm", sweep(folder, *TWELVE, "sweep=calm")


@pytest.mark.xdist_group("twelve")
def test_a_line_a_member_and_an_answer(twelve: tuple[Path, str]) -> None:
    folder, out = twelve
    lines = out.splitlines()
    assert lines[0] == "sweep calm: 12 members, 1 thread each; outputs/sweeps/calm"
    for number, line in enumerate(lines[1:13], 1):
        assert line.startswith(f"[{number:>2}/12] backend=")
        assert "val/acc" in line
        assert ("left" in line) == (number < 12)
    assert lines[13].startswith("calm: best by val/acc is ")
    assert lines[-1] == "12 completed"
    assert "|" not in out  # a bar's ends
    found = rows(folder)
    assert len(found) == 12
    for name, row in found.items():
        result = json.loads((folder / name / "result.json").read_text())
        assert float(row["val/acc"]) == result["metrics"]["val/acc"]
        assert row["status"] == result["status"] == "completed"
        assert name == f"backend={row['backend']},model={row['model']},seed={row['seed']}"


@pytest.mark.xdist_group("twelve")
def test_killed_three_times(twelve: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "outputs/sweeps/calm"
    before: dict[Path, int] = {}
    for least in (2, 5, 9):
        process = start(tmp_path, *TWELVE, "sweep=calm")
        wait_until(lambda least=least: len(completed(folder)) >= least, process)
        if least > 2:  # within a training, too
            begun = len(list(folder.glob("*/checkpoints")))
            wait_until(lambda n=begun: len(list(folder.glob("*/checkpoints"))) > n, process)
        process.kill()
        process.communicate()
        now = completed(folder)
        assert before.items() <= now.items()  # none of them was run again
        before = now
    out = sweep(tmp_path, *reversed(TWELVE), "sweep=calm")
    assert f"12 members, {len(before)} completed before" in out.splitlines()[0]
    assert before.items() <= completed(folder).items()
    assert numbers(folder) == numbers(twelve[0])
    assert Counter(row["status"] for row in rows(folder).values()) == {"completed": 12}


@pytest.mark.xdist_group("twelve")
def test_nothing_is_left_to_do(twelve: tuple[Path, str]) -> None:
    folder = twelve[0]
    before, table = completed(folder), numbers(folder)
    out = sweep(folder.parents[2], *TWELVE, "sweep=calm")
    assert out.startswith("sweep calm: 12 members, 12 completed before")
    assert completed(folder) == before
    assert numbers(folder) == table


@pytest.mark.xdist_group("twelve")
def test_a_member_is_the_run_alone(twelve: tuple[Path, str], tmp_path: Path) -> None:
    options = [*SMALL, "backend=im2col", "model=lenet5", "seed=2", "trainer.max_epochs=3"]
    command = [sys.executable, str(ROOT / "train.py"), *options, "hydra.run.dir=run"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=200)
    alone = json.loads((tmp_path / "run/result.json").read_text())
    member = read_result(twelve[0] / "backend=im2col,model=lenet5,seed=2")
    assert member is not None
    assert alone["metrics"] == member["metrics"]
    assert alone["config_hash"] == member["config_hash"]


@pytest.mark.xdist_group("twelve")
def test_hparams_show_every_member(twelve: tuple[Path, str]) -> None:
    """Read as the tab itself reads them, through TensorBoard's own backend."""
    folder = twelve[0]
    events = plugin_event_multiplexer.EventMultiplexer()
    events.AddRunsFromDirectory(str(folder))
    events.Reload()
    provider = data_provider.MultiplexerDataProvider(events, str(folder))
    context = backend_context.Context(
        base_plugin.TBContext(logdir=str(folder), data_provider=provider)
    )
    asked = RequestContext()
    experiment = get_experiment.Handler(asked, context, "", GetExperimentRequest()).run()
    assert [column.name for column in experiment.hparam_infos] == ["backend", "model", "seed"]
    metrics = [metric.name.tag for metric in experiment.metric_infos]
    assert metrics[:2] == ["val/acc", "val/loss"]
    assert "test/acc" in metrics
    request = ListSessionGroupsRequest(
        slice_size=100, include_metrics=True, allowed_statuses=[Status.Value("STATUS_SUCCESS")]
    )
    for tag in metrics:
        request.col_params.add().metric.tag = tag
    groups = list_session_groups.Handler(asked, context, "", request).run().session_groups
    assert len(groups) == 12
    for group in groups:
        shown = {name: group.hparams[name] for name in ("backend", "model", "seed")}
        member = ",".join(
            f"{k}={v.string_value or int(v.number_value)}" for k, v in sorted(shown.items())
        )
        result = read_result(folder / member)
        assert result is not None
        values = {metric.name.tag: metric.value for metric in group.metric_values}
        assert values["test/acc"] == pytest.approx(result["metrics"]["test/acc"])
        assert values["test/loss"] == pytest.approx(result["metrics"]["test/loss"])
        assert set(values) == set(metrics)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    sweep(folder, *FOUR, "sweep=four")
    return folder / "outputs/sweeps/four"


@pytest.fixture
def cluster() -> Iterator[str]:
    """Two Ray nodes with a place for one member each; the address."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="hydra-ray-launcher is missing")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()


@pytest.mark.xdist_group("four")
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_launcher_makes_no_difference(launcher: str, four: Path, tmp_path: Path) -> None:
    plugin = launcher.partition("_")[0]
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    out = sweep(tmp_path, *FOUR, "sweep=four", f"hydra/launcher={launcher}")
    assert out.splitlines()[-1] == "4 completed"
    assert numbers(tmp_path / "outputs/sweeps/four") == numbers(four)


@pytest.mark.xdist_group("four")
def test_ray_makes_no_difference(cluster: str, four: Path, tmp_path: Path) -> None:
    options = ["hydra/launcher=ray", f"+hydra.launcher.ray.init.address='{cluster}'"]
    out = sweep(tmp_path, *FOUR, "sweep=four", *options)
    assert out.splitlines()[-1] == "4 completed"
    assert numbers(tmp_path / "outputs/sweeps/four") == numbers(four)


@pytest.mark.parametrize(
    ("signum", "whole", "code"), [("INT", True, 130), ("TERM", False, 143), ("TERM", True, 143)]
)
def test_a_signal_saves_all_members(signum: str, whole: bool, code: int, tmp_path: Path) -> None:
    parallel = ["hydra/launcher=joblib"] if whole else []
    process = start(tmp_path, "seed=0,1,2", *LONG, "sweep=cut", *parallel)
    folder, at_work = tmp_path / "outputs/sweeps/cut", 2 if whole else 1
    wait_until(lambda: len(list(folder.glob("*/checkpoints/last.ckpt"))) == at_work, process)
    if not whole:
        busy = start(tmp_path, "seed=0,1", *LONG, "sweep=cut")
        _, said = busy.communicate(timeout=100)
        assert busy.returncode == 2
        assert "sweep.name=cut: another process is running this sweep" in said
    (os.killpg if whole else os.kill)(process.pid, getattr(signal, f"SIG{signum}"))
    out, said = process.communicate(timeout=100)
    assert process.returncode == code, out + said
    assert out.splitlines()[-1] == (
        f"interrupted by SIG{signum}; the same command goes on with what is left"
    )
    assert "Traceback" not in said
    statuses = Counter(row["status"] for row in rows(folder).values())
    assert statuses == {"interrupted": at_work, "pending": 3 - at_work}
    for name, row in rows(folder).items():
        result = read_result(folder / name) or {"epochs": 0}
        assert int(row["epochs"]) == result["epochs"]


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
    recipe = ["model.norm=false", "model.activation=relu", "optimizer=sgd", "trainer.max_epochs=1"]
    varied = ["optimizer.lr=1e20,0.01", "backend._target_=mypkg.Dies,cnntrain.conv.NativeConv2d"]
    folder = tmp_path / "outputs/sweeps/bad"
    # Rehearsed without the file, which comes when the first member has begun.
    process = start(tmp_path, *recipe, *varied, "sweep=bad")
    wait_until((folder / "sweep.yaml").exists, process)
    (tmp_path / "die").touch()
    out, said = process.communicate(timeout=200)
    assert process.returncode == 1, out + said
    found = {(r["optimizer.lr"], r["backend._target_"]): r for r in rows(folder).values()}
    killed = found["0.01", "mypkg.Dies"]
    assert killed["status"] == "failed"
    assert killed["error"] == "its process was ended by SIGKILL (by the system, if memory ran out)"
    diverged = found["1e+20", "cnntrain.conv.NativeConv2d"]
    assert diverged["error"].startswith("NotFinite: epoch 1/1, batch 2")
    assert found["0.01", "cnntrain.conv.NativeConv2d"]["status"] == "completed"
    assert sum("failed: its process was ended by SIGKILL" in line for line in out.splitlines()) >= 1
    assert out.splitlines()[-1] == "1 completed, 3 failed"
    (tmp_path / "die").unlink()
    out = sweep(tmp_path, *recipe, *varied, "sweep=bad", code=1)
    assert out.splitlines()[-1] == "2 completed, 2 failed"


def test_fail_fast(tmp_path: Path) -> None:
    recipe = ["model.norm=false", "model.activation=relu", "optimizer=sgd", "trainer.max_epochs=1"]
    out = sweep(
        tmp_path,
        *recipe,
        "optimizer.lr=1e20,0.01,0.02",
        "sweep=bad",
        "sweep.fail_fast=true",
        code=1,
    )
    assert out.splitlines()[-1] == "0 completed, 1 failed, 2 unfinished"
    statuses = Counter(row["status"] for row in rows(tmp_path / "outputs/sweeps/bad").values())
    assert statuses == {"failed": 1, "pending": 2}


def test_another_base_leaves_all_as_it_is(tmp_path: Path) -> None:
    sweep(tmp_path, "seed=0,1", "trainer.max_epochs=1", "sweep=base")
    folder = tmp_path / "outputs/sweeps/base"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    process = start(tmp_path, "seed=0,1,2", "trainer.max_epochs=2", "sweep=base")
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "trainer.max_epochs=2: the sweep 'base' was begun with 1; take another name" in said
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


SEARCH = ["search=lenet5_lr", "trainer.max_epochs=2"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    out = sweep(folder, *SEARCH, "search.trials=20")
    assert out.splitlines()[-1] == "20 ended"
    return folder / "outputs/sweeps/lenet5_lr"


@pytest.mark.xdist_group("search")
def test_a_search_killed_in_the_middle(searched: Path, tmp_path: Path) -> None:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    folder = tmp_path / "outputs/sweeps/lenet5_lr"
    process = start(tmp_path, *SEARCH, "search.trials=20")
    ended = ("completed", "pruned")
    wait_until(
        lambda: sum((read_result(f) or {}).get("status") in ended for f in folder.glob("t*")) > 8,
        process,
    )
    process.kill()
    process.communicate()
    sweep(tmp_path, *SEARCH, "search.trials=20")
    assert numbers(folder) == numbers(searched)
    assert len(rows(folder)) == 20
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    backend = JournalFileBackend(str(folder / "study.journal"))
    (study,) = optuna.get_all_study_names(JournalStorage(backend))
    trials = optuna.load_study(study_name=study, storage=JournalStorage(backend)).trials
    assert len(trials) == 20
    states = Counter(trial.state.name for trial in trials)
    statuses = Counter(row["status"] for row in rows(folder).values())
    assert states["COMPLETE"] == statuses["completed"] > 0
    assert states["PRUNED"] == statuses["pruned"]
    assert sum(states.values()) == states["COMPLETE"] + states["PRUNED"] == 20


@pytest.mark.xdist_group("search")
def test_a_search_is_made_longer(searched: Path) -> None:
    out = sweep(searched.parents[2], *SEARCH, "search.trials=20")
    assert "[" not in out.splitlines()[1]  # nothing was run
    sweep(searched.parents[2], *SEARCH, "search.trials=22", "hydra/launcher=joblib")
    assert len(rows(searched)) == 22
