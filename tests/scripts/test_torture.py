"""The short form of scripts/torture.py, and the failures that it detects."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from torturing.corruptions import CONTENT, KINDS, SHORT, damage, judge
from torturing.kills import wrong
from torturing.runs import differences, record

from cnntrain.config import compose
from cnntrain.training import train

pytestmark = pytest.mark.xdist_group("torture")  # in one process: the script runs once for all


@pytest.fixture(scope="module")
def tortured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of the runs of the script, and what it printed."""
    folder = tmp_path_factory.mktemp("torture") / "all"
    numbers = ["--kills", "3", "--epochs", "1", "--corruptions", "6", "--seed", "0"]
    command = [sys.executable, str(ROOT / "scripts/torture.py"), *numbers, "--folder", str(folder)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    train(compose([*SHORT, "seed=5"]), folder / "corruptions/other seed")
    return folder, done.stdout


@pytest.fixture(scope="module")
def right(tortured: tuple[Path, str]) -> dict[str, Any]:
    return record(tortured[0] / "corruptions/completed")


def test_short_form(tortured: tuple[Path, str]) -> None:
    _, printed = tortured
    assert re.search(r"^3 kills over \d training", printed, re.MULTILINE)
    assert re.search(r"^ +\d  SIGKILL in a write, ", printed, re.MULTILINE)
    assert re.search(r"^6 corruptions$", printed, re.MULTILINE)
    assert re.search(r": recovered$", printed, re.MULTILINE)
    assert re.search(r"^0 problems", printed, re.MULTILINE)


def test_equal_runs_have_equal_records(tortured: tuple[Path, str], right: dict[str, Any]) -> None:
    folder, _ = tortured
    assert right["result"]["status"] == "completed"
    assert len(right["tensorboard"]["scalars"]["train/loss_step"]) == 12
    assert len(right["last.ckpt"]["state_dict"]) > 20
    other = record(folder / "corruptions/other seed")
    found = "\n".join(differences(right, other))
    for part in ("/last.ckpt/state_dict", "/best.ckpt", "/metrics.csv", "/tensorboard", "/result"):
        assert part in found


@pytest.mark.parametrize("file", ["metrics.csv", "checkpoints/best.ckpt", "result.json"])
def test_wrong_result_is_detected(
    tortured: tuple[Path, str], right: dict[str, Any], tmp_path: Path, file: str
) -> None:
    intact = tortured[0] / "corruptions"
    shutil.copytree(intact / "completed", tmp_path / "run")
    assert judge(0, "", tmp_path / "run", set(), right) == ("recovered", "")
    shutil.copy(intact / "other seed" / file, tmp_path / "run" / file)
    assert judge(0, "", tmp_path / "run", {"events.tfevents"}, right)[0] == "FAILED"


def test_wrong_message_is_detected(right: dict[str, Any], tmp_path: Path) -> None:
    def outcome(code: int | None, text: str) -> str:
        return judge(code, text, tmp_path, {"last.ckpt"}, right)[0]

    assert outcome(1, "cnntrain: last.ckpt: is no checkpoint") == "rejected"
    assert outcome(1, "cnntrain: something is wrong") == "FAILED"
    assert outcome(1, "Traceback (most recent call last): last.ckpt") == "FAILED"
    assert outcome(None, "last.ckpt") == "FAILED"
    assert outcome(0, "already completed\n\ntest accuracy   99.00%") == "FAILED"


@pytest.mark.parametrize(
    ("signum", "code", "text", "begun", "status", "problem"),
    [
        (15, 143, "", True, "interrupted", None),
        (15, 143, "", True, "running", "status in result.json is running"),
        (15, 0, "", True, "running", "exit code 0"),
        (15, 0, "", True, "completed", None),
        (2, 1, "", True, "interrupted", "exit code 1"),
        (2, 130, "Traceback", True, "interrupted", "a traceback"),
        (10, -10, "", False, "none", None),
        (10, -10, "", True, "interrupted", "exit code -10"),
        (9, -9, "", True, "running", None),
        (15, None, "", True, "running", "does not end within 60 s"),
    ],
)
def test_wrong_exit_is_detected(
    signum: int, code: int | None, text: str, begun: bool, status: str, problem: str | None
) -> None:
    assert wrong(signum, code, text, begun=begun, status=status) == problem


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_damage(tmp_path: Path, kind: str) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    contents = {"a": random.Random(0).randbytes(500), "b": b"b" * 500}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    other.write_bytes(b"other")
    named = damage(kind, folder / "a", random.Random(1), other)
    found = {p.name: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}
    assert "a" in named
    assert found != contents
    if kind in CONTENT:
        assert found["b"] == contents["b"]
        assert len(found["a"] or b"") <= 500
