"""A sweep that is killed, interrupted, spread over nodes or extended has the numbers of one that
was left alone. Real processes; what is ended is found by the locks that it holds."""

import contextlib
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweep_commands import completed, end, hparams, numbers, rows, start, wait_until

from cnntrain.config.resume import read_result
from cnntrain.sweeps.records import METRICS, history

pytestmark = pytest.mark.xdist_group("sweeps killed")  # one undisturbed sweep for all

TINY = ["data=fashion_mnist_mini", "trainer=cpu", "data.batch_size=32"]
TINY += ["+trainer.limit_train_batches=4", "tensorboard=scalars"]
FOUR = [*TINY, "backend=native,im2col", "seed=0,1", "trainer.max_epochs=6"]  # with dropout
MEMBERS = [f"backend={b},seed={s}" for b in ("native", "im2col") for s in (0, 1)]
SEARCH = ["search=lenet5_lr", *TINY, "trainer.max_epochs=1", "search.trials=12"]


def training(member: Path) -> bool:
    """Whether it is past its second epoch, and not at its end."""
    return 2 <= len(history(member)) < 6  # the first one has its checkpoint


def holder(member: Path) -> int | None:
    """The process that trains there: the one that has the directory's lock open."""
    lock = member.resolve() / ".lock"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(f.is_symlink() and f.readlink() == lock for f in (process / "fd").iterdir()):
                return int(process.name)
    return None


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed sweep of four."""
    folder = tmp_path_factory.mktemp("calm")
    lines = end(start(folder, *FOUR, "sweep=s"))
    assert lines[-1] == "4 completed"
    assert sum(line.startswith("[") for line in lines) == 4
    return folder / "outputs/sweeps/s"


def test_everything_is_killed_at_once(calm: Path, tmp_path: Path) -> None:
    """As when the machine loses power: sweep and members, in the middle of three trainings."""
    folder, done, cut = tmp_path / "outputs/sweeps/s", dict[str, Any](), 0
    for name in (MEMBERS[0], MEMBERS[1], MEMBERS[3]):
        process = start(tmp_path, *FOUR, "sweep=s")
        wait_until(process, lambda name=name: training(folder / name))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        cut += (read_result(folder / name) or {}).get("status") == "running"
        assert done.items() <= completed(folder).items()
        done = completed(folder)
    assert cut >= 2  # else the tests look too late
    lines = end(start(tmp_path, *FOUR, "sweep=s"))
    assert lines[0].startswith(f"sweep s: 4 members, {len(done)} completed before")
    assert lines[-1] == "4 completed"
    assert done.items() <= completed(folder).items()
    assert numbers(folder) == numbers(calm)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_a_member_is_killed(calm: Path, tmp_path: Path) -> None:
    """Its sweep goes on, and the next one with it from where it was."""
    folder, name = tmp_path / "outputs/sweeps/s", MEMBERS[1]
    process = start(tmp_path, *FOUR, "sweep=s")
    wait_until(process, lambda: training(folder / name))
    member = holder(folder / name)
    assert member is not None
    assert os.getsid(member) == process.pid
    os.kill(member, signal.SIGKILL)
    lines = end(process, code=1)
    error = "its process was ended by SIGKILL (by the system, if memory ran out)"
    log = f"outputs/sweeps/s/{name}/train.log"
    assert any(f"] {name}: failed: {error} ({log})" in line for line in lines), lines
    assert lines[-1] == "3 completed, 1 failed"
    assert (rows(folder)[name]["status"], rows(folder)[name]["error"]) == ("failed", error)
    assert int(rows(folder)[name]["epochs"]) >= 1
    done = completed(folder)
    assert len(done) == 3
    lines = end(start(tmp_path, *FOUR, "sweep=s"))
    assert sum(line.startswith("[") for line in lines) == 1
    assert (folder / name / "train.log").read_text().count("epoch 1/6 ") == 1  # not begun anew
    assert done.items() <= completed(folder).items()
    assert numbers(folder) == numbers(calm)


def test_interrupted_and_completed(calm: Path, tmp_path: Path) -> None:
    """Ctrl-C is for the whole group, SIGTERM comes to the sweep alone; both save what is begun."""
    folder = tmp_path / "outputs/sweeps/s"
    for name, signum, code in ((MEMBERS[0], "SIGINT", 130), (MEMBERS[2], "SIGTERM", 143)):
        process = start(tmp_path, *FOUR, "sweep=s")
        wait_until(process, lambda name=name: training(folder / name))
        (os.killpg if signum == "SIGINT" else os.kill)(process.pid, getattr(signal, signum))
        lines = end(process, code)
        assert lines[-1] == f"interrupted by {signum}; the same command resumes what is left"
        found = rows(folder)
        after = MEMBERS[MEMBERS.index(name) + 1 :]
        assert [found[later]["status"] for later in after] == ["pending"] * len(after)
        if found[name]["status"] != "completed":  # or it was at its end already
            assert found[name]["status"] == "interrupted"
            assert any(f"] {name}: interrupted after " in line for line in lines)
        assert not (folder / ".stop").exists()
    assert end(start(tmp_path, *FOUR, "sweep=s"))[-1] == "4 completed"
    assert numbers(folder) == numbers(calm)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("imported", ["", "torch/lib"])
def test_ctrl_c_while_members_processes_are_prepared(imported: str, tmp_path: Path) -> None:
    """The server that they come from starts, or imports torch, when the terminal's SIGINT comes."""

    def preparing() -> bool:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                called = (process / "cmdline").read_text()
                own = os.getpgid(int(process.name)) == sweep.pid
                if own and "forkserver" in called and imported in (process / "maps").read_text():
                    return True
        return False

    sweep = start(tmp_path, *FOUR, "sweep=s")
    wait_until(sweep, preparing)
    os.killpg(sweep.pid, signal.SIGINT)
    said, wrong = sweep.communicate(timeout=100)
    assert sweep.returncode == 130
    assert wrong == "\ncnntrain: interrupted by SIGINT\n"
    assert said.splitlines() == ["sweep: checking the config of every run"]
    assert not (tmp_path / "outputs").exists()


def test_threads_are_the_sweeps(calm: Path, tmp_path: Path) -> None:
    """Not the environment's, by which sums would have other roundings."""
    typed = [*TINY, "backend=im2col", "seed=1,0", "trainer.max_epochs=6", "sweep=s"]
    end(start(tmp_path, *typed, OMP_NUM_THREADS="2", MKL_NUM_THREADS="2"))
    found = rows(tmp_path / "outputs/sweeps/s")
    for seed in (0, 1):
        assert {key: found[f"seed={seed}"][key] for key in METRICS} == {
            key: rows(calm)[f"backend=im2col,seed={seed}"][key] for key in METRICS
        }


def test_hparams_of_an_extended_sweep(calm: Path, tmp_path: Path) -> None:
    """Also those that were completed before an option varied have its value, under one schema."""
    folder = Path(shutil.copytree(calm, tmp_path / "outputs/sweeps/s"))
    more = ["optimizer.lr=0.005,0.02", "trainer.gradient_clip_val=null,1.0"]
    typed = [*TINY, "backend=native", "seed=1", "trainer.max_epochs=6", *more]
    assert end(start(tmp_path, *typed, "sweep=s"))[-1] == "4 completed"
    columns, metrics, members = hparams(folder)
    varied = ["backend", "seed", "optimizer.lr", "trainer.gradient_clip_val"]
    assert set(columns) == set(varied)
    assert metrics == list(METRICS)
    assert set(members) == set(rows(folder))
    assert len(members) == 7
    for name, row in rows(folder).items():
        shown = members[name]
        for option in varied:
            typed_value = str(shown[option])
            assert typed_value == row[option] or float(typed_value) == float(row[option])
        # The tab has the last scalar of each; sweep.csv has those of the epoch that was chosen.
        last = {**history(folder / name)[-1], **{k: float(row[k]) for k in METRICS[2:4]}}
        assert {k: shown[k] for k in METRICS} == pytest.approx({k: last[k] for k in METRICS})


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_launcher_makes_no_difference(launcher: str, calm: Path, tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    lines = end(start(tmp_path, *FOUR, "sweep=s", f"hydra/launcher={launcher}"))
    assert lines[-1] == "4 completed"
    assert numbers(tmp_path / "outputs/sweeps/s") == numbers(calm)


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of two Ray nodes on this machine, with a place for one member each."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs hydra-ray-launcher")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()


def test_on_two_nodes_of_ray(calm: Path, cluster: str, tmp_path: Path) -> None:
    """That members are on both: a node has one place, and two train at the same time."""
    ray = ["hydra/launcher=ray", f"hydra.launcher.ray.init.address='{cluster}'"]
    process = start(tmp_path, *FOUR, "sweep=s", *ray)
    folder, nodes = tmp_path / "outputs/sweeps/s", set[str]()
    while process.poll() is None:
        for name in MEMBERS:
            worker = holder(folder / name)
            nodes |= {node for node in ancestors(worker) if "raylet" in node} if worker else set()
        time.sleep(0.05)
    assert end(process)[-1] == "4 completed"
    assert len(nodes) == 2
    assert numbers(folder) == numbers(calm)


def ancestors(process: int) -> Iterator[str]:
    """The names of the programs above, with their numbers."""
    while process > 1:
        try:
            name, state = (Path(f"/proc/{process}/stat").read_text()).rsplit(")", 1)
        except OSError:
            return
        yield name
        process = int(state.split()[1])


def test_a_search_in_parallel_is_killed(tmp_path: Path) -> None:
    """Two trials at a time, all killed at once, then the sweep alone: as many trials as wanted."""
    optuna = pytest.importorskip("optuna", reason="needs optuna")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs hydra-joblib-launcher")
    folder = tmp_path / "outputs/sweeps/lenet5_lr"
    typed = [*SEARCH, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = dict[str, Any]()
    for least, kill in ((3, os.killpg), (7, os.kill)):
        process = start(tmp_path, *typed)
        wait_until(process, lambda least=least: len(completed(folder)) >= least)
        kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert done.items() <= completed(folder).items()
        done = completed(folder)
    assert end(start(tmp_path, *typed))[-1] == "12 ended"
    assert done.items() <= completed(folder).items()
    assert Counter(row["status"] for row in rows(folder).values()) == {"completed": 12}
    study = optuna.load_study(
        study_name=None,
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
        ),
    )
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 12
    found = {f"{trial.value:.12g}" for trial in study.trials}
    assert found == {f"{float(row['val/acc']):.12g}" for row in rows(folder).values()}
