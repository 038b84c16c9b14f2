"""Mistakes on the command line and in files: exit code 2, the option named, nothing written."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT, Run
from forked import run_command

from cnntrain.commands.app import build_problems
from cnntrain.config import ConfigError, compose

MINI = "data=fashion_mnist_mini"
SHALLOW = "_target_: cnntrain.models.Shallow\n"

# What is typed, and what has to be said. Answered without torch, half a second each.
COMMAND_LINES: list[tuple[Sequence[str | bytes], list[str]]] = [
    (["--foo"], ["--foo", "option=value"]),
    (["--model", "lenet5"], ["--model"]),
    (["model", "lenet5"], ["model: cannot be read", "lenet5: cannot be read"]),
    (["-backend=im2col"], ["-backend=im2col"]),
    (["--cfg", "wrong"], ["--cfg", "wrong"]),
    (["--cfg", "job", "-p", "nope"], ["--package=nope"]),
    (["--info", "config", "model=foo"], ["model=foo"]),
    (["--help", "model=foo"], ["model=foo"]),
    (["--run", "-m"], ["--run -m: only one"]),
    (["--experimental-rerun", "x.pickle"], ["--experimental-rerun", "unpickles"]),
    (["--config-dir", ""], ["--config-dir=: is not a folder"]),
    (["--config-path", "nowhere"], ["--config-path=nowhere: is not a folder"]),
    (["--config-name", "nowhere"], ["nowhere"]),
    (["--config-name", "verify"], ["model: missing", "trainer: missing"]),
    (["=5"], ["=5: cannot be read"]),
    ([b"model=\xff"], ["model=\\udcff: is not UTF-8"]),
    (["a\nb"], ["a\\nb: cannot be read"]),
    (["model=lenet5,shallow"], ["model=lenet5,shallow: a sweep needs -m"]),
    (["seed=1", "seed=x"], ["seed=x: must be a whole number"]),
    (["-m", "seed=0,x"], ["seed=x: must be a whole number"]),
    (["-m", "seed=range(0,1000000000)"], ["-m: makes more than 10,000 runs"]),
    (["-m", "seed=glob(*)"], ["seed=glob(*): expands to no value"]),
    (["hydra.mode=FOO"], ["hydra.mode=FOO"]),
    (["hydra/launcher=nope"], ["hydra/launcher=nope"]),
    (["hydra/job_logging=nope"], ["hydra/job_logging=nope"]),
    (["hydra.searchpath=[nowhere]"], ["hydra.searchpath=[nowhere]"]),
    (["hydra.run.dir="], ["hydra.run.dir=: must name a folder"]),
    (["hydra.run.dir=${nope}"], ["hydra: ", "nope"]),
    (["hydra.run.dir='~/x'"], ["hydra.run.dir=~/x", "write hydra.run.dir=/"]),
    (["hydra.run.dir=/proc/x"], ["hydra.run.dir=/proc/x: /proc is not a writable folder"]),
    (
        ["hydra.run.dir=/dev/null/x"],
        ["/dev/null is not a writable folder"],
    ),
    ([f"hydra.run.dir=a/{'x' * 300}"], ["hydra.run.dir=a/xxx", "too long"]),
    (["-m", "seed=0,1", "hydra.sweep.dir=/proc/x"], ["hydra.sweep.dir=/proc/x"]),
    (
        ["-m", "seed=0,1", "hydra.sweep.subdir=x"],
        ["hydra.sweep.subdir=x: members are named"],
    ),
    (["+resume=x"], ["resume=x"]),
]


def _assert_refused(done: subprocess.CompletedProcess[str], said: list[str]) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    first, *problems = done.stderr.splitlines()
    assert first == "cnntrain: invalid configuration"
    assert all(any(part in problem for problem in problems) for part in said), done.stderr


@pytest.mark.parametrize(("arguments", "said"), COMMAND_LINES, ids=lambda v: str(v)[:60])
def test_command_line(tmp_path: Path, arguments: Sequence[str | bytes], said: list[str]) -> None:
    done = run_command(["train", *map(os.fsdecode, arguments)], tmp_path)
    _assert_refused(done, said)
    assert list(tmp_path.iterdir()) == []


# Where nothing but building tells: one process each, with torch.
REFUSED_BY_CONSTRUCTORS = [
    (
        ["train", MINI, "optimizer.lr=-1", "optimizer.eps=-1"],
        ["optimizer: Invalid learning rate: -1"],
    ),
    (["train", "-m", MINI, "optimizer=sgd", "optimizer.momentum=0.9,0"], ["optimizer: Nesterov"]),
    (["train", MINI, "backend._target_=ends.Conv"], ["backend._target_=ends.Conv", "SystemExit"]),
    (["benchmark", "backends=[{_target_:os.system}]"], ["backends._target_=os.system"]),
    (["verify", "json=/proc/report.json"], ["json=/proc/report.json: cannot be written"]),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED_BY_CONSTRUCTORS, ids=lambda v: v[-1])
def test_what_constructors_refuse(tmp_path: Path, arguments: list[str], said: list[str]) -> None:
    module = tmp_path / "ends.py"
    module.write_text("import sys, torch\nclass Conv(torch.nn.Conv2d): pass\nsys.exit(0)\n")
    done = run_command(arguments, tmp_path)
    _assert_refused(done, said)
    assert list(tmp_path.iterdir()) == [module]


def test_a_wrong_option_of_hydra_ends_with_its_message(cnntrain: Run) -> None:
    _assert_refused(cnntrain(MINI, "hydra.job_logging.root.level=FOO"), ["hydra: ", "FOO"])


def _with_file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / "my 'conf' = ü" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / "my 'conf' = ü"


FILES = [
    ("_target_: [\n", "model=mine: "),
    (f"{SHALLOW}channels: 4\nchannels: 8\n", "duplicate key channels"),
    ("- a\n- b\n", "must name a choice"),
    ("just text\n", "must name a choice"),
    ("", "model"),
    (b"_target_: \xff\n", "model=mine: 'utf-8' codec"),
    ("!!python/object/apply:os.system ['touch HERE']\n", "model=mine: "),
    (f"{SHALLOW}channels: .nan\n", "model.channels=NaN: must be a finite number"),
    (f"{SHALLOW}channels: 99999999999999999999\n", "model.channels=99999999999999999999: must be"),
    (f"{SHALLOW}channels: ???\n", "model: "),
    (f"{SHALLOW}channels: ${{oc.env:NOPE}}\n", "'NOPE' not found"),
    (
        f"{SHALLOW}channels: ${{model.pooling}}\npooling: ${{model.channels}}\n",
        "Recursive interpolation",
    ),
    ("_target_: [os.system]\n", "model._target_="),
    (f"{SHALLOW}_args_: [1]\n", "model._args_=[1]: is none of the class's options"),
    (f"defaults:\n  - nowhere\n{SHALLOW}", "nowhere"),
]


@pytest.mark.parametrize(("content", "said"), FILES, ids=lambda value: repr(value)[:40])
def test_file(tmp_path: Path, content: str | bytes, said: str) -> None:
    extra = _with_file(tmp_path, "model/mine", content)
    with pytest.raises(ConfigError) as caught:
        compose(["model=mine"], extra=extra)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems
    assert not any("\n" in problem for problem in caught.value.problems)


def test_a_root_that_is_no_text_is_named(tmp_path: Path) -> None:
    folder = _with_file(tmp_path, "train", b"seed: \xff\n")
    with pytest.raises(ConfigError, match=r"train\.yaml: 'utf-8' codec"):
        compose(folder=folder)


OPTIONS = [
    (["optimizer.lr=nan"], "optimizer.lr=NaN: must be a finite number"),
    (["optimizer.lr=1e999"], "optimizer.lr=Infinity: must be a finite number"),
    (["trainer.max_epochs=99999999999999999999"], "trainer.max_epochs=99999999999999999999: must"),
    (["seed=4294967296"], "seed=4294967296: must be a whole number"),
    (["seed='1'"], "seed=1: must be a whole number"),
    (["model=[lenet5]"], "model=[lenet5]: must name a choice of model"),
    (["loss=5"], "loss=5: must name a choice of loss; python train.py --help lists them"),
    (["model.dropout.x=1"], "model.dropout.x=1"),
    (["+trainer.strategy=ddp"], "trainer.strategy=ddp: is decided by the program"),
    (["trainer.accelerator=mps"], "trainer.accelerator=mps: this machine has no GPU"),
    (["+trainer.min_epochs=50"], "trainer.min_epochs=50: is more than trainer.max_epochs=10"),
    (["+trainer.limit_test_batches=0.01"], "trainer.limit_test_batches=0.01: "),
    (["backend._target_=' torch.nn.Conv2d'"], "must be the dotted name of a class"),
    (["backend._target_=torch..nn"], "backend._target_=torch..nn: must be the dotted name"),
    (["backend._target_=null"], "backend._target_=null: must be the dotted name"),
    (["backend._target_=torch.load"], "backend._target_=torch.load: must be a class"),
    (["+backend._convert_=all"], "backend._convert_=all: is none of the class's options"),
    (["optimizer._target_=torch.optim.SparseAdam"], "takes sparse gradients only"),
]


@pytest.mark.parametrize(("overrides", "said"), OPTIONS, ids=lambda value: str(value)[:60])
def test_option(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


SCHEDULES = [
    ("CosineAnnealingLR", "T_max: 11", "scheduler.T_max=11: is longer than the run"),
    ("StepLR", "step_size: 30", "scheduler.step_size=30: is longer than the run"),
    ("StepLR", "step_size: 0", "scheduler.step_size=0: must be 1 epoch or more"),
    ("MultiStepLR", "milestones: [5, 30]", "scheduler.milestones=[5, 30]: is longer"),
    ("MultiStepLR", "milestones: [a]", 'scheduler.milestones=["a"]: input should be a valid int'),
    ("LinearLR", "total_iters: 30", "scheduler.total_iters=30: is longer"),
    ("CosineAnnealingWarmRestarts", "T_0: 30", "scheduler.T_0=30: is longer"),
    ("ReduceLROnPlateau", "patience: 3", "waits for a metric"),
]


@pytest.mark.parametrize(("name", "option", "said"), SCHEDULES)
def test_schedule_by_epochs(tmp_path: Path, name: str, option: str, said: str) -> None:
    content = f"_target_: torch.optim.lr_scheduler.{name}\n_partial_: true\n{option}\n"
    extra = _with_file(tmp_path, "scheduler/mine", content)
    with pytest.raises(ConfigError) as caught:
        compose(["scheduler=mine", "trainer.max_epochs=10"], extra=extra)
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]
    if "longer" in said:
        assert compose(["scheduler=mine", "trainer.max_epochs=30"], extra=extra)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("\nraise RuntimeError('boom')", "HERE/mine.py:2 raises RuntimeError: boom"),
        ("import sys; sys.exit(0)", "HERE/mine.py:1 raises SystemExit"),
        ("\n\ndef (", "HERE/mine.py:3 raises SyntaxError"),
        ("class C(C): pass", "HERE/mine.py:1 raises NameError"),
        ("import nowhere_at_all", "HERE/mine.py:1 raises ModuleNotFoundError: No module named"),
        ("import torch\ntorch.ones(2) @ torch.ones(3)", "HERE/mine.py:2 raises RuntimeError"),
        ("class Cc: pass", "mine (HERE/mine.py) has no 'C'; did you mean 'Cc'?"),
        ("def C(): pass", "must be a class derived from torch.nn.Conv2d"),
    ],
)
def test_module_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, said: str
) -> None:
    name = f"mine{abs(hash(module))}"  # each is imported once in a process
    (tmp_path / f"{name}.py").write_text(f"{module}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        compose([f"backend._target_={name}.C"])
    problem = caught.value.problems[0].replace(name, "mine").replace(str(tmp_path), "HERE")
    assert f"cannot be imported: {said}" in problem or "must be a class" in said in problem


def test_module_that_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        compose(["backend._target_=nowhere.C"])
    (problem,) = caught.value.problems
    assert "there is no module 'nowhere' among the installed packages, nor in " in problem
    assert f"{tmp_path}, " in problem
    assert problem.endswith("to look in other folders, set PYTHONPATH=<folder>")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.crop=28"], "data.crop=28: on images of 28x28"),
        (["trainer.accumulate_grad_batches=37"], "trainer.accumulate_grad_batches=37: an epoch"),
        (["+trainer.limit_train_batches=0.001"], "trainer.limit_train_batches=0.001: is less"),
        (["+trainer.limit_val_batches=0.1"], "trainer.limit_val_batches=0.1: is less than one"),
    ],
)
def test_contradiction_with_the_data(overrides: list[str], said: str) -> None:
    """4,500 images to train on are 36 batches of 128; 500 to validate with are one."""
    problems = build_problems(compose([MINI, *overrides]), lambda cfg: None)
    assert len(problems) == 1
    assert problems[0].startswith(said)


@pytest.mark.parametrize("overrides", [["data.crop=27"], ["trainer.accumulate_grad_batches=36"]])
def test_no_contradiction_with_the_data(overrides: list[str]) -> None:
    assert build_problems(compose([MINI, *overrides]), lambda cfg: None) == []


def test_help_into_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"],
        cwd=tmp_path,
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert done.stderr == b""


def test_a_sweep_in_a_file_is_checked(cnntrain: Run, tmp_path: Path) -> None:
    sweep = (
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 0,x\n"
    )
    extra = _with_file(tmp_path, "experiment/sweep", sweep)
    done = cnntrain("--config-dir", str(extra), "experiment=sweep")
    _assert_refused(done, ["seed=x: must be a whole number"])
    assert list(tmp_path.iterdir()) == [extra]


def test_an_occupied_directory_is_found_wherever_it_is_named(cnntrain: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text("{}")
    _with_file(tmp_path, "experiment/e", "# @package _global_\nhydra:\n  run:\n    dir: run\n")
    done = cnntrain("--config-dir", "my 'conf' = ü", "experiment=e")
    _assert_refused(done, ["hydra.run.dir=run: holds another run already"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result.json"]
