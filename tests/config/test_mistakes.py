"""Invalid command lines and files: exit code 2, a line per option, nothing written."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Reject
from forked import run_command

from cnntrain.commands.app import build_problems
from cnntrain.config import ConfigError, compose

MINI = "data=fashion_mnist_mini"
SHALLOW = "_target_: cnntrain.models.Shallow\n"

# Arguments, and parts of the problems that are reported.
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
    (["seed=1", "seed=x"], ["seed=x: input should be a valid integer"]),
    (["-m", "seed=0,x"], ["seed=x: input should be a valid integer"]),
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
    (["hydra.run.dir=/dev/null/x"], ["/dev/null is not a writable folder"]),
    (["--resolve"], ["--resolve: requires --cfg"]),
    (["-m", "seed=0,1", "hydra.sweep.dir=/proc/x"], ["hydra.sweep.dir=/proc/x"]),
    (
        ["-m", "seed=0,1", "hydra.sweep.subdir=x"],
        ["hydra.sweep.subdir=x: members are named"],
    ),
    (["+resume=x"], ["resume=x"]),
]


def _assert_rejected(done: subprocess.CompletedProcess[str], expected: list[str]) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    first, *problems = done.stderr.splitlines()
    assert first == "cnntrain: invalid configuration"
    assert all(any(part in problem for problem in problems) for part in expected), done.stderr


@pytest.mark.parametrize(("arguments", "expected"), COMMAND_LINES, ids=lambda v: str(v)[:60])
def test_command_line(
    reject: Reject, arguments: Sequence[str | bytes], expected: list[str]
) -> None:
    problems = reject(*map(os.fsdecode, arguments))
    assert all(any(part in problem for problem in problems) for part in expected), problems


# Reported by constructors: a dry run builds what the command builds.
CONSTRUCTOR_ERRORS = [
    (
        ["train", MINI, "optimizer.lr=-1", "optimizer.eps=-1"],
        ["optimizer: Invalid learning rate: -1"],
    ),
    (["train", "-m", MINI, "optimizer=sgd", "optimizer.momentum=0.9,0"], ["optimizer: Nesterov"]),
    (["train", MINI, "backend._target_=ends.Conv"], ["backend._target_=ends.Conv", "SystemExit"]),
    (["train", MINI, "hydra.job_logging.root.level=FOO"], ["hydra: ", "FOO"]),
    (["benchmark", "backends=[{_target_:os.system}]"], ["backends._target_=os.system"]),
    (["verify", "json=/proc/report.json"], ["json=/proc/report.json: cannot be written"]),
]


@pytest.mark.parametrize(("arguments", "expected"), CONSTRUCTOR_ERRORS, ids=lambda v: v[-1])
def test_constructor_errors(tmp_path: Path, arguments: list[str], expected: list[str]) -> None:
    module = tmp_path / "ends.py"
    module.write_text("import sys, torch\nclass Conv(torch.nn.Conv2d): pass\nsys.exit(0)\n")
    _assert_rejected(run_command(arguments, tmp_path), expected)
    assert [*tmp_path.iterdir()] == [module] or "FOO" in expected


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
    (f"{SHALLOW}channels: .nan\n", "model.channels=NaN: input should be a"),
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


@pytest.mark.parametrize(("content", "expected"), FILES, ids=lambda value: repr(value)[:40])
def test_file(tmp_path: Path, content: str | bytes, expected: str) -> None:
    extra = _with_file(tmp_path, "model/mine", content)
    with pytest.raises(ConfigError) as caught:
        compose(["model=mine"], extra=extra)
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems
    assert not any("\n" in problem for problem in caught.value.problems)


def test_root_config_that_is_not_utf8(tmp_path: Path) -> None:
    folder = _with_file(tmp_path, "train", b"seed: \xff\n")
    with pytest.raises(ConfigError, match=r"train\.yaml: 'utf-8' codec"):
        compose(folder=folder)


OPTIONS = [
    (["optimizer.lr=nan"], "optimizer.lr=NaN: input should be a finite number"),
    (["optimizer.lr=1e999"], "optimizer.lr=Infinity: input should be a finite number"),
    (["seed=4294967296"], "seed=4294967296: input should be less than 4294967296"),
    (["seed='1'"], "seed=1: input should be a valid integer"),
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


@pytest.mark.parametrize(("overrides", "expected"), OPTIONS, ids=lambda value: str(value)[:60])
def test_option(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems


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


@pytest.mark.parametrize(("name", "option", "expected"), SCHEDULES)
def test_schedule_by_epochs(tmp_path: Path, name: str, option: str, expected: str) -> None:
    content = f"_target_: torch.optim.lr_scheduler.{name}\n_partial_: true\n{option}\n"
    extra = _with_file(tmp_path, "scheduler/mine", content)
    with pytest.raises(ConfigError) as caught:
        compose(["scheduler=mine", "trainer.max_epochs=10"], extra=extra)
    assert len(caught.value.problems) == 1
    assert expected in caught.value.problems[0]
    if "longer" in expected:
        assert compose(["scheduler=mine", "trainer.max_epochs=30"], extra=extra)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("\nraise RuntimeError('boom')", "HERE/mine.py:2 raises RuntimeError: boom"),
        ("import sys; sys.exit(0)", "HERE/mine.py:1 raises SystemExit"),
        ("\n\ndef (", "HERE/mine.py:3 raises SyntaxError"),
        ("class C(C): pass", "HERE/mine.py:1 raises NameError"),
        ("import nowhere_at_all", "HERE/mine.py:1 raises ModuleNotFoundError: No module named"),
        ("import torch\ntorch.ones(2) @ torch.ones(3)", "HERE/mine.py:2 raises RuntimeError"),
        ("class Cc: pass", "HERE/mine.py has no 'C'; did you mean 'Cc'?"),
        ("def C(): pass", "must be a class derived from torch.nn.Conv2d"),
    ],
)
def test_user_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, expected: str
) -> None:
    name = f"mine{abs(hash(module))}"  # each is imported once in a process
    (tmp_path / f"{name}.py").write_text(f"{module}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        compose([f"backend._target_={name}.C"])
    problem = caught.value.problems[0].replace(name, "mine").replace(str(tmp_path), "HERE")
    assert f"cannot be imported: {expected}" in problem or "must be a class" in expected in problem


def test_module_that_is_not_found() -> None:
    with pytest.raises(ConfigError, match="there is no module 'nowhere' in the current folder, PY"):
        compose(["backend._target_=nowhere.C"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.crop=28"], "data.crop=28: on images of 28x28"),
        (["trainer.accumulate_grad_batches=37"], "trainer.accumulate_grad_batches=37: an epoch"),
        (["+trainer.limit_train_batches=0.001"], "trainer.limit_train_batches=0.001: is less"),
        (["+trainer.limit_val_batches=0.1"], "trainer.limit_val_batches=0.1: is less than one"),
    ],
)
def test_contradiction_with_the_data(overrides: list[str], expected: str) -> None:
    """4,500 images to train on are 36 batches of 128; 500 to validate with are one."""
    problems = build_problems(compose([MINI, *overrides]), lambda cfg: None)
    assert len(problems) == 1
    assert problems[0].startswith(expected)


@pytest.mark.parametrize("overrides", [["data.crop=27"], ["trainer.accumulate_grad_batches=36"]])
def test_no_contradiction_with_the_data(overrides: list[str]) -> None:
    assert build_problems(compose([MINI, *overrides]), lambda cfg: None) == []


def test_sweep_in_a_file_is_checked(reject: Reject, tmp_path: Path) -> None:
    sweep = (
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 0,x\n"
    )
    extra = _with_file(tmp_path, "experiment/sweep", sweep)
    (problem,) = reject("--config-dir", str(extra), "experiment=sweep")
    assert "seed=x: input should be a valid integer" in problem


def test_run_directory_in_a_file_holds_a_run(reject: Reject, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text("{}")
    _with_file(tmp_path, "experiment/e", "# @package _global_\nhydra:\n  run:\n    dir: run\n")
    (problem,) = reject("--config-dir", "my 'conf' = ü", "experiment=e")
    assert "hydra.run.dir=run: holds another run already" in problem
