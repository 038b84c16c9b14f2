"""Optuna study of a search: trials, results, resuming after a kill."""

import json
import math
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import ROOT
from filelock import Timeout
from optuna.trial import TrialState
from searches import completed, run_all, search, value

from cnntrain.config import ConfigError
from cnntrain.sweeps.study import (
    STUDY,
    JournalLock,
    SearchStudy,
    open_storage,
    summary,
)

Known = list[tuple[int, str, dict[str, Any], float | None]]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def known(sweep: Path) -> Known:
    """What does not depend on the time at which trials were run."""
    trials = optuna.load_study(study_name=None, storage=open_storage(sweep)).get_trials()
    return [(t.number, t.state.name, t.params, t.value) for t in trials]


def search_all(sweep: Path, node: Any, at_once: int = 1) -> SearchStudy:
    study = SearchStudy(sweep, node, seed=3)
    for _ in run_all(study, at_once):
        pass
    return study


SAMPLERS = {
    "random": optuna.samplers.RandomSampler,
    "tpe": lambda seed: optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=10, multivariate=True, constant_liar=True
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_trials_are_optunas(sweep: Path, name: str) -> None:
    """The same parameters as Optuna's own loop, with each trial's seed as it is documented."""
    study = search_all(sweep, search(f"search/sampler={name}", "search.trials=14"))
    own = optuna.create_study(direction="maximize")
    for number in range(14):
        seed = int(np.random.SeedSequence([3, number]).generate_state(1)[0])
        own.sampler = SAMPLERS[name](seed=seed)
        trial = own.ask()
        trial.suggest_float("optimizer.lr", 5e-4, 5e-2, log=True)
        trial.suggest_float("optimizer.weight_decay", 1e-6, 1e-2, log=True)
        trial.suggest_float("model.dropout", 0.0, 0.6, step=0.05)
        own.tell(trial, value(trial.params))
    assert [t.params for t in study.study.trials] == [
        {k: pytest.approx(v, rel=1e-9) for k, v in t.params.items()} for t in own.trials
    ]


def test_search_finds_the_optimum(sweep: Path) -> None:
    study = search_all(sweep, search("search.trials=30"), at_once=4)
    best = study.study.best_trial
    assert best.value > 0.97  # of 1 at lr 0.01, dropout 0; a random trial has 0.79 on average
    counts, first, command = summary(study, lambda own: shlex.join(["train", *own]))
    assert counts == "search       30 of 30 trials: 30 completed, 0 pruned, 0 failed"
    assert first == f"best trial   trial={best.number:03}, val/acc {100 * best.value:.2f} %"
    typed = dict(re.findall(r"(\S+)=(\S+)", command))
    assert command.split()[0] == "train"
    assert {k: float(v) for k, v in typed.items() if k in best.params} == best.params


def test_a_loss_is_minimised(sweep: Path) -> None:
    study = search_all(sweep, search("search.metric=val/loss", "search.trials=12"))
    losses = [-math.log(value(t.params)) for t in study.study.trials]
    assert study.study.best_value == min(losses)
    assert summary(study, shlex.join)[1].endswith(f"val/loss {min(losses):.4f}")


def test_names_of_trials(sweep: Path) -> None:
    space = {"optimizer.lr": {"low": 1e-5, "high": 1e-1, "log": True}, "model.norm": [True]}
    (asked,) = SearchStudy(sweep, search(space=space), seed=0).ask()
    lr = asked.values["optimizer.lr"]
    assert asked.name == f"trial=000,model.norm=true,optimizer.lr={float(f'{lr:.3e}')!r}"
    assert asked.overrides == [f"optimizer.lr={lr!r}", "model.norm=true"]


def test_statuses_of_trials(sweep: Path) -> None:
    node = search("search.trials=6")
    study = SearchStudy(sweep, node, seed=0)
    asked = study.ask(6)
    assert study.ask(6) == []
    results: list[dict[str, Any] | None] = [
        completed(0.5),
        {"status": "pruned", "metrics": {"val/acc": 0.25}},
        {"status": "failed", "error": "OSError: no room"},
        {"status": "failed", "error": "NonFiniteError: loss", "not_finite": {"epoch": 0}},
        {"status": "interrupted"},
        None,
    ]
    for _ in range(2):  # again, as after a kill in between
        study.tell(dict(enumerate(results)))
    states = [t.state.name for t in study.study.trials]
    assert states == ["COMPLETE", "PRUNED", "RUNNING", "FAIL", "RUNNING", "RUNNING"]
    counts = "1 completed, 1 pruned, 4 failed"
    assert summary(study, shlex.join)[0] == f"search       6 of 6 trials: {counts}"
    assert study.ask(6) == []  # not within one command

    again = SearchStudy(sweep, node, seed=0)
    left = again.ask(6)
    # Failed for a reason that may be gone, interrupted, not begun: in their own directories.
    assert [(a.name, a.overrides) for a in left] == [
        (asked[n].name, asked[n].overrides) for n in (2, 4, 5)
    ]
    again.tell({a.number: completed(0.75) for a in left})
    assert again.ask(6) == []
    assert (
        summary(again, shlex.join)[0]
        == "search       6 of 6 trials: 4 completed, 1 pruned, 1 failed"
    )
    fewer = SearchStudy(sweep, search("search.trials=4"), seed=0)
    assert summary(fewer, shlex.join)[0].startswith("search       6 of 4 trials: ")
    assert SearchStudy(sweep, node, seed=0).ask() == []
    more = SearchStudy(sweep, search("search.trials=8"), seed=0).ask(6)
    assert [a.name.partition(",")[0] for a in more] == ["trial=006", "trial=007"]


def test_number_of_trials_is_a_total(sweep: Path) -> None:
    assert len(search_all(sweep, search("search.trials=5")).study.trials) == 5
    study = SearchStudy(sweep, search("search.trials=8"), seed=3)
    assert sum(len(asked) for asked in run_all(study, 2)) == 3
    assert SearchStudy(sweep, search("search.trials=2"), seed=3).ask() == []


def test_grid_search_ends_with_all_combinations(sweep: Path) -> None:
    space = {
        "optimizer": ["adam", "sgd"],
        "optimizer.nesterov": {"choices": [True, False], "when": {"optimizer": "sgd"}},
        "model.dropout": {"low": 0.0, "high": 0.2, "step": 0.1},
    }
    node = search("search/sampler=grid", "search.trials=60", space=space)
    trials = search_all(sweep, node, at_once=2).study.trials
    tried = {json.dumps(t.params, sort_keys=True) for t in trials}
    assert len(trials) == len(tried) == 9
    assert {t.params["model.dropout"] for t in trials} == {0.0, 0.1, 0.2}


def test_another_search_is_rejected(sweep: Path) -> None:
    SearchStudy(sweep, search(), seed=0).ask()
    other = search("search.metric=val/loss", "search.space={optimizer.lr:{high:0.2}}")
    with pytest.raises(ConfigError) as caught:
        SearchStudy(sweep, other, seed=1)
    assert [problem.partition("; ")[0] for problem in caught.value.problems] == [
        "search.metric=val/loss: the sweep was begun with val/acc",
        "search.space.optimizer.lr.high=0.2: the sweep was begun with 0.05",
        "seed=1: the sweep was begun with 0",
    ]
    assert len(SearchStudy(sweep, search("search/sampler=random"), seed=0).ask()) == 1


# A search whose members take no time, in its own process.
DRIVER = """
import json, sys, time
from pathlib import Path
from omegaconf import OmegaConf
from searches import completed, value
from cnntrain.config.resume import add_checksum, read_result
from cnntrain.sweeps.study import SearchStudy

sweep, at_once = Path(sys.argv[1]), int(sys.argv[2])
print("begun", flush=True)
study = SearchStudy(sweep, OmegaConf.load(sweep / "search.yaml"), seed=3)
while asked := study.ask(at_once):
    for trial in asked:
        directory = sweep / trial.name
        directory.mkdir(exist_ok=True)
        time.sleep(0.005)
        if not read_result(directory):
            with (sweep / "trained").open("a") as file:
                file.write(trial.name + "\\n")
            result = add_checksum(completed(value(trial.values)))
            (directory / "part").write_text(json.dumps(result))
            (directory / "part").rename(directory / "result.json")
    study.tell({trial.number: read_result(sweep / trial.name) for trial in asked})
"""


@pytest.mark.parametrize("at_once", [3])
def test_killed_at_any_moment(tmp_path: Path, at_once: int) -> None:
    from omegaconf import OmegaConf

    node = search("search.trials=12")
    for name in ("uninterrupted", "killed"):
        (tmp_path / name).mkdir()
        OmegaConf.save(node, tmp_path / name / "search.yaml")
    search_all(tmp_path / "uninterrupted", node, at_once)
    places = [str(ROOT), str(ROOT / "tests"), *sys.path[1:]]
    sweep, moments, kills = tmp_path / "killed", random.Random(at_once), 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(sweep), str(at_once)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        try:
            process.wait(timeout=moments.uniform(0, 0.12) if kills < 5 else 60)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert process.returncode == 0
    assert kills >= 3
    assert known(sweep) == known(tmp_path / "uninterrupted")
    trained = (sweep / "trained").read_text().splitlines()
    assert len(set(trained)) == len([p for p in sweep.iterdir() if p.is_dir()]) == 12


def test_incomplete_last_line(sweep: Path) -> None:
    """Wherever a journal ends, the search resumes with the same trials."""
    node = search("search.trials=4")
    search_all(sweep, node)
    whole, before = (sweep / STUDY).read_bytes(), known(sweep)
    lines = [m.end() for m in re.finditer(rb"\n", whole)]
    cuts = {0, 1, *lines[::3], *(n - 1 for n in lines[1::3]), *range(50, len(whole), 997)}
    for cut in sorted(cuts):
        (sweep / STUDY).write_bytes(whole[:cut])
        search_all(sweep, node)
        assert known(sweep) == before, cut
        assert all(json.loads(line) for line in (sweep / STUDY).read_bytes().splitlines())


def test_damaged_journal(sweep: Path) -> None:
    search_all(sweep, search("search.trials=2"))
    lines = (sweep / STUDY).read_bytes().splitlines(keepends=True)
    for damage in (b"???\n", b"[]\n", b'{"op_code": 6}\n'):
        (sweep / STUDY).write_bytes(b"".join([*lines[:3], damage, *lines[3:]]))
        with pytest.raises(ConfigError, match=r"study\.journal: is damaged .*sweep=<name>"):
            SearchStudy(sweep, search(), seed=3)


def test_journal_lock(sweep: Path) -> None:
    open_storage(sweep)
    first, second = (JournalLock(sweep / STUDY) for _ in range(2))
    first.acquire()
    second.lock.timeout = 0
    with pytest.raises(Timeout):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


@pytest.fixture
def dashboard(sweep: Path) -> Iterator[str]:
    """The address of optuna-dashboard on the study's file."""
    pytest.importorskip("optuna_dashboard")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (sweep / STUDY).touch()
    process = subprocess.Popen(
        [
            *[sys.executable, "-c", "from optuna_dashboard._cli import main; main()"],
            *[str(sweep / STUDY), "--host", "127.0.0.1", "--port", str(port)],
        ],
        stderr=subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


def test_optuna_and_its_dashboard_open_the_study(sweep: Path, dashboard: str) -> None:
    search_all(sweep, search("search.trials=7"))
    backend = optuna.storages.journal.JournalFileBackend(str(sweep / STUDY))
    own = optuna.load_study(
        study_name="search", storage=optuna.storages.JournalStorage(backend)
    )  # as in Optuna's documentation
    assert [t.state for t in own.trials] == [TrialState.COMPLETE] * 7
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{dashboard}/api/studies", timeout=10) as answer:
                (study,) = json.load(answer)["study_summaries"]
                break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert study["study_name"] == "search"
    assert study["directions"] == ["maximize"]
    with urllib.request.urlopen(f"{dashboard}/api/studies/{study['study_id']}?after=0") as answer:
        content = json.load(answer)
    assert [t["values"] for t in content["trials"]] == [[t.value] for t in own.trials]
