"""The walk of docs/own_images.md, in the order of the page, in one folder."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from forked import run_command

PAGE = (ROOT / "docs/own_images.md").read_text()
QUICK = ["trainer.max_epochs=1", "+trainer.limit_train_batches=3", "tensorboard=scalars"]


def test_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    last = ""
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.S):
        if language == "python":
            exec(compile(block.replace('"train")', '"test")'), "own_images.md", "exec"), {})
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line.split("   #")[0])
            if program == "python":
                arguments = ["train", *arguments[1:], *QUICK]
            done = run_command(arguments, tmp_path)
            assert (done.returncode, done.stderr) == (0, ""), line
            last = done.stdout
    assert "test accuracy" in last
    (evaluation,) = tmp_path.glob("outputs/photos/evaluate/*/evaluation.json")
    assert re.search(r'"image": "[A-Z][^"]*/\d+.png"', evaluation.read_text())
    (predictions,) = tmp_path.glob("outputs/photos/predict/*/predictions.jsonl")
    assert len(predictions.read_text().splitlines()) == 100
    assert (tmp_path / "outputs/photos/export/best.onnx").exists()
