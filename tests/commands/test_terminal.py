"""Terminal output: standard streams of every kind, width, --help and --version."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cnntrain import commands
from cnntrain.commands.finished_run import prediction_line
from cnntrain.commands.help import show_help
from cnntrain.config import CONF, ConfigError, compose_all
from cnntrain.conv import BACKENDS
from cnntrain.inference.prediction import Prediction
from cnntrain.inference.trained import choose_device
from cnntrain.models import LeNet5, layer_table
from cnntrain.terminal import UNLIMITED, output, table_text
from cnntrain.training.trainer import device_text

ROOT = Path(__file__).parents[2]
TEXT = "− 1 ± 2 ≈ – × ≥ ─ é 中"
WIDTHS = [40, 60, 80, 110, 200]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252", "cp949"])
def test_characters_that_an_encoding_lacks(encoding: str) -> None:
    """They are replaced by ASCII."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe:
        print(TEXT, file=output(writer, encoding), flush=True)
        os.close(writer)
        found = pipe.read().decode(encoding).strip()
    instead = ["-", "1", "+-", "2", "~", "-", "x", ">=", "-", r"\xe9", r"\u4e2d"]
    for shown, ascii_text, character in zip(found.split(), instead, TEXT.split(), strict=True):
        there = character.encode(encoding, "ignore")
        assert shown == (character if there else ascii_text)


SCRIPT = f"""
import os, sys
from cnntrain.terminal import safe_streams
with safe_streams():
    file = open(sys.argv[1], "w")  # gets none of the standard streams' descriptors
    for _ in range(2000):
        print({TEXT!r}, {TEXT!r})
        print({TEXT!r}, file=sys.stderr)
    sys.stdin.read()
    file.write("completed")
    file.close()
"""


@pytest.mark.parametrize(
    ("streams", "code", "expected"),
    [
        (">&- 2>&- <&-", 0, ""),
        ("2>&- >/dev/null </dev/null", 0, ""),
        (">&- 2>/dev/null </dev/null", 0, ""),
        ("2>/dev/null </dev/null | head -n 1; exit ${PIPESTATUS[0]}", 0, TEXT),
        ("</dev/null 2>&1 | head -n 1; exit ${PIPESTATUS[0]}", 0, ""),
        (">/dev/null </dev/null 2>/dev/full", 0, ""),
        ("2>&1 >/dev/full </dev/null | grep cnntrain; exit ${PIPESTATUS[0]}", 1,
         "cnntrain: standard output: No space left on device"),
    ],
)  # fmt: skip
def test_closed_and_full_streams(streams: str, code: int, expected: str, tmp_path: Path) -> None:
    """A command completes its work; the exit code is 1 only after an error of standard output."""
    command = f"'{sys.executable}' -c \"$SCRIPT\" '{tmp_path / 'done'}' {streams}"
    environment = {**os.environ, "SCRIPT": SCRIPT, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == code
    assert expected in done.stdout
    assert "Error" not in done.stdout + done.stderr
    assert (tmp_path / "done").read_text() == "completed"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="members need stderr with Python 3.10")
def test_paths_beyond_ascii_in_an_ascii_locale_without_stderr(tmp_path: Path) -> None:
    """In --config-dir, hydra.sweep.dir and resume, in the C locale."""
    (tmp_path / "ü/model").mkdir(parents=True)
    (tmp_path / "ü/model/mine.yaml").write_text("_target_: cnntrain.models.Shallow\n")
    options = "--config-dir ü model=mine data=fashion_mnist_mini tensorboard=scalars seed=0"
    options += " trainer.max_epochs=1 +trainer.limit_train_batches=2 hydra.sweep.dir=läufe/日本"
    command = f"'{sys.executable}' -m cnntrain train"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    environment["LC_ALL"] = "C"
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"{command} -m {options} 2>&- | head -n 2; echo ${{PIPESTATUS[0]}}; "
            f"{command} resume=$(echo läufe/日本/+*)",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    first, second, code, resumed, *_ = done.stdout.splitlines()
    assert (code, first) == ("0", "sweep: checking the config of every run"), done.stderr
    assert second.startswith("sweep \\u65e5\\u672c: 1 members")
    assert (done.returncode, resumed) == (0, "already completed"), done.stderr
    (file,) = tmp_path.glob("läufe/日本/*/train.log")
    log = file.read_text(encoding="utf-8")
    assert re.search(r"device: cpu, 1 thread\n", log)
    assert "────" in log
    assert "epoch 1/1  train loss" in log


@pytest.mark.parametrize("columns", [*WIDTHS, UNLIMITED])
def test_lines_and_tables_fit(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is shown, or listed as left out."""
    monkeypatch.setenv("COLUMNS", str(columns))
    table = layer_table(LeNet5(conv=BACKENDS["native"]), (1, 28, 28))
    text = table_text(table, ("output", "type", "parameters"), columns)
    assert max(map(len, text.splitlines())) <= columns
    for title in ("output", "type", "parameters", "MACs / image"):
        assert title in " ".join(text.split())
    assert ("No room for" in text) == (columns < 80)

    found = Prediction("photo.png", [("T-shirt/top", 0.9), ("Shirt", 0.08), ("Coat", 0.02)])
    lines = prediction_line(found).splitlines()
    assert max(map(len, lines)) <= columns
    shown = " ".join(" ".join(lines).split())
    assert shown == "photo.png T-shirt/top 90.0% Shirt 8.0% Coat 2.0%"


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "export", "verify", "benchmark"])
def test_help_has_the_comment_of_each_option(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {"train": ["trainer=cpu", "model=shallow"]}.get(name, [])
    cfg = compose_all(overrides, name=name, types=False)
    files = [f"{name}.yaml"]
    if name == "train":
        files += ["trainer/auto.yaml", "model/shallow.yaml", "optimizer/adam.yaml"]
    contents = [(CONF / file).read_text(encoding="utf-8").partition("\nhydra:") for file in files]
    found = [
        (option, " ".join(comment.replace("#", " ").split()))
        for content, *_ in contents
        for option, comment in re.findall(r"^ *(\w+):.*?  +# (.+)$", content, re.MULTILINE)
    ]
    assert len(found) >= 4
    for columns in (40, UNLIMITED):
        monkeypatch.setenv("COLUMNS", str(columns))
        show_help(cfg, name, CONF, None)
        text = " ".join(capsys.readouterr().out.replace("#", " ").split())
        for option, comment in found:
            _, option_there, rest = text.partition(f" {option}: ")
            assert option_there
            assert comment in rest


@pytest.mark.parametrize("typed", [["train.py", "--version"], ["cnntrain", "--version"],
                                   ["cnntrain", "report", "--version"]])  # fmt: skip
def test_version(
    typed: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", typed)
    monkeypatch.setattr(commands, "watching", contextlib.nullcontext)  # for a whole process
    commands.main("train" if typed[0] == "train.py" else None)
    assert capsys.readouterr().out == f"cnntrain {commands.cnntrain.__version__}\n"


def test_choice_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda in (False, True):
        for mps in (False, True):
            monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
            monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
            best = "cuda" if cuda else "mps" if mps else "cpu"
            assert choose_device("auto") == torch.device(best)
            assert choose_device("cpu") == torch.device("cpu")
            if mps:
                assert choose_device("mps") == torch.device("mps")
            else:
                with pytest.raises(ConfigError, match="device=mps: this machine has no GPU"):
                    choose_device("mps")


def test_text_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")

    def text(device: str, world: int) -> str:
        strategy = SimpleNamespace(root_device=torch.device(device))
        trainer: Any = SimpleNamespace(strategy=strategy, world_size=world)
        return device_text(trainer)

    assert text("cpu", 1) == "cpu, 2 threads"
    assert text("cpu", 3) == "3 x cpu, 2 threads each"
    assert text("mps", 1) == "mps"
    assert text("cuda:0", 1) == "cuda (NVIDIA H200)"
