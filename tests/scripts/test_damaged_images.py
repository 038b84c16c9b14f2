"""The short form of scripts/damaged_images.py, and the failures that it detects."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from damaged_images import DAMAGES, Case, decodable, judge
from PIL import Image


def test_short_form() -> None:
    command = [sys.executable, str(ROOT / "scripts/damaged_images.py"), "--cases", "10"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n0 problems" in done.stdout
    counts = [int(line.split()[0]) for line in done.stdout.splitlines() if ": stop: " in line]
    assert sum(counts) == 10


def test_failures_are_detected(tmp_path: Path) -> None:
    good, bad = tmp_path / "photos/good.png", tmp_path / "photos/bad.png"
    good.parent.mkdir()
    Image.new("L", (9, 9)).save(good)
    bad.write_bytes(good.read_bytes()[:45])
    assert [decodable(path) for path in (good, bad, tmp_path)] == [True, False, False]
    both, used = {good: "a", bad: "a"}, {str(good): "a"}
    named = "photos: left out bad.png"

    def outcome(code: int | None, text: str, *others: object, **options: bool) -> str:
        found, expected = others or (used, both)
        return judge(code, text, found, expected, **options)[0]  # type: ignore[arg-type]

    assert outcome(0, named) == "trained"
    assert outcome(1, named, stop=True) == outcome(1, named, reject=True) == "rejected"
    assert outcome(None, named) == "FAILED"
    assert outcome(1, "Traceback (most recent call last)", reject=True) == "FAILED"
    assert outcome(1, "something is wrong", reject=True) == "FAILED"
    assert outcome(1, named) == "FAILED"  # for no reason
    assert outcome(-9, named) == "FAILED"
    assert outcome(0, named, stop=True) == "FAILED"  # not stopped
    assert outcome(0, "") == "FAILED"  # silently lost
    assert outcome(0, named, {**used, str(bad): "a"}, both) == "FAILED"  # trained on it
    assert outcome(0, named, {str(good): "b"}, both) == "FAILED"  # wrong label
    assert outcome(0, named, {**used, str(tmp_path / "c"): "a"}, both) == "FAILED"  # unexpected


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_damages(tmp_path: Path, number: int) -> None:
    for seed in range(3):
        case = Case(tmp_path / str(seed), random.Random(seed))
        before = {path: path.read_bytes() for path in case.expected}
        DAMAGES[number](case)
        files = [path for path in case.folder.rglob("*") if path.is_file()]
        after = {path: path.read_bytes() for path in files if not path.is_symlink()}
        assert after != before or case.root != case.folder
