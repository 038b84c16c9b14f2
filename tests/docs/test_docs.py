"""Every command of the README and of docs/*.md, as it stands there, each in its own process."""

import csv
import gzip
import logging
import os
import re
import shlex
import sys
from pathlib import Path

import benchmark_training
import numpy as np
import pytest
from command_line import QUICK, SCALARS
from conftest import ROOT
from forked import run_command
from idx_files import idx_bytes
from PIL import Image

from cnntrain.config import compose

# docs/own_images.md is executed as a whole, by test_own_images.py.
DOCS = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "own_images"]
PAGES = [ROOT / "README.md", *DOCS]


def commands_of(page: Path, *starts: str) -> list[str]:
    """A page's lines that start so; `pip`, `pytest` and the rest are run by .ci/run."""
    text = page.read_text()
    for name in ("photo.png", "folder", "scan.jpg"):  # the reader's own files
        text = text.replace(f"<{name}>", name)
    lines = text.splitlines()
    lines = [line.split("   #")[0].strip() for line in lines]
    commands = [c.strip() for line in lines for c in line.removeprefix("$ ").split("&&")]
    return [c for c in commands if c.startswith(starts) and "<" not in c]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_runs_are_created_before_they_are_used(page: Path) -> None:
    """In the order of the page, in a new clone."""
    lines = [
        c for c in commands_of(page, "python train.py", "cnntrain ", "echo") if "-m cnn" not in c
    ]
    created: set[str] = set()
    for line in lines:
        words = shlex.split(line.split("`")[0])
        if words[0] == "echo":
            created.add(words[-1])
        used = [w for w in words if w.startswith("run=")]
        used += [w for w in words[2:] if w.startswith("outputs/")]
        for word in used:
            assert word.removeprefix("run=") in created, line
        if "mypkg" in line and words[0] != "echo":
            assert "mypkg.py" in created, line
        created |= {
            w.removeprefix("hydra.run.dir=") for w in words if w.startswith("hydra.run.dir=")
        }
        named = [w.partition("=")[2] for w in words if w.startswith(("sweep=", "experiment="))]
        created |= {f"outputs/sweeps/{name}" for name in named}
        for word in words:  # other files are the reader's
            if word.startswith("images=cnntrain/"):
                assert (ROOT / word.removeprefix("images=")).exists()


def test_no_command_installs_what_is_not_published() -> None:
    pages = [*PAGES, ROOT / "CONTRIBUTING.md"]
    sources = [*(ROOT / "cnntrain").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")]
    for file in [*pages, *sources]:
        text = file.read_text()
        assert not re.search(r"pip install [\"']?cnntrain", text), file
    text = "".join(page.read_text() for page in PAGES)
    extras = re.findall(r'pip install -e "\.\[([\w,]+)\]"', text)
    declared = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    known = re.findall(r"^(\w+) = \[", declared, re.M)
    assert {name for found in extras for name in found.split(",")} <= set(known)
    assert len(extras) >= 4


def commands(*starts: str) -> list[str]:
    """Of all pages, each once."""
    return list(dict.fromkeys(c for page in PAGES for c in commands_of(page, *starts)))


@pytest.mark.parametrize("command", commands("cnntrain verify", "cnntrain benchmark"))
def test_command_of_the_lab(command: str, tmp_path: Path) -> None:
    """As in the docs, on few cases."""
    (tmp_path / "mypkg.py").write_text("from cnntrain.conv import NaiveConv2d as MyConv2d\n")
    arguments = shlex.split(command.split("`")[0])[1:]
    few = {"verify": ["short=true", "cases=2", "only=empty"], "benchmark": ["rounds=1"]}
    few["benchmark"] += ["min_turn_ms=0"] + ["batch_sizes=[2]"] * ("seed_table" not in command)
    done = run_command([*arguments, *few[arguments[0]]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (" run, of 60" if arguments[0] == "verify" else "x native") in done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, outputs/mine, and the pictures that the README names."""
    folder = tmp_path_factory.mktemp("workplace")
    options = [*QUICK, "backend=im2col", SCALARS, "hydra.run.dir=outputs/mine"]
    assert run_command(["train", *options], folder).returncode == 0
    (folder / "folder").mkdir()
    for name in ("photo.png", "folder/another.jpg", "scan.jpg"):
        Image.new("RGB", (90, 120), (60, 50, 40)).save(folder / name)
    idx = folder / "cnntrain/data/fashion_mnist_mini/t10k-images-idx3-ubyte.gz"
    idx.parent.mkdir(parents=True)
    idx.write_bytes(gzip.compress(idx_bytes(np.zeros((3, 28, 28), np.uint8))))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        *commands("cnntrain evaluate", "cnntrain predict", "cnntrain export"),
        *commands("cnntrain lesson"),
    ],
)
def test_command_of_the_pages(command: str, workplace: Path) -> None:
    arguments = shlex.split(command)[1:]
    few = ["rounds=1", "batch_size=2"] if arguments[:2] == ["lesson", "cost"] else []
    done = run_command([*arguments, *few], workplace)
    if "size=3 kernel=5" in command:  # as the page has it
        assert done.returncode == 2
        shown = (ROOT / "docs/lessons.md").read_text()
        assert all(line in shown for line in done.stderr.splitlines()), done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    last = done.stdout.splitlines()[-1]
    file = workplace / re.sub(r"   \(.* bytes\)$", "", last)
    assert last.startswith("{") or file.stat().st_size > 0


def test_output_of_lessons_is_in_their_page(workplace: Path) -> None:
    page = (ROOT / "docs/lessons.md").read_text()
    for lesson in (["window", "padding=1", "stride=2"], ["patterns"]):
        done = run_command(["lesson", *lesson], workplace)
        lines = [line.rstrip() for line in done.stdout.splitlines()[:-2]]
        text = "\n".join(lines if lesson[0] == "window" else lines[-3:])
        assert text.strip() in page


# The ablation is tested with the lessons.
TRAININGS = [c for c in commands("python train.py ") if "ablation" not in c]


LIMITS = ["+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"]


@pytest.mark.parametrize("command", TRAININGS)
def test_training_command(command: str, tmp_path: Path) -> None:
    """As in the docs, on little data."""
    (tmp_path / "mypkg.py").write_text("from cnntrain.conv import NaiveConv2d as MyConv2d\n")
    arguments = shlex.split(command.split("`")[0])[2:]
    own_data = any(a.startswith(("data=", "experiment=")) for a in arguments)
    if not own_data or any(a.startswith("experiment=lenet5") for a in arguments):
        arguments.append("data=fashion_mnist_mini")
    few = ["search.trials=2"] if "search=" in command else []
    few += [] if "tensorboard=" in command else [SCALARS]
    few += ["data.batch_size=8", "data.eval_batch_size=8"] * ("model=torchvision" in command)
    # Launchers and several processes have tests of their own.
    fewer = {"seed=0,1,2": "seed=0", "trainer.devices=2": "trainer.devices=1"}
    arguments = [fewer.get(a, a) for a in arguments if a != "hydra/launcher=joblib"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    environment["https_proxy"] = "http://127.0.0.1:9"  # no download
    done = run_command(["train", *arguments, *QUICK[1:], *LIMITS, *few], tmp_path, environment)
    if "trainer=gpu" in arguments and not Path("/dev/nvidia0").exists():
        assert done.returncode == 2
        assert "this machine has no GPU that PyTorch can use" in done.stderr
    elif "im2coll" in command or "=-1" in command:
        assert done.returncode == 2
        shown = "".join(page.read_text() for page in PAGES)
        assert all(line in shown for line in done.stderr.splitlines()), done.stderr
    elif "model.weights=DEFAULT" in command:
        assert done.returncode == 2
        assert "resnet18-f37072fd.pth can be neither downloaded nor read" in done.stderr
    elif "optimizer.lr=1e20" in command:
        assert done.returncode == 3
        assert "is nan; the first layer with a non-finite output is features.6" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        last = done.stdout.splitlines()[-1]
        assert "--cfg" in command or "test accuracy" in done.stdout or " -m " in command
        assert " -m " not in command or re.fullmatch(r"\d+ (completed|ended)", last), last


def test_benchmark_writes_its_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's measurement, one round on little data; what it measures is not tested."""
    options = ["--batch-sizes", "512", "--data", "fashion_mnist_mini", "--csv", "ratios.csv"]
    options += ["--rounds", "1", "--implementations", "native", "bare", "usual"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark_training.py", *options])
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "setLevel", lambda level: None)
    benchmark_training.main()
    rows = list(csv.DictReader((tmp_path / "ratios.csv").open()))
    speed = {row["implementation"]: float(row["images_per_second"]) for row in rows}
    assert set(speed) == {"native", "bare", "usual"}
    for row in rows:
        ratio = speed[row["implementation"]] / speed["bare"]
        assert float(row["to_bare"]) == pytest.approx(ratio, abs=2e-3, rel=2e-3)


def test_python_of_the_pages(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("cnntrain.compose", lambda t: compose([*t, *QUICK, *LIMITS, SCALARS]))
    blocks = (ROOT / "docs/python.md").read_text().split("```python\n")[1:]
    assert blocks
    for block in blocks:
        exec(compile(block.split("```")[0], "python.md", "exec"), {})
